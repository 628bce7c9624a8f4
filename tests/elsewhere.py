"""A device without hardware: what mixes devices fails, and where the host waits is noted.

Its tensors wrap tensors of the CPU, which do the work. As on CUDA, an operation may not mix them
with tensors of the CPU; the host waits where it reads their values, and where it copies to or from
the device without `non_blocking`. torch has it for tests of its own (`privateuseone`).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere:0"
aten = torch.ops.aten
COPY, COPY_INTO = aten._to_copy.default, aten.copy_.default
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Away(Tensor):
    """A tensor of the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=NAME,
        )
        made.here = here
        return made

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds its values alone
        return self.here.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])


class Device(TorchDispatchMode):
    """Runs every operation, and notes in `waits` where the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.waits)


class Making(TorchFunctionMode):
    """Tensors of Python numbers are made on the CPU and copied to the device, as torch does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Away):
            kwargs = {"device": NAME, "dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and is_elsewhere(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    """One operation, on the values; its result is where torch would have it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [each for each in tensors if isinstance(each, Away)]
    if away and func not in (COPY, COPY_INTO):
        require_one_device(func, tree_leaves(args[:1] if func in BY_INDEX else (args, kwargs)))
    if waits_for(func, args, kwargs):
        waits.append(f"{func}\n" + "".join(traceback.format_stack(limit=12)[:-3]))
    inner = {**kwargs, "device": "cpu"} if is_elsewhere(kwargs.get("device")) else kwargs
    values = tree_map(lambda leaf: leaf.here if isinstance(leaf, Away) else leaf, (args, inner))
    found = KERNELS.get(func, func)(*values[0], **values[1])
    if func is COPY_INTO:
        return args[0]
    given = kwargs.get("device")
    if not (is_elsewhere(given) if given is not None else away):
        return found
    known = {id(each.here): each for each in away}  # what an operation in place returns

    def sent(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Away(leaf)

    return tree_map(sent, found)


def require_one_device(func: Any, leaves: list[Any]) -> None:
    """Numbers, as tensors without a dimension, may be of the CPU."""
    mixed = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Away) and x.dim()]
    if mixed:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == torch.device(NAME).type


def waits_for(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits: it reads values, or copies between devices without `non_blocking`."""
    if func in READS:
        return any(isinstance(each, Away) for each in args)
    if func is COPY_INTO:
        there, back = (isinstance(each, Away) for each in args[:2])
        return there != back and (back or not (len(args) > 2 and args[2]))
    if func is COPY and kwargs.get("device") is not None:
        there, back = is_elsewhere(kwargs["device"]), isinstance(args[0], Away)
        return there != back and (back or not kwargs.get("non_blocking"))
    return False


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """What torch runs on accelerators in place of several operations."""
    gates = x + h
    for bias in biases:
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * c + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], -1)


def lstm_cell_backward(
    dh: Tensor | None, dc: Tensor | None, c: Tensor, after: Tensor, work: Tensor, bias: bool
) -> tuple[Tensor | None, ...]:
    i, f, g, o = work.chunk(4, -1)
    dh = torch.zeros_like(after) if dh is None else dh
    squashed = after.tanh()
    whole = dh * o * (1 - squashed**2) + (0 if dc is None else dc)
    parts = [whole * g * i * (1 - i), whole * c * f * (1 - f)]
    parts += [whole * i * (1 - g**2), dh * squashed * o * (1 - o)]
    gates = torch.cat(parts, -1)
    return gates, whole * f, gates.sum(0) if bias else None


KERNELS = {
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
}


@cache
def register() -> None:
    """Tell torch of the device; once in a process.

    Raises:
        ImportError: this torch cannot have a device that is written in Python.
    """
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )

    class Module(_DummyBackendModule):
        @staticmethod
        def get_amp_supported_dtype() -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend(NAME.partition(":")[0], Module())


@contextmanager
def elsewhere() -> Iterator[Device]:
    """Inside the block `NAME` is a device."""
    register()
    future, load = torch.__future__, nn.Module.load_state_dict

    def load_without_swapping(module: nn.Module, *args: Any, **options: Any) -> Any:
        future.set_swap_module_params_on_conversion(False)
        try:
            return load(module, *args, **options)
        finally:
            future.set_swap_module_params_on_conversion(True)

    kept = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(
        True
    )  # parameters stay the same objects, as on CUDA
    nn.Module.load_state_dict = load_without_swapping  # type: ignore[method-assign, assignment]
    try:
        with Device() as device, Making():
            yield device
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
        future.set_swap_module_params_on_conversion(kept)
