"""Static 8-bit convolutions, with ranges of activations and corrected biases from images."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capdistill.deploy.products import TOP, Floats, quantized_rows
from capdistill.deploy.writing import quiet
from capdistill.errors import ConfigError
from capdistill.int8 import Ranges, scale_and_zero


def quantize_convolutions(
    source: Path,
    target: Path,
    images: Iterable[npt.NDArray[np.uint8]],
    correct_biases: bool = True,
    ranges: Ranges | None = None,
    **options: Any,
) -> None:
    """Static 8-bit convolutions of an encoder graph (QDQ format).

    Args:
        source: The float32 graph, which reads `images` (I, 3, S, S) uint8.
        target: The file to write.
        images: Batches of calibration images.
        correct_biases: Remove the mean error that rounded weights cause: see `corrected`.
        ranges: Those of training, instead of what the images show; see `FakeQuantizer`.
        options: For `onnxruntime.quantization.quantize_static`.

    Source:
        Jacob et al. (2018), sections 2.1 and 3; per channel: Krishnamoorthi (2018), section 3.1.
    """
    import onnx

    quantization: Any = importlib.import_module("onnxruntime.quantization")
    batches, model = [*images], onnx.load(source)
    exact = first_convolution(model)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
            """The next batch, or None."""
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    wanted = {
        "quant_format": quantization.QuantFormat.QDQ,
        "per_channel": True,
        "activation_type": quantization.QuantType.QUInt8,
        "weight_type": quantization.QuantType.QInt8,
        "op_types_to_quantize": ["Conv", "Clip", "Relu"],  # what follows narrows the range
        "nodes_to_exclude": exact,
        **options,
    }
    if ranges is not None:
        wanted["extra_options"] = {"TensorQuantOverrides": _steps(model, exact, ranges)}
    if correct_biases:
        top = 64 if options.get("reduce_range") else TOP
        model = corrected(model, batches, wanted["nodes_to_exclude"], top)
    with quiet():
        quantization.quantize_static(model, target, Reader(), **wanted)
    made = onnx.load(target)
    read_unrounded(made)
    onnx.save(made, target)


def _steps(model: Any, exact: Sequence[str], ranges: Ranges) -> dict[str, list[dict[str, Any]]]:
    """The step and the zero of every activation that is rounded, as training had them.

    Raises:
        ConfigError: the range of one is not known.
    """
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    names: dict[str, list[str]] = {}  # of the ranges of a tensor, the first known one counts
    nodes = [node for node in model.graph.node if node.op_type == "Conv" and node.name not in exact]
    for node in nodes:
        output, then = node.output[0], readers.get(node.output[0], [])
        kinds = [each.op_type for each in then]
        if kinds in (["Clip"], ["Relu"]):
            output = then[0].output[0]
        wanted = [] if "BatchNormalization" in kinds else [f"{_layer(node)}.output"]
        names[output] = wanted + names.get(output, [])
    for node in nodes:
        names.setdefault(node.input[0], []).append(_layer(node))
    found = {
        tensor: next((ranges[each] for each in given if each in ranges), None)
        for tensor, given in names.items()
    }
    missing = [(names[tensor] or [tensor])[0] for tensor, known in found.items() if known is None]
    if missing:
        raise ConfigError(
            f"export: training with quantize='int8' has found no range for {missing[0]}. Give "
            "calibration=images; ranges are then those that the images show."
        )
    scales, zeros = scale_and_zero(torch.tensor([*found.values()]).view(-1, 2))
    steps = zip(found, scales.numpy(), zeros.numpy().astype(np.uint8), strict=True)
    return {
        tensor: [{"scale": np.array(scale), "zero_point": np.array(zero)}]
        for tensor, scale, zero in steps
    }


def _layer(node: Any) -> str:
    """The name of a convolution in the captioner: its weight has it."""
    return str(node.input[1]).removesuffix(".weight")


def read_unrounded(model: Any) -> None:
    """Let all but convolutions read an activation as it was before it was rounded for them.

    The sums of residual blocks then collect no rounding. Outputs of convolutions are made rounded,
    so that others read them rounded.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    exact: dict[str, str] = {}  # a rounded activation, and the activation
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made:
            rounding = made[node.input[0]]
            maker = made.get(rounding.input[0])
            if rounding.op_type == "QuantizeLinear" and (maker and maker.op_type) != "Conv":
                exact[node.output[0]] = rounding.input[0]
    for node in model.graph.node:
        if node.op_type != "Conv":
            node.input[:] = [exact.get(name, name) for name in node.input]


def corrected(
    model: Any, batches: Sequence[npt.NDArray[np.uint8]], exact: Sequence[str], top: int = TOP
) -> Any:
    """The model with biases that undo the mean error of the convolutions' rounded weights.

    With W' the rounded weights and x the input, the bias b becomes b - (W' - W) E[x]. The mean of
    each input channel is taken over the images and all places.

    Args:
        model: In float32. It is changed in all but its weights.
        batches: Images, (I, 3, S, S) uint8.
        exact: Names of convolutions whose weights are not rounded.
        top: The largest rounded weight.

    Source:
        Nagel et al. (2019), "Data-Free Quantization Through Weight Equalization and Bias
        Correction", section 4.2, with the empirical mean of appendix D.
    """
    from onnx import numpy_helper

    arrays = {each.name: each for each in model.graph.initializer}
    found = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.name not in exact and node.input[1] in arrays
    ]
    means = _channel_means(model, sorted({node.input[0] for node in found}), batches)
    for node in found:
        weights = numpy_helper.to_array(arrays[node.input[1]])  # (O, C / groups, ...)
        channels = weights.shape[0]
        rows, scales = quantized_rows(weights.reshape(channels, -1), top)
        error = (rows * scales[:, None]).reshape(weights.shape) - weights
        error = error.sum(tuple(range(2, weights.ndim)))  # (O, C / groups)
        mean = means[node.input[0]].reshape(-1, weights.shape[1])  # (groups, C / groups)
        shift = (error * mean.repeat(channels // len(mean), 0)).sum(1)
        bias = numpy_helper.to_array(arrays[node.input[2]]) if len(node.input) > 2 else 0.0
        name = f"{node.output[0]}_bias"
        del node.input[2:]
        node.input.append(name)
        value = np.asarray(bias - shift, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    read = {name for node in model.graph.node for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _channel_means(
    model: Any, names: Sequence[str], batches: Sequence[npt.NDArray[np.uint8]]
) -> dict[str, Floats]:
    """Tensor (I, C, H, W) -> (C,) means over images and places."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    runtime: Any = importlib.import_module("onnxruntime")
    measured = ModelProto()
    measured.CopyFrom(model)
    graph, axes = measured.graph, numpy_helper.from_array(np.array([0, 2, 3]), "mean_axes")
    graph.initializer.append(axes)
    del graph.output[:]
    for name in names:
        mean = f"{name}_mean"
        graph.node.append(helper.make_node("ReduceMean", [name, axes.name], [mean], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, None))
    if not names:
        return {}
    session = runtime.InferenceSession(measured.SerializeToString())
    found = [session.run(None, {"images": batch}) for batch in batches]
    counts = np.array([len(batch) for batch in batches])
    columns = zip(*found, strict=True)
    return {
        name: np.average(np.stack(column), axis=0, weights=counts).astype(np.float32)
        for name, column in zip(names, columns, strict=True)
    }


def first_convolution(model: Any) -> list[str]:
    """The name of the convolution that reads pixels, which stays in float32.

    It holds few weights, and the steps of its input would not be those of the pixels.
    """
    return [node.name for node in model.graph.node if node.op_type == "Conv"][:1]
