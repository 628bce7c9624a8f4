"""What every encoder around a pretrained backbone shares: layout, freezing, head, fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.encoders.base import Encoder
from capdistill.encoders.freezing import Trainable, eval_where_frozen, remove_unused, set_trainable
from capdistill.encoders.layout import Layout, Pixels
from capdistill.encoders.refine import Refine, make_head
from capdistill.errors import ConfigError


class BackboneEncoder(Encoder):
    """An encoder around a backbone: a subclass makes it, runs it and says what it gives.

    Example:
        >>> from capdistill.encoders.layout import map_layout
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
        ConfigError: an option that can not work, or a backbone that gives no tokens.
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
                f"The backbone '{self.name}' can not read images of {self.image_size} x "
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
