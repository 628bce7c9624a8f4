"""What a backbone wants to see and how its output becomes tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from capdistill.errors import ConfigError

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
