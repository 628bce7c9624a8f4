"""Base of encoders with a pretrained backbone: layout, freezing, head, fingerprint."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.encoders.base import Encoder, hash_values
from capdistill.encoders.stages import Cut, Trainable, find_cut, remove_unused, set_trainable
from capdistill.errors import ConfigError, require_number


class BackboneEncoder(Encoder):
    """An encoder around a backbone. A subclass creates it, runs it and describes its output.

    Example:
        >>> from capdistill.encoders.backbone import map_layout
        >>> class Patches(BackboneEncoder):
        ...     def run_backbone(self, backbone, pixels):
        ...         return backbone(pixels)
        ...     def lay_out(self, output):
        ...         return map_layout(output.shape, "NCHW")
        ...     def stages(self):
        ...         return [["weight", "bias"]]
        >>> pixels = Pixels(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> encoder = Patches("patches", nn.Conv2d(3, 8, 16, 16), pixels, dim=4)
        >>> encoder.grid, encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape
        ((2, 2), torch.Size([1, 4, 4]))

    Args:
        name: Name of the backbone in messages and in the fingerprint.
        backbone: The module with its weights loaded. Parts without effect on the tokens are
            removed from it.
        pixels: The images that it expects.
        dim: D, or None for the backbone's width without a projection.
        trainable: "none", the number of last stages that are trained, or "all".
        refine: Self-attention before ("pre") or after ("post") the projection, or "none".
        dropout: Dropout in the refinement and on the projected tokens.

    Raises:
        ConfigError: an option is invalid, or the backbone does not return tokens.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        pixels: Pixels,
        *,
        dim: int | None = None,
        trainable: Trainable = "none",
        refine: Refine = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self.backbone = name, backbone
        self.image_size, self.mean, self.std = pixels.image_size, pixels.mean, pixels.std
        self.layout, self._unused = self._dry_run()
        remove_unused(backbone, self._unused)
        self.token_dim, self.tokens = self.layout.width, self.layout.tokens
        self.prefix_tokens, self.grid = self.layout.prefix, self.layout.grid
        self.project = make_head(self.token_dim, dim, refine, dropout)
        self.dim = self.token_dim if dim is None else dim
        self._found: tuple[tuple[bool, ...], Cut | None] | None = None
        used = [[key for key in stage if key not in self._unused] for stage in self.stages()]
        set_trainable(backbone, trainable, [stage for stage in used if stage], name)
        self.train()

    @abstractmethod
    def run_backbone(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) normalised pixels to tokens (I, N, D0) or the last map."""

    @abstractmethod
    def lay_out(self, output: Tensor) -> Layout:
        """Layout of that output (of one image, 3-d or 4-d)."""

    @abstractmethod
    def stages(self) -> list[list[str]]:
        """Names of the backbone's parameters, one list per stage, the stem first."""

    def trunk(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 images to (I, N, D0) tokens; frozen stages build no graph."""
        return self.layout.flatten(self.run_backbone(self.backbone, self._pixels(images)))

    def head(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D): refinement and projection, always trainable."""
        features: Tensor = self.project(tokens)
        return features

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone."""
        return self.backbone.parameters()

    def frozen_stages(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 to the input of the first trained stage, or the trunk's tokens."""
        cut = self._cut()
        if cut is None:
            return self.trunk(images)
        return cut.frozen(self.run_backbone, self.backbone, self._pixels(images))

    def remaining_stages(self, cached: Tensor) -> Tensor:
        """The output of `frozen_stages` to (I, N, D0) tokens, through the trained stages."""
        cut = self._cut()
        if cut is None:
            return cached
        return self.layout.flatten(cut.rest(self.run_backbone, self.backbone, cached))

    def fingerprint(self) -> str | None:
        """SHA-256 of the frozen stages' values, settings and preprocessing; equal in every process.

        None if no stage is frozen, or the backbone cannot be cut before the first trained one.
        """
        if self.trunk_frozen:
            return self.trunk_fingerprint()
        cut = self._cut()
        return None if cut is None else self._hash(cut)

    def trunk_fingerprint(self) -> str:
        """As `fingerprint`, for all stages, whichever are trained."""
        return self._hash(None)

    def _hash(self, cut: Cut | None) -> str:
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        about = [kind, self.name, self.image_size, self.mean, self.std, cut and cut.module]
        return hash_values(self.backbone, about, None if cut is None else cut.is_frozen)

    def _cut(self) -> Cut | None:
        """Where the backbone is cut; recomputed when other parameters are trained."""
        flags = tuple(parameter.requires_grad for parameter in self.backbone.parameters())
        if not any(flags) or all(flags):
            return None
        if self._found is None or self._found[0] != flags:
            shape = (3, self.image_size, self.image_size)
            self._found = flags, find_cut(self.backbone, self._run_pixels, shape)
        return self._found[1]

    def _pixels(self, images: Tensor) -> Tensor:
        return self._in_memory(self.normalise(images))

    def _run_pixels(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        return self.run_backbone(backbone, self._in_memory(pixels))

    def _in_memory(self, pixels: Tensor) -> Tensor:
        if self.layout.form == "tokens":
            return pixels
        return pixels.contiguous(memory_format=torch.channels_last)  # 1.3 to 2 times faster on CPUs

    def _dry_run(self) -> tuple[Layout, frozenset[str]]:
        """Layout of the output, and parameters without effect on it, found with a copy."""
        backbone = copy.deepcopy(self.backbone).eval().requires_grad_(True)
        named = dict(backbone.named_parameters())
        side, device = self.image_size, next(iter(named.values())).device
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                f"{type(self).__name__}: it is made under torch.inference_mode(), where weights "
                "cannot be trained. Make it outside, or under torch.no_grad()."
            )
        with torch.enable_grad():
            output = self._try(backbone, torch.zeros(1, 3, side, side, device=device))
            grads = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
        unused = [key for key, grad in zip(named, grads, strict=True) if grad is None]
        return self.lay_out(output), frozenset(unused)

    def _try(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        try:
            output = self.run_backbone(backbone, pixels)
        except Exception as error:
            raise ConfigError(
                f"The backbone '{self.name}' cannot read images of {self.image_size} x "
                f"{self.image_size} pixels ({type(error).__name__}: {error}). Leave image_size "
                "out to get the size it was made for, or choose another backbone."
            ) from error
        if isinstance(output, Tensor) and output.ndim in (3, 4):
            return output
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"The backbone '{self.name}' gives {given}, not tokens (I, N, D) or a map "
            "(I, D, h, w). Choose another backbone, or register your own Encoder."
        )


Form = Literal["tokens", "NCHW", "NHWC"]


@dataclass(frozen=True)
class Pixels:
    """The images that a backbone expects.

    Example:
        >>> Pixels(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).image_size
        224

    Args:
        image_size: Side in pixels.
        mean, std: Normalisation of pixels in [0, 1], one value per channel.

    Raises:
        ConfigError: the side is not a positive number of pixels.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        side = self.image_size
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ConfigError(f"image_size is {side!r}; it must be a side in pixels, such as 224.")


@dataclass(frozen=True)
class Layout:
    """How the output of a backbone becomes tokens (I, N, D0).

    Example:
        >>> import torch
        >>> layout = map_layout((1, 64, 7, 7), "NCHW")
        >>> layout.grid, layout.flatten(torch.zeros(2, 64, 7, 7)).shape
        ((7, 7), torch.Size([2, 49, 64]))

    Args:
        form: "tokens" (I, N, D0), or a map with its channels second ("NCHW") or last ("NHWC").
        width: D0.
        tokens: N.
        prefix: CLS and register tokens, which come first.
        grid: (h, w) with N = prefix + h * w, or None.
    """

    form: Form
    width: int
    tokens: int
    prefix: int
    grid: tuple[int, int] | None

    def flatten(self, output: Tensor) -> Tensor:
        """The backbone's output to (I, N, D0)."""
        if self.form == "NCHW":
            return output.flatten(2).transpose(1, 2)
        return output.flatten(1, 2) if self.form == "NHWC" else output


def map_layout(shape: tuple[int, ...], form: Form) -> Layout:
    """Layout of a 4-d output.

    Example:
        >>> map_layout((1, 7, 7, 96), "NHWC")
        Layout(form='NHWC', width=96, tokens=49, prefix=0, grid=(7, 7))
    """
    width, h, w = shape[1:] if form == "NCHW" else (shape[3], *shape[1:3])
    return Layout(form, width, h * w, 0, (h, w))


def token_layout(
    shape: tuple[int, ...], prefix: int, patches: tuple[int, int] | None = None
) -> Layout:
    """Layout of a 3-d output; if the grid of patches is unknown, a square one is tried.

    Example:
        >>> token_layout((1, 197, 384), prefix=1).grid
        (14, 14)
    """
    _, tokens, width = shape
    places = tokens - prefix
    side = math.isqrt(max(places, 0))
    grid = patches if patches and math.prod(patches) == places else (side, side)
    return Layout("tokens", width, tokens, prefix, grid if math.prod(grid) == places else None)


Refine = Literal["none", "pre", "post"]


class TokenAttention(nn.Module):
    """Self-attention among visual tokens, through a bottleneck, with a residual.

    `x + up(attention(down(norm(x))))`; if the inner width equals that of the tokens, `down` and
    `up` merge with the attention's own projections.

    Example:
        >>> import torch
        >>> TokenAttention(width=64, inner=16)(torch.zeros(2, 49, 64)).shape
        torch.Size([2, 49, 64])

    Args:
        width: D0, width of the tokens.
        inner: Width of the attention; heads are the largest of 8, 4, 2, 1 that divides it.
        dropout: Dropout on attention weights and on the residual branch.
    """

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = math.gcd(inner, 8)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Identity() if inner == width else nn.Linear(width, inner)
        self.qkv = nn.Linear(inner, 3 * inner)
        self.up = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.up.weight, std=0.02)  # starts near the identity
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D0)."""
        qkv = self.qkv(self.down(self.norm(tokens)))  # (I, N, 3 inner)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)  # (I, h, N, d)
        added: Tensor = self.dropout(self.up(mixed.transpose(1, 2).flatten(2)))  # (I, N, D0)
        return tokens + added


def make_head(width: int, dim: int | None, refine: Refine, dropout: float) -> nn.Sequential:
    """Modules from backbone tokens (I, N, D0) to features (I, N, D).

    Example:
        >>> [type(part).__name__ for part in make_head(64, 16, "pre", 0.0)]
        ['TokenAttention', 'LayerNorm', 'Linear']

    Args:
        width: D0.
        dim: D, or None for no projection.
        refine: Attention before the projection, after it, or none.
        dropout: Dropout in the refinement and on the projected tokens.

    Raises:
        ConfigError: a value is invalid.
    """
    if refine not in ("none", "pre", "post"):
        raise ConfigError(f"refine is {refine!r}; it must be 'none', 'pre' or 'post'.")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
        raise ConfigError(f"dim is {dim!r}; it must be a positive width, or None for {width}.")
    require_number("dropout", dropout, minimum=0, below=1)
    inner = dim or width
    parts: list[nn.Module] = []
    if refine == "pre":
        parts.append(TokenAttention(width, inner, dropout))
    if dim is not None:
        parts += [nn.LayerNorm(width), nn.Linear(width, dim)]
    if refine == "post":
        parts.append(TokenAttention(inner, inner, dropout))
    if dropout and dim is not None:
        parts.append(nn.Dropout(dropout))
    return nn.Sequential(*parts)
