"""8-bit graphs: convolutions by calibration, matrices by their rows.

Convolutions are quantized statically: one scale per output channel, and one per activation tensor
from calibration images. A product with a constant matrix has one scale per column of the matrix
and one per row of the activations, computed when it runs. No value of one image or beam changes
the rounding of another, so an image gets the same caption alone and in a batch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from capdistill.data.dataset import CaptionData, Splits
from capdistill.data.folder import Images
from capdistill.data.pixels import is_many, read_batches
from capdistill.deploy.writing import quiet
from capdistill.errors import ConfigError, DataError, shortened

Floats = npt.NDArray[np.float32]
Products = Literal["row", "weight"]

LEAST = 4096  # entries of a matrix; smaller ones are left in float32
_CALIBRATION, _BATCH = 128, 8  # images for calibration, and how many are run at once
_TOP = 127  # the largest 8-bit integer; -128 is not used
_ZERO = 128  # stored for 0: products of unsigned integers are exact on every processor
_TINY = 1e-12  # least scale: a row of zeros stays one


def quantized_rows(matrix: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """8-bit rows of a matrix and their scales: `rows * scales[:, None]` is close to it.

    Example:
        >>> rows, scales = quantized_rows(np.array([[1.0, -2.54], [0.0, 0.0]], np.float32))
        >>> rows.tolist(), round(float(scales[0]), 4)
        ([[50, -127], [0, 0]], 0.02)

    Args:
        matrix: (rows, columns).

    Source:
        Jacob et al. (2018), section 2.1, symmetric (zero point 0), one scale per row.
    """
    scales = np.maximum(np.abs(matrix).max(1) / _TOP, _TINY).astype(np.float32)
    rows = np.clip(np.rint(matrix / scales[:, None]), -_TOP, _TOP)
    return rows.astype(np.int8), scales


def quantize_products(model: Any, products: Products = "row") -> None:
    """Replace, in place, the constant matrices of an ONNX model by 8-bit ones.

    The matrices are those of MatMul and Gemm, and the tables of Gather (embeddings). A table that
    is also the matrix of a product, as tied embeddings are, is stored once.

    Args:
        model: A `ModelProto`.
        products: "row": the activations are rounded to 8 bits as well, row by row, and integers
            are multiplied. "weight": the matrix is converted to float32 whenever it is used.

    Source:
        Row scales of activations: Yao et al. (2022), "ZeroQuant", section 4.1 (token-wise).
    """
    _Products(model, products).replace()


class _Products:
    """The graph while its nodes are replaced."""

    def __init__(self, model: Any, products: Products) -> None:
        from onnx import numpy_helper

        self.graph, self.products = model.graph, products
        self.arrays = {each.name: numpy_helper.to_array(each) for each in self.graph.initializer}
        self.transposed = {
            node.output[0]: node.input[0]
            for node in self.graph.node
            if node.op_type == "Transpose" and self.is_large(node.input[0])
        }
        self.tables = {
            node.input[0]
            for node in self.graph.node
            if node.op_type == "Gather" and self.is_large(node.input[0]) and not _axis(node)
        }
        self.nodes: list[Any] = []

    def is_large(self, name: str) -> bool:
        """Whether it is a constant matrix that is worth 8 bits."""
        array = self.arrays.get(name)
        return (
            array is not None
            and array.ndim == 2
            and array.size >= LEAST
            and array.dtype == np.float32
        )

    def replace(self) -> None:
        """Rewrite the nodes, then drop the float32 matrices that nothing reads any more."""
        for node in self.graph.node:
            if node.op_type == "Gather" and node.input[0] in self.tables:
                self.gather(node)
            elif node.op_type in ("MatMul", "Gemm") and self.matrix_of(node) is not None:
                self.product(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(_used(self.nodes, {each.name for each in self.graph.output}))
        read = {name for node in self.graph.node for name in node.input}
        kept = [each for each in self.graph.initializer if each.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]

    def matrix_of(self, node: Any) -> tuple[str, bool] | None:
        """The constant that a product multiplies by, and whether its rows are output channels."""
        name, attributes = node.input[1], {each.name: each for each in node.attribute}
        flipped = name in self.transposed
        source = self.transposed.get(name, name)
        if not self.is_large(source):
            return None
        if node.op_type == "Gemm":
            plain = ("alpha", "beta", "transA")
            wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0}
            values = {key: _value(attributes[key]) for key in plain if key in attributes}
            if any(value != wanted[key] for key, value in values.items()):
                return None
            flipped ^= bool(_value(attributes["transB"])) if "transB" in attributes else False
        return source, flipped

    def gather(self, node: Any) -> None:
        """Rows of a table: 8-bit rows times their scales."""
        table, ids = node.input[0], node.input[1]
        self.store_rows(table)
        name, out = f"{node.output[0]}_8bit", node.output[0]
        self.add("Gather", [f"{table}_uint8", ids], f"{name}_rows", axis=0)
        self.add("Cast", [f"{name}_rows"], f"{name}_shifted", to=1)
        shift = self.constant("shift", np.float32(_ZERO))
        self.add("Sub", [f"{name}_shifted", shift], f"{name}_float")
        self.add("Gather", [f"{table}_scales", ids], f"{name}_scale", axis=0)
        self.add("Unsqueeze", [f"{name}_scale", self.constant("last_axis", [-1])], f"{name}_column")
        self.add("Mul", [f"{name}_float", f"{name}_column"], out)

    def product(self, node: Any) -> None:
        """Activations (..., K) by a matrix (K, N)."""
        source, flipped = self.matrix_of(node) or ("", False)
        matrix, scales = self.store_matrix(source, flipped)
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        out, name = node.output[0], f"{node.output[0]}_8bit"
        result = f"{name}_product" if bias else out
        form = self.by_rows if self.products == "row" else self.by_weight
        form(node.input[0], matrix, scales, name, result)
        if bias:
            self.add("Add", [result, bias], out)

    def by_rows(self, x: str, matrix: str, scales: str, name: str, out: str) -> None:
        """Integers times integers, then times the scales of rows and columns."""
        self.add("Abs", [x], f"{name}_abs")
        axis = self.constant("last_axis", [-1])
        self.add("ReduceMax", [f"{name}_abs", axis], f"{name}_most", keepdims=1)
        top = self.constant("top", np.float32(_TOP))
        self.add("Div", [f"{name}_most", top], f"{name}_scale")
        tiny = self.constant("tiny", np.float32(_TINY))
        self.add("Max", [f"{name}_scale", tiny], f"{name}_row")
        self.add("Div", [x, f"{name}_row"], f"{name}_ratio")
        self.add("Round", [f"{name}_ratio"], f"{name}_whole")
        shift = self.constant("shift", np.float32(_ZERO))
        self.add("Add", [f"{name}_whole", shift], f"{name}_shifted")
        self.add("Cast", [f"{name}_shifted"], f"{name}_uint8", to=2)
        zero = self.constant("zero_point", np.uint8(_ZERO))
        self.add("MatMulInteger", [f"{name}_uint8", matrix, zero, zero], f"{name}_sums")
        self.add("Cast", [f"{name}_sums"], f"{name}_float", to=1)
        self.add("Mul", [f"{name}_float", f"{name}_row"], f"{name}_rows")
        self.add("Mul", [f"{name}_rows", scales], out)

    def by_weight(self, x: str, matrix: str, scales: str, name: str, out: str) -> None:
        """Float32 times a matrix that is converted to float32."""
        self.add("Cast", [matrix], f"{name}_shifted", to=1)
        shift = self.constant("shift", np.float32(_ZERO))
        self.add("Sub", [f"{name}_shifted", shift], f"{name}_float")
        self.add("MatMul", [x, f"{name}_float"], f"{name}_rows")
        self.add("Mul", [f"{name}_rows", scales], out)

    def store_rows(self, source: str) -> None:
        """The rows of a constant and their scales, once."""
        if f"{source}_uint8" not in self.arrays:
            rows, scales = quantized_rows(self.arrays[source])
            self.constant(f"{source}_uint8", _shifted(rows))
            self.constant(f"{source}_scales", scales)

    def store_matrix(self, source: str, flipped: bool) -> tuple[str, str]:
        """Names of the 8-bit (K, N) matrix and of its N scales."""
        scales = f"{source}_scales"
        if source in self.tables and flipped:
            self.store_rows(source)
            if not any(f"{source}_columns" in node.output for node in self.nodes):
                self.add("Transpose", [f"{source}_uint8"], f"{source}_columns", perm=[1, 0])
            return f"{source}_columns", scales
        if f"{source}_columns" not in self.arrays:
            rows, values = quantized_rows(self.arrays[source] if flipped else self.arrays[source].T)
            self.constant(f"{source}_columns", _shifted(rows.T))
            self.constant(f"{source}_column_scales", values)
        return f"{source}_columns", f"{source}_column_scales"

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer, once."""
        from onnx import numpy_helper

        if name not in self.arrays:
            self.arrays[name] = np.asarray(value)
            self.graph.initializer.append(numpy_helper.from_array(self.arrays[name], name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Append a node."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))


def _shifted(values: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values.astype(np.int16) + _ZERO).astype(np.uint8)


def _axis(node: Any) -> int:
    return next((int(each.i) for each in node.attribute if each.name == "axis"), 0)


def _value(attribute: Any) -> float | int:
    return attribute.f if attribute.type == 1 else attribute.i  # type: ignore[no-any-return]


def _used(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """The nodes that an output depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def quantize_convolutions(
    source: Path, target: Path, images: Iterable[npt.NDArray[np.uint8]], **options: Any
) -> None:
    """Static 8-bit convolutions of an encoder graph (QDQ format).

    Args:
        source: The float32 graph, which reads `images` (I, 3, S, S) uint8.
        target: The file to write.
        images: Batches of calibration images.
        options: For `onnxruntime.quantization.quantize_static`.

    Source:
        Jacob et al. (2018), sections 2.1 and 3; per channel: Krishnamoorthi (2018), section 3.1.
    """
    import onnx

    quantization: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self.batches: Iterator[npt.NDArray[np.uint8]] = iter(images)

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
        "nodes_to_exclude": first_convolution(onnx.load(source)),
    }
    with quiet():
        quantization.quantize_static(source, target, Reader(), **{**wanted, **options})


def first_convolution(model: Any) -> list[str]:
    """The name of the convolution that reads pixels, which stays in float32.

    It holds few weights, and the steps of its input would not be those of the pixels.
    """
    return [node.name for node in model.graph.node if node.op_type == "Conv"][:1]


def quantize_graphs(
    encoder: Path, step: Path, images: Iterable[npt.NDArray[np.uint8]], products: Products = "row"
) -> None:
    """Replace two float32 graphs by 8-bit ones.

    Args:
        encoder, step: The files; each is replaced.
        images: Batches of calibration images, (I, 3, S, S).
        products: As for `quantize_products`.
    """
    import onnx

    model = onnx.load(encoder)
    if any(node.op_type == "Conv" for node in model.graph.node):
        made = encoder.with_name("quantized.onnx")
        quantize_convolutions(encoder, made, images)
        made.replace(encoder)
    for path in (encoder, step):
        model = onnx.load(path)
        quantize_products(model, products)
        onnx.save(model, path)


def calibration_batches(data: Any, size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """At most 128 images, evenly spaced, as (8, 3, size, size) uint8.

    Args:
        data: A folder, a data set, its splits (of which the training images are taken), or images
            in any form that `Captioner.caption` takes.
        size: Side in pixels.

    Raises:
        ConfigError: something else, or nothing, was given.
        DataError: an image cannot be read, or there is none.
    """
    data = data.train if isinstance(data, Splits) else data
    if isinstance(data, (str, os.PathLike)):
        data = Images(Path(data))
    if isinstance(data, CaptionData):
        data = [example.path for example in data.examples]
    if data is None or not is_many(data):
        raise ConfigError(
            f"export: calibration={shortened(data)} was given; quantize='int8' needs images like "
            "those that will be captioned, a hundred or so: a folder, a data set or a list."
        )
    images = list(data)
    if not images:
        raise DataError("export: calibration holds no image. Give a hundred or so.")
    chosen = images[:: -(-len(images) // _CALIBRATION)]
    read = read_batches(chosen, size, _BATCH, "raise")  # when they are needed
    return (np.stack([image for image in batch if image is not None]) for batch in read)
