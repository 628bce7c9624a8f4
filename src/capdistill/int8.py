"""Rounding to 8 bits and back, with gradients: of weights, of vectors and of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capdistill.errors import CheckpointError, as_float, shortened

Ranges = dict[str, tuple[float, float]]


def round_weight(weight: Tensor) -> Tensor:
    """A weight rounded to int8 per output channel, its first axis, and back.

    The scale of a channel is max|w| / 127 and its zero is 0. The gradient passes straight through:
    nothing is clipped. A batch norm behind the layer scales whole channels, so that rounding
    before and after it is folded into the weight is the same.

    Example:
        >>> round_weight(torch.tensor([[127.0, 1.4, -2.6], [0.0, 0.0, 0.0]]))
        tensor([[127.,   1.,  -3.],
                [  0.,   0.,   0.]])

    Args:
        weight: (channels, ...) floating point.

    Source:
        Jacob et al. (2018), Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, section 3; per channel: Krishnamoorthi (2018),
        section 3.1.
    """
    scale = weight.detach().flatten(1).abs().amax(1).float() / 127
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def round_rows(x: Tensor) -> Tensor:
    """Each vector along the last axis rounded to 8 bits by its own scale, max|x| / 127.

    Nothing is clipped, and no vector changes the rounding of another.

    Example:
        >>> round_rows(torch.tensor([[127.0, 1.4], [-254.0, 3.0]]))
        tensor([[ 127.,    1.],
                [-254.,    4.]])

    Args:
        x: (..., width).
    """
    return round_weight(x.reshape(-1, x.shape[-1])).view(x.shape) if x.numel() else x


def round_activation(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values rounded to uint8 and back; the gradient is 0 where a value was clipped.

    Example:
        >>> scale, zero = scale_and_zero(torch.tensor([[-1.0, 1.55]]))
        >>> round_activation(torch.tensor([-2.0, 0.0, 0.014, 0.016]), scale[0], zero[0])
        tensor([-1.0000,  0.0000,  0.0100,  0.0200])

    Args:
        x: Any shape.
        scale, zero: Scalars from `scale_and_zero`.

    Source:
        Jacob et al. (2018), equation 12.
    """
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def scale_and_zero(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) lowest and highest values to (N,) scales and (N,) int32 zeros of uint8.

    A range is extended to hold 0, which then is a whole number of steps.
    """
    low, high = ranges[:, 0].clamp(max=0), ranges[:, 1].clamp(min=0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round().clamp(0, 255).int()


def read_ranges(data: Any, where: object) -> Ranges | None:
    """Ranges from the description of a saved captioner; None if it has none.

    Example:
        >>> read_ranges({"encoder.conv": [-1.0, 2.5]}, "runs/best")
        {'encoder.conv': (-1.0, 2.5)}

    Raises:
        CheckpointError: they are no pairs of finite numbers.
    """
    if data is None:
        return None
    found: Ranges = {}
    for name, pair in data.items() if isinstance(data, Mapping) else [("", data)]:
        numbers = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (1, 0)
        low, high = map(as_float, numbers)
        finite = math.isfinite(low) and math.isfinite(high)
        if not isinstance(data, Mapping) or not finite or low > high:
            raise CheckpointError(
                f"{where}: activation_ranges has {name!r}: {shortened(pair)}, which is no pair of "
                "a lowest and a highest number. Copy the file again, or remove activation_ranges."
            )
        found[str(name)] = low, high
    return found
