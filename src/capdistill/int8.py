"""Rounding to 8 bits and back, with gradients: of weights, of vectors and of activations.

Training rounds at the places where the export to int8 does: `find_ends` finds those in an encoder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capdistill.errors import CheckpointError, as_float, shortened
from capdistill.runtime import evaluating

Ranges = dict[str, tuple[float, float]]
LEAST = 4096  # entries of a matrix; smaller ones are left as they are
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CLIPPING = (nn.ReLU, nn.ReLU6, nn.Hardtanh)  # an export rounds behind them
_CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
_NORMS = (nn.modules.batchnorm._BatchNorm,)  # an export folds them into the convolution


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


class RoundedProducts(TorchFunctionMode):
    """Inside, what is multiplied by one of some weights is rounded by rows.

    Example:
        >>> x, weight = torch.tensor([[127.0, 1.4]]), torch.eye(2)
        >>> with RoundedProducts([weight]):
        ...     F.linear(x, weight)
        tensor([[127.,   1.]])

    Args:
        weights: Matrices, known by their identity.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight): weight for weight in weights}

    def __torch_function__(
        self, call: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if call is F.linear and len(args) > 1:
            x, weight, *rest = args
            args = (self._rounded(x, weight), weight, *rest)
        elif call in _CELLS:  # x, h or (h, c), and the weights of both
            x, state, *rest = args
            h, *c = state if isinstance(state, (tuple, list)) else (state,)
            h = self._rounded(h, rest[1])
            args = (self._rounded(x, rest[0]), (h, *c) if c else h, *rest)
        return call(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor, weight: Tensor) -> Tensor:
        return round_rows(x) if id(weight) in self.weights else x


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


# -- where an encoder is rounded ------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """Where the output of a convolution is rounded.

    Args:
        module: The convolution, or the batch norm or the clipping activation behind it.
        before: The input of the module is rounded, not its output.
    """

    module: nn.Module
    before: bool = False


def find_ends(
    encoder: nn.Module,
) -> tuple[nn.Module | None, dict[nn.Module, End], dict[nn.Module, nn.Module]]:
    """Run an encoder on a black image, to see which outputs of convolutions are rounded.

    An output that only convolutions read is rounded as their input.

    Args:
        encoder: It has an `image_size` and a `mean` of as many values as channels.

    Returns:
        The first convolution that runs; where the outputs of others end; and which of these each
        convolution reads, if one.
    """
    watch = _Watch()
    side, device = int(cast("int", encoder.image_size)), next(encoder.parameters()).device
    shape = (1, len(cast("tuple[float, ...]", encoder.mean)), side, side)
    hooks = [each.register_forward_hook(watch.see) for each in encoder.modules()]
    try:
        with evaluating(encoder), torch.no_grad(), watch:
            encoder(torch.zeros(shape, dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return watch.first, *watch.found()


class _Watch(TorchFunctionMode):
    """Notes what reads the outputs of convolutions. Outputs are kept, so that ids are unique."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module | None = None
        self.calls: Counter[nn.Module] = Counter()
        self.made: dict[int, tuple[Tensor, nn.Module]] = {}  # an output, and its convolution
        self.ends: dict[nn.Module, End] = {}
        self.readers: dict[int, list[nn.Module]] = {}  # convolutions, norms and activations
        self.reads: Counter[int] = Counter()  # by functions, those of the readers included
        self.changed: set[int] = set()  # in place, since they were made

    def __torch_function__(
        self, call: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = call(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) for each in _flat([output])):  # not a shape
            self.reads.update(id(each) for each in _flat(args) if id(each) in self.made)
        if args and output is args[0]:
            self.changed.add(id(output))
        return output

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        self.calls[module] += 1
        given = id(args[0]) if args else 0
        source = self.made[given][1] if given in self.made else None
        if isinstance(module, CONVOLUTIONS) and given in self.changed:
            source = None
        read = source is not None
        if isinstance(module, CONVOLUTIONS):
            self.first = self.first or module
            source, end = module, End(module)
        elif source is not None and isinstance(module, (*_NORMS, *_CLIPPING)):
            end = _end(module)
        else:
            return
        if read:
            self.readers.setdefault(given, []).append(module)
        self.ends[source] = end
        if not end.before:
            self.made[id(output)] = output, source
            self.changed.discard(id(output))

    def found(self) -> tuple[dict[nn.Module, End], dict[nn.Module, nn.Module]]:
        """The ends of outputs that are rounded, and which convolution reads which of them."""
        last = {conv: key for key, (_, conv) in self.made.items()}
        ends: dict[nn.Module, End] = {}
        sources: dict[nn.Module, nn.Module] = {}
        for conv, end in self.ends.items():
            readers = self.readers.get(last[conv], [])
            convolutions = [each for each in readers if isinstance(each, CONVOLUTIONS)]
            others = self.reads[last[conv]] > len(readers)
            if self.calls[end.module] == self.calls[conv] == 1 and (others or not convolutions):
                ends[conv] = end
                sources |= {each: conv for each in convolutions if self.calls[each] == 1}
        return ends, sources


def _end(module: nn.Module) -> End:
    """A batch norm with an activation inside ends before it, unless that only clips."""
    inside = [each for each in module.children() if not isinstance(each, nn.Identity)]
    if inside and not isinstance(inside[-1], _CLIPPING):
        return End(inside[-1], before=True)
    return End(module)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)
