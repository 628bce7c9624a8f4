"""One torch module to one ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capdistill.errors import ConfigError

OPSET = 18  # of the operators; ONNX Runtime reads it since version 1.14, also in browsers
Axes = tuple["int | str", ...]


@dataclass(frozen=True)
class Graph:
    """A module with what its ONNX graph must look like.

    Args:
        part: What the module is made of, for messages: "decoder LSTMDecoder".
        module: In evaluation mode.
        example: Arguments of its `forward`; no dynamic axis has size 0 or 1.
        inputs: Names and axes of the inputs, in order; an axis with a name is dynamic.
        outputs: Names and axes of the outputs.
    """

    part: str
    module: nn.Module
    example: tuple[Any, ...]
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def write_graph(graph: Graph, path: Path) -> None:
    """Export a module by torch.onnx, with named axes and without traces of this machine.

    Args:
        graph: The module.
        path: The ONNX file, which also holds the weights.

    Raises:
        ConfigError: torch.onnx cannot export the module, or fixes an axis that must be dynamic.
    """
    import onnx_ir

    try:
        with quiet(), torch.enable_grad():  # then a cache is extended, not written in place
            program = torch.onnx.export(
                graph.module,
                graph.example,
                input_names=[*graph.inputs],
                output_names=[*graph.outputs],
                dynamic_shapes=_dynamic(graph),
                custom_translation_table=_translations(),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ConfigError(_why(graph, error)) from error
    assert program is not None  # it is None for the older exporter only
    _name_axes(program.model.graph, graph)
    _strip(program.model)
    onnx_ir.save(program.model, path)


def _why(graph: Graph, error: Exception) -> str:
    return (
        f"export: torch.onnx cannot export the {graph.part} ({cause_of(error)}). Its forward pass "
        "must be traceable by torch.export, for any number of images: no Python branch on values "
        "of tensors, and only operators that ONNX has."
    )


def cause_of(error: Exception) -> str:
    """The class and the first line of the exception that an exporter's error began with."""
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    lines = [line.strip() for line in str(causes[-1]).splitlines() if line.strip()]
    return f"{type(causes[-1]).__name__}: {lines[0][:300] if lines else ''}"


def _dynamic(graph: Graph) -> tuple[Any, ...]:
    """As torch.export wants it: shaped like the arguments. A named `Dim` can be fixed silently."""
    axes = iter(graph.inputs.values())

    def of(value: Any) -> Any:
        if isinstance(value, Sequence):
            return [of(each) for each in value]
        names = enumerate(next(axes))
        return {i: torch.export.Dim.DYNAMIC for i, name in names if isinstance(name, str)}

    return tuple(of(value) for value in graph.example)


def _name_axes(ir_graph: Any, graph: Graph) -> None:
    """Write the wanted axes to inputs and outputs; refuse those that were fixed."""
    import onnx_ir

    for values, wanted in ((ir_graph.inputs, graph.inputs), (ir_graph.outputs, graph.outputs)):
        for value, (name, axes) in zip(values, wanted.items(), strict=True):
            found = tuple(value.shape) if value.shape is not None else ()
            fixed = [
                axis
                for axis, size in zip(axes, found, strict=True)
                if isinstance(axis, str) and isinstance(size, int)
            ]
            if fixed:
                raise ConfigError(
                    f"export: torch.onnx fixed the axis '{fixed[0]}' of '{name}' of the "
                    f"{graph.part} at the size of the example: {found}. Its forward pass must not "
                    "turn the number of images or beams into a constant."
                )
            value.shape = onnx_ir.Shape(axes)
    kept = {*ir_graph.inputs, *ir_graph.outputs, *ir_graph.initializers.values()}
    for node in ir_graph:
        for value in node.outputs:
            if value not in kept:
                value.shape = None  # has names of axes that no input has


def _strip(model: Any) -> None:
    """Remove what torch notes about the source: stack traces with paths."""
    model.doc_string = None
    for each in (model, model.graph, *model.graph.inputs, *model.graph.outputs):
        each.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def announced(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Say before which file is written, and after, its size and how long it took."""
    began = time.monotonic()
    say(f"Exporting {path.name} ...")
    yield
    megabytes = path.stat().st_size / 1e6
    say(f"Exported {path.name}: {megabytes:.1f} MB in {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without messages of exporters and ONNX Runtime; failures are raised as well."""
    names = ("", "torch", "torch.onnx", "torch.export", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translations() -> dict[Any, Any]:
    return {torch.ops.aten.repeat_interleave.self_int: _repeat_interleave}


def _repeat_interleave(
    tensor: Any, repeats: Any, dim: int | None = None, output_size: Any = None
) -> Any:
    """`repeat_interleave` by a number of times that is known at run time.

    That of onnxscript up to 0.7 expands the wrong axis then.
    """
    from onnxscript import opset18 as op

    def constant(values: list[int]) -> Any:
        return op.Constant(value_ints=values)

    if dim is None:
        tensor, rank, axis = op.Reshape(tensor, constant([-1])), 1, 0
    else:
        rank = len(tensor.shape)
        axis = dim % rank
    times = constant([repeats]) if isinstance(repeats, int) else op.Reshape(repeats, constant([-1]))
    factors = [constant([1] * (axis + 1)), times]
    if axis + 1 < rank:
        factors.append(constant([1] * (rank - axis - 1)))
    wide = op.Expand(op.Unsqueeze(tensor, constant([axis + 1])), op.Concat(*factors, axis=0))
    shape = [op.Shape(tensor, start=0, end=axis), constant([-1]), op.Shape(tensor, start=axis + 1)]
    return op.Reshape(wide, op.Concat(*shape, axis=0))
