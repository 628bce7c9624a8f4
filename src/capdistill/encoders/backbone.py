"""What every encoder around a pretrained backbone shares: layout, freezing, head, fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capdistill.encoders.base import Encoder, Refine, make_head
from capdistill.errors import ConfigError


class BackboneEncoder(Encoder):
    """An encoder around a backbone: a subclass makes it, runs it and says what it gives.

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
        name: How messages and the fingerprint call the backbone.
        backbone: The module, its weights loaded; parts that make no tokens are removed from it.
        pixels: What it wants to see.
        dim: D, or None for the backbone's own width and no projection.
        trainable: "none", the number of last stages that are trained, or "all".
        refine: Self-attention before ("pre") or after ("post") the projection, or "none".
        dropout: In the refinement and on the projected tokens.

    Raises:
        ConfigError: an option that cannot work, or a backbone that gives no tokens.
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
        self._hashed: tuple[object, str] | None = None
        used = [[key for key in stage if key not in self._unused] for stage in self.stages()]
        set_trainable(backbone, trainable, [stage for stage in used if stage], name)
        self.train()

    @abstractmethod
    def run_backbone(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) normalised pixels to tokens (I, N, D0) or the last map."""

    @abstractmethod
    def lay_out(self, output: Tensor) -> Layout:
        """How that output (of one image, 3-d or 4-d) is to be read."""

    @abstractmethod
    def stages(self) -> list[list[str]]:
        """Names of the backbone's parameters, a list a stage, the stem first."""

    def trunk(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 images to (I, N, D0) tokens; frozen stages build no graph."""
        pixels = self.normalise(images)
        if self.layout.form != "tokens":  # convolutions run 1.3 to 2 times faster so on CPUs
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.layout.flatten(self.run_backbone(self.backbone, pixels))

    def head(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D): refinement and projection, always trainable."""
        features: Tensor = self.project(tokens)
        return features

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone."""
        return self.backbone.parameters()

    def train(self, mode: bool = True) -> BackboneEncoder:
        """As `nn.Module.train`, but what is frozen stays in eval mode."""
        super().train(mode)
        if mode:
            eval_where_frozen(self.backbone)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of name, preprocessing and the backbone's weights; the same in any process."""
        state = self.backbone.state_dict()
        version = [(tensor.data_ptr(), tensor._version) for tensor in state.values()]
        if self._hashed is None or self._hashed[0] != version:
            self._hashed = version, self._hash(state)
        return self._hashed[1]

    def _hash(self, state: dict[str, Tensor]) -> str:
        about = [type(self).__name__, self.name, self.image_size, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(about).encode())
        for key in sorted(state):
            tensor = state[key].detach().cpu().contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._hashed = None  # another device or precision: memory may be reused
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _dry_run(self) -> tuple[Layout, frozenset[str]]:
        """Layout, and parameters without effect on it. A copy runs: nothing of ours changes."""
        backbone = copy.deepcopy(self.backbone).eval().requires_grad_(True)
        named = dict(backbone.named_parameters())
        side, device = self.image_size, next(iter(named.values())).device
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
            "(I, D, h, w). Choose another backbone, or register an Encoder of your own."
        )


Form = Literal["tokens", "NCHW", "NHWC"]


@dataclass(frozen=True)
class Pixels:
    """What a backbone wants to see.

    Example:
        >>> Pixels(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).image_size
        224

    Args:
        image_size: Side in pixels.
        mean, std: Normalisation of pixels in [0, 1], one value a channel.

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
    """Layout of a 3-d output; where the grid of patches is unknown, a square one is tried.

    Example:
        >>> token_layout((1, 197, 384), prefix=1).grid
        (14, 14)
    """
    _, tokens, width = shape
    places = tokens - prefix
    side = math.isqrt(max(places, 0))
    grid = patches if patches and math.prod(patches) == places else (side, side)
    return Layout("tokens", width, tokens, prefix, grid if math.prod(grid) == places else None)


Trainable = Literal["none", "all"] | int


def set_trainable(
    backbone: nn.Module, trainable: Trainable, stages: list[list[str]], name: str
) -> None:
    """Let exactly the chosen stages require a gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> set_trainable(model, 1, [["0.weight", "0.bias"], ["1.weight", "1.bias"]], "two")
        >>> [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']

    Args:
        backbone: The module.
        trainable: "none", the number of last stages, or "all".
        stages: Names of parameters, a list a stage, the stem first.
        name: How messages call the backbone.

    Raises:
        ConfigError: `trainable` is none of these, or more stages than there are.
    """
    chosen = set(_last_stages(trainable, stages, name))
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(key in chosen)


def eval_where_frozen(module: nn.Module) -> None:
    """Eval mode for every part without a trained parameter: statistics, drop-out, drop-path.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1).requires_grad_(False), nn.BatchNorm1d(1))
        >>> eval_where_frozen(model.train())
        >>> [part.training for part in model]
        [False, True]
    """
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and all(trained):
        return
    if not any(trained):
        module.eval()
        return
    module.training = False
    for child in module.children():
        eval_where_frozen(child)


def remove_unused(backbone: nn.Module, unused: Iterable[str]) -> None:
    """Take out children that make no tokens (classifiers, poolings), so that counts are true.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(1, 1), "pool": nn.Linear(1, 1)})
        >>> remove_unused(model, ["pool.weight", "pool.bias"])
        >>> [key for key, _ in model.named_parameters()]
        ['body.weight', 'body.bias']

    Args:
        backbone: The module.
        unused: Names of parameters that do not act on the tokens.
    """
    unused = frozenset(unused)
    for child, module in list(backbone.named_children()):
        keys = [f"{child}.{key}" for key, _ in module.named_parameters()]
        if keys and unused.issuperset(keys):
            backbone.set_submodule(child, nn.Identity())


def child_stages(backbone: nn.Module, containers: Iterable[str] = ()) -> list[list[str]]:
    """A stage a child, and a stage a grandchild in the containers; names of parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        >>> child_stages(model)
        [['0.weight', '0.bias'], ['2.weight', '2.bias']]

    Args:
        backbone: The module.
        containers: Names of children that hold stages themselves.
    """
    stages: dict[str, list[str]] = {}
    for key, _ in backbone.named_parameters():
        parts = key.split(".")
        stage = ".".join(parts[: 2 if parts[0] in containers else 1])
        stages.setdefault(stage, []).append(key)
    return list(stages.values())


def _last_stages(trainable: Trainable, stages: list[list[str]], name: str) -> list[str]:
    if trainable == "none":
        return []
    if trainable == "all":
        return [key for stage in stages for key in stage]
    if isinstance(trainable, bool) or not isinstance(trainable, int):
        raise ConfigError(
            f"trainable is {trainable!r}; it must be 'none', 'all' or a number of last stages."
        )
    if not 0 <= trainable <= len(stages):
        raise ConfigError(
            f"trainable={trainable}, but '{name}' has {len(stages)} stages, its stem included. "
            f"Give 0 to {len(stages)}, or 'all'."
        )
    return [key for stage in stages[len(stages) - trainable :] for key in stage]
