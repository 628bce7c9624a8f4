"""Fake quantization: a captioner computes in training as it will after its export to int8.

Weights, and the inputs of convolutions and linear layers, are rounded to 8 bits and back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from capdistill import int8
from capdistill.errors import ConfigError
from capdistill.int8 import (
    CONVOLUTIONS,
    End,
    Ranges,
    RoundedProducts,
    find_ends,
    round_activation,
    round_rows,
    round_weight,
    scale_and_zero,
)
from capdistill.runtime import stable_hash

MOMENTUM = 0.99  # share of a range that a step keeps
_OWNER, _DEPTH = "_fake_quantizer", "_fake_quantizer_depth"


@dataclass(frozen=True)
class Layer:
    """A module whose weights are rounded.

    Args:
        name: Its name within the captioner.
        module: It.
        weights: Names of its weights.
        reads: The name of the range of its input; "" for what is no convolution.
        writes: The name of the range of its output; "" if its output is not rounded.
        end: Where its output is rounded.
    """

    name: str
    module: nn.Module
    weights: tuple[str, ...]
    reads: str = ""
    writes: str = ""
    end: End | None = None

    @property
    def trained(self) -> bool:
        """Whether one of its parameters is trained."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))


class FakeQuantizer(nn.Module):
    """Rounds a captioner's weights and activations while it is attached to it.

    The weights of convolutions, linear and recurrent layers and embeddings are rounded by
    `round_weight`, the inputs of linear and recurrent layers by `round_rows`. Inputs of
    convolutions, and outputs that others read, are rounded by `round_activation` once their range
    is known. These are the numbers of the export, which takes the ranges. One differs: a recurrent
    layer that reads a whole caption at once does not round its own states. The first convolution,
    which reads pixels, and matrices of fewer than `int8.LEAST` entries are left as they are.
    Parameters, their names and the class of every module do not change: what is saved is an
    ordinary captioner.

    Ranges are extended by what a step has seen on all its batches and ranks: `update` moves them
    by 1 % towards its lowest and highest values. Those of frozen layers are set once.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer, weights=False)
        >>> images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
        >>> exact, quantizer = student.eval().encode(images), FakeQuantizer(student)
        >>> quantizer.attach()
        >>> with quantizer.calibrating():
        ...     _ = student.encode(images)
        >>> 0 < (student.encode(images) - exact).abs().mean() < 0.3
        tensor(True)
        >>> quantizer.detach()
        >>> torch.equal(student.encode(images), exact)
        True

    Args:
        captioner: A module with an `encoder` and a `decoder`.

    Attributes:
        ranges: (N, 2) lowest and highest values of each tensor in `names`; NaN until known.
        names: The name of a convolution with ".output" for its output, and without for an input
            that is no such output.

    Raises:
        ConfigError: a weight is no ordinary float parameter.

    Source:
        Jacob et al. (2018), section 3; the straight-through gradient: Bengio et al. (2013).
    """

    ranges: Tensor
    _captioner: nn.Module

    def __init__(self, captioner: nn.Module) -> None:
        super().__init__()
        layers = list(_layers(captioner))
        of = {name: each for each in layers for name in (each.reads, each.writes) if name}
        of |= {each.writes: each for each in layers if each.writes}  # its reader may be another
        self.names, self._of_names = [*of], [*of.values()]
        self._rows = {name: row for row, name in enumerate(of)}
        device = next(captioner.parameters()).device
        self.register_buffer("ranges", torch.full((len(self.names), 2), math.nan, device=device))
        self.observing, self.rounding = False, True
        self.seen: dict[int, Tensor] = {}
        self._undo: list[Callable[[], object]] = []
        self._cache: dict[tuple[str, str], tuple[object, Tensor]] = {}
        self._table: tuple[object, list[bool], Tensor, Tensor] | None = None
        self._layers, self._inside = layers, 0
        vars(self)["_captioner"] = captioner  # not as a part of this module

    # -- attached or not ---------------------------------------------------------------------------

    def attach(self) -> None:
        """Let the captioner compute with rounded values, by this quantizer alone."""
        if vars(self._captioner).get(_OWNER) is self:
            return
        release(self._captioner)
        vars(self._captioner)[_OWNER] = self
        self._undo.append(partial(_restore, self._captioner, _OWNER, None))
        decoder = cast("nn.Module", self._captioner.decoder)
        parts = {id(part) for part in decoder.modules()}
        for layer in self._layers:
            before, after = partial(self._before, layer), partial(self._leave, layer)
            first = layer.module.register_forward_pre_hook(before)
            last = layer.module.register_forward_hook(after, always_call=True)
            self._undo += [first.remove, last.remove]
            if layer.end is not None:
                module, output = layer.end.module, partial(self._output, layer.writes)
                ended = (
                    module.register_forward_pre_hook(output)
                    if layer.end.before
                    else module.register_forward_hook(output)
                )
                self._undo.append(ended.remove)
        inside = [layer for layer in self._layers if id(layer.module) in parts]
        for name in ("forward", "start", "step"):  # a decoder may use weights without their module
            self._undo.append(_replaced(decoder, name, partial(self._whole, inside)))
        self._vary()

    def detach(self) -> None:
        """Let the captioner compute as it is."""
        for undo in reversed(self._undo):
            undo()
        if self._undo:
            self._vary_to("")
        self._undo = []
        self._cache.clear()

    def require_apart(self, others: Iterable[nn.Module]) -> None:
        """Refuse models that share a layer with the captioner.

        Raises:
            ConfigError: with the name of the layer.
        """
        theirs = {id(part) for other in others for part in other.modules()}
        shared = [layer.name for layer in self._layers if id(layer.module) in theirs]
        if shared:
            raise ConfigError(
                f'quantize="int8": the student shares {shared[0]} with a teacher, which would then '
                "compute with rounded weights too. Give the student its own: copy.deepcopy(encoder)"
                "."
            )

    # -- ranges ------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the range of every input is known."""
        return all(self._tables()[0])

    @contextmanager
    def watching(self, active: bool = True) -> Iterator[None]:
        """Inside the block, inputs count for the next `update`."""
        before, self.observing = self.observing, active
        try:
            yield
        finally:
            self.observing = before

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside the block inputs are watched and not rounded; afterwards their ranges are set."""
        self.rounding = False
        self.seen = {}
        try:
            with self.watching(), torch.no_grad():
                yield
        finally:
            self.rounding = True
        self.update()

    def forget(self) -> None:
        """Leave out what was seen since the last `update`."""
        self.seen = {}

    @torch.no_grad()
    def update(self, highest: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the ranges towards what was seen since the last call.

        Args:
            highest: The highest of each value over all ranks, which call it together.
        """
        self._cache.clear()  # weights may have been changed in ways that leave no trace
        unseen = self.ranges.new_full((2,), -math.inf)
        if not self.names:  # a captioner without convolutions is known as a rounded one, too
            vars(self._captioner)["activation_ranges"] = {}
            return
        rows = [self.seen.get(row, unseen) for row in range(len(self.names))]
        seen, self.seen = torch.stack(rows), {}  # minus the lowest, and the highest
        seen = seen if highest is None else highest(seen)
        now, old = torch.stack([-seen[:, 0], seen[:, 1]], 1), self.ranges
        flags = [layer.trained for layer in self._of_names]
        trained = torch.tensor(flags, device=old.device)[:, None]
        known, observed = (each.isfinite().all(1, keepdim=True) for each in (old, now))
        moved = torch.where(trained, MOMENTUM * old + (1 - MOMENTUM) * now, old)
        old.copy_(torch.where(observed, torch.where(known, moved, now), old))
        if bool((observed & ~known & ~trained).any()):
            self._vary()
        vars(self._captioner)["activation_ranges"] = self.as_data()

    def refresh(self) -> None:
        """Tell the captioner its ranges after others were assigned."""
        vars(self._captioner)["activation_ranges"] = self.as_data()
        self._vary()

    def as_data(self) -> Ranges:
        """The known ranges by layer."""
        pairs = zip(self.names, self.ranges.tolist(), strict=True)
        return {name: (low, high) for name, (low, high) in pairs if math.isfinite(low)}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _tables(self) -> tuple[list[bool], Tensor, Tensor]:
        """Of every row: whether its range is known, its scale and its zero."""
        version = (self.ranges.data_ptr(), self.ranges._version)
        if self._table is None or self._table[0] != version:
            known = self.ranges.isfinite().all(1).tolist()
            self._table = version, known, *scale_and_zero(self.ranges.nan_to_num())
        return self._table[1:]

    def _vary(self) -> None:
        """Cached features of frozen stages are those of their rounded weights and ranges."""
        pairs = zip(self.names, self._of_names, strict=True)
        frozen = {name for name, layer in pairs if not layer.trained}
        ranges = {name: pair for name, pair in self.as_data().items() if name in frozen}
        if self._undo:
            self._vary_to(f"int8 {stable_hash(sorted(ranges.items()))}")

    def _vary_to(self, variant: str) -> None:
        vary = getattr(self._captioner.encoder, "vary", None)
        if vary is not None:
            vary(variant)

    # -- rounding ----------------------------------------------------------------------------------

    def _before(self, layer: Layer, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self._enter(layer, module)
        if not args or not isinstance(args[0], Tensor):
            return None
        if layer.reads:
            return (self._activation(layer.reads, args[0]), *args[1:])
        by_rows = isinstance(module, nn.Linear) and not self._inside
        if by_rows or (isinstance(module, nn.RNNBase) and "weight_ih_l0" in layer.weights):
            return (round_rows(args[0]), *args[1:])
        return None

    def _output(self, name: str, _: nn.Module, args: Any, *output: Tensor) -> Any:
        if output:
            return self._activation(name, output[0])
        return (self._activation(name, args[0]), *args[1:])  # the module reads it

    def _activation(self, name: str, x: Tensor) -> Tensor:
        row = self._rows[name]
        if self.observing:
            low, high = torch.aminmax(x.detach())
            seen = torch.stack([-low, high]).float()
            before = self.seen.get(row)
            self.seen[row] = seen if before is None else torch.maximum(before, seen)
        known, scales, zeros = self._tables()
        if not (self.rounding and known[row]):
            return x
        return round_activation(x, scales[row], zeros[row])

    def _whole(self, layers: list[Layer], call: Callable[..., Any], *args: Any, **how: Any) -> Any:
        for layer in layers:
            self._enter(layer, layer.module)
        tables = ((vars(layer.module), layer.weights) for layer in layers)
        weights = (table[name] for table, names in tables for name in names)
        rounding = contextlib.nullcontext() if self._inside else RoundedProducts(weights)
        self._inside += 1
        try:
            with rounding:
                return call(*args, **how)
        finally:
            self._inside -= 1
            for layer in layers:
                self._leave(layer, layer.module)

    def _enter(self, layer: Layer, module: nn.Module) -> None:
        """Let the rounded weights stand in for the parameters of a module."""
        table = vars(module)
        table[_DEPTH] = table.get(_DEPTH, 0) + 1
        if table[_DEPTH] > 1:
            return
        for name in layer.weights:
            table[name] = self._rounded(layer.name, name, cast("Tensor", module._parameters[name]))
        if isinstance(module, nn.RNNBase):  # it reads a list of its own
            table["_fake_quantizer_flat"] = {key: table[key] for key in _FLAT if key in table}
            table["_flat_weights"] = [getattr(module, n) for n in module._flat_weights_names]

    def _leave(self, layer: Layer, module: nn.Module, *_: Any) -> None:
        table = vars(module)
        table[_DEPTH] = table.get(_DEPTH, 0) - 1
        if table[_DEPTH] > 0:
            return
        del table[_DEPTH]
        table.update(table.pop("_fake_quantizer_flat", {}))
        for name in layer.weights:
            table.pop(name, None)

    def _rounded(self, layer: str, name: str, weight: Tensor) -> Tensor:
        """The rounded weight; without a gradient it is computed once for each of its values."""
        if weight.requires_grad and torch.is_grad_enabled():
            return round_weight(weight)
        version = (weight.data_ptr(), weight._version, weight.dtype)
        cached = self._cache.get((layer, name))
        if cached is None or cached[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cache[layer, name] = version, round_weight(weight)
        return cached[1]


_FLAT = ("_flat_weights", "_flat_weight_refs")


def _replaced(module: nn.Module, name: str, around: Callable[..., Any]) -> Callable[[], object]:
    """Run a method of a module by `around`; returns what undoes it, for a copy too."""
    before = vars(module).get(name)
    vars(module)[name] = partial(around, getattr(module, name))
    return partial(_restore, module, name, before)


def _restore(module: nn.Module, name: str, before: object) -> None:
    if before is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = before


def _layers(captioner: nn.Module) -> Iterator[Layer]:
    encoder = cast("nn.Module", captioner.encoder)
    first, ends, sources = find_ends(encoder)
    names = {module: f"encoder.{name}" for name, module in encoder.named_modules()}
    for part in ("encoder", "decoder"):
        for name, module in captioner.get_submodule(part).named_modules(prefix=part):
            weights = () if module is first else _weights_of(module, name)
            if not isinstance(module, CONVOLUTIONS) and weights:
                yield Layer(name, module, weights)
            elif weights:
                end, source = ends.get(module), sources.get(module)
                reads = name if source is None else f"{names[source]}.output"
                writes = "" if end is None else f"{name}.output"
                yield Layer(name, module, weights, reads, writes, end)


def _weights_of(module: nn.Module, layer: str) -> tuple[str, ...]:
    """Names of the weights of a module that are rounded: matrices that are worth it."""
    names: tuple[str, ...] = ()
    if isinstance(module, nn.RNNBase):
        names = tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    elif isinstance(module, nn.RNNCellBase):
        names = ("weight_ih", "weight_hh")
    elif isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.Embedding)):
        names = ("weight",)
    for key in names:
        value = module._parameters.get(key)
        if value is None or not value.is_floating_point():
            raise ConfigError(
                f'quantize="int8": {layer}.{key} is no floating-point parameter: the layer '
                "is parametrized, or quantized already. Undo that, or leave quantize out."
            )
    least = 0 if isinstance(module, CONVOLUTIONS) else int8.LEAST
    return tuple(key for key in names if module.get_parameter(key).numel() >= least)


def release(captioner: nn.Module) -> None:
    """Detach the quantizer that is attached to a captioner, if any."""
    owner = vars(captioner).get(_OWNER)
    if owner is not None:
        owner.detach()
