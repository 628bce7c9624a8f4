"""Products with constant matrices in 8 bits: one scale per column, and one per row of activations.

No value of one image or beam changes the rounding of another, so an image gets the same caption
alone and in a batch.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from capdistill.int8 import LEAST

Floats = npt.NDArray[np.float32]
Products = Literal["row", "weight"]

TOP = 127  # the largest 8-bit integer; -128 is not used
_ZERO = 128  # stored for 0: products of unsigned integers are exact on every processor
_TINY = 1e-12  # least scale: a row of zeros stays one


def quantized_rows(matrix: Floats, top: int = TOP) -> tuple[npt.NDArray[np.int8], Floats]:
    """8-bit rows of a matrix and their scales: `rows * scales[:, None]` is close to it.

    Example:
        >>> rows, scales = quantized_rows(np.array([[1.0, -2.54], [0.0, 0.0]], np.float32))
        >>> rows.tolist(), round(float(scales[0]), 4)
        ([[50, -127], [0, 0]], 0.02)

    Args:
        matrix: (rows, columns).
        top: The largest integer.

    Source:
        Jacob et al. (2018), section 2.1, symmetric (zero point 0), one scale per row.
    """
    scales = np.maximum(np.abs(matrix).max(1) / top, _TINY).astype(np.float32)
    rows = np.clip(np.rint(matrix / scales[:, None]), -top, top)
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
        top = self.constant("top", np.float32(TOP))
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
