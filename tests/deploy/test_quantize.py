"""8-bit graphs compute what the formulas say, and an image alone what it gives in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import capdistill as cd
from capdistill.data.folder import Images
from capdistill.deploy import products
from capdistill.deploy.convolutions import corrected, quantize_convolutions, read_unrounded
from capdistill.deploy.onnx_captioner import OnnxCaptioner
from capdistill.deploy.products import quantize_products, quantized_rows
from capdistill.deploy.quantize import calibration_batches
from capdistill.errors import ConfigError, DataError
from tests.deploy.conftest import toy
from tests.toy_captioner import pictures

Array = np.ndarray[Any, Any]
WORDS, WIDTH, HIDDEN = 70, 64, 80


def rounded(matrix: Array) -> tuple[Array, Array]:
    """Rows as integers in float64 and their scales, written out: w / (max |w| / 127)."""
    scales = np.array([[max(max(abs(v) for v in row) / 127, 1e-12)] for row in matrix.tolist()])
    return np.rint((matrix / scales.astype(np.float32)).astype(np.float64)), scales


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32)))
def test_rows_are_rounded_to_the_nearest_of_their_255_values(matrix: Array) -> None:
    rows, scales = quantized_rows(matrix)
    assert rows.dtype == np.int8
    assert np.abs(rows.astype(int)).max() <= 127
    error = np.abs(rows * scales[:, None].astype(np.float64) - matrix)
    assert (error <= scales[:, None] * 0.5001 + 1e-12).all()
    np.testing.assert_allclose(scales, np.maximum(np.abs(matrix).max(1) / 127, 1e-12), rtol=1e-6)


def model(form: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Ids to rows of a table, a product with a matrix, and the tied table as the output."""
    random = np.random.default_rng(0)
    table = random.standard_normal((WORDS, WIDTH)).astype(np.float32)
    matrix = random.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    bias = random.standard_normal(WIDTH).astype(np.float32)
    values = {"table": table, "matrix": matrix, "bias": bias}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"])]
    if form == "MatMul":
        nodes += [
            helper.make_node("MatMul", ["x", "matrix"], ["y0"]),
            helper.make_node("Add", ["y0", "bias"], ["y"]),
        ]
    else:
        nodes += [helper.make_node("Gemm", ["x", "matrix", "bias"], ["y"], transB=1)]
    nodes += [
        helper.make_node("Transpose", ["table"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "columns"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", WORDS])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return made, values


def run(made: onnx.ModelProto, **feeds: Array) -> Array:
    session = onnxruntime.InferenceSession(made.SerializeToString())
    result: Array = session.run(None, feeds)[0]
    return result


@pytest.mark.parametrize("form", ["MatMul", "Gemm"])
@pytest.mark.parametrize("scales_of", ["row", "weight"])
def test_products_are_those_of_the_rounded_numbers(form: str, scales_of: Any) -> None:
    made, values = model(form)
    quantize_products(made, scales_of)
    onnx.checker.check_model(made)
    ids = np.array([3, 0, 69, 3])
    rows, scales = rounded(values["table"])
    matrix, columns = rounded(values["matrix"] if form == "Gemm" else values["matrix"].T)

    def product(x: Array, weights: Array, scale: Array) -> Array:
        if scales_of == "row":
            whole, own = rounded(x.astype(np.float32))
            return (whole @ weights.T) * own * scale.T
        return (x @ weights.T) * scale.T

    x = rows[ids] * scales[ids]
    expected = product(product(x, matrix, columns) + values["bias"], rows, scales)
    logits = run(made, ids=ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-2 * np.abs(expected).max() / 10)
    exact = np.median(np.abs(logits - expected)) / np.abs(expected).max()
    assert exact < 1e-5  # a value between two integers may be rounded the other way


def test_a_tied_table_is_stored_once_in_8_bits() -> None:
    made, values = model("MatMul")
    quantize_products(made, "row")
    kept = {each.name: numpy_helper.to_array(each) for each in made.graph.initializer}
    large = sorted(value.shape for value in kept.values() if value.ndim == 2)
    assert large == [(WIDTH, WIDTH), (WORDS, WIDTH)]
    assert all(value.dtype == np.uint8 for value in kept.values() if value.ndim == 2)
    whole = kept["table_uint8"].astype(int) - 128
    error = np.abs(whole * kept["table_scales"][:, None] - values["table"])
    assert error.max() <= kept["table_scales"].max() / 2 * 1.001
    assert len(made.SerializeToString()) < len(model("MatMul")[0].SerializeToString()) / 2


def test_a_row_alone_gives_the_bits_that_it_gives_among_larger_ones() -> None:
    made, _ = model("Gemm")
    quantize_products(made, "row")
    ids = np.arange(WORDS)
    together = run(made, ids=ids)
    for i in (0, 31, 69):
        np.testing.assert_array_equal(run(made, ids=ids[i : i + 1])[0], together[i])


def test_what_is_small_or_scaled_stays_in_float32() -> None:
    made, _ = model("Gemm")
    made.graph.node[1].attribute.append(helper.make_attribute("alpha", 0.5))
    quantize_products(made, "row")
    assert [node.op_type for node in made.graph.node].count("Gemm") == 1
    before, _ = model("MatMul")
    small = numpy_helper.from_array(np.ones((4, 4), np.float32), "matrix")
    before.graph.initializer[1].CopyFrom(small)
    quantize_products(before, "row")
    assert "matrix" in [each.name for each in before.graph.initializer]


def convolutions(path: Path, padding: int = 1) -> dict[str, Array]:
    """Three convolutions, of which the first stays in float32 and the third is by channel."""
    random = np.random.default_rng(0)
    by_channel = np.logspace(-3, 0, 6).reshape(6, 1, 1, 1)
    weights = {
        "first": random.standard_normal((8, 3, 1, 1)),
        "second": random.standard_normal((6, 8, 1, 1)) * by_channel,
        "third": random.standard_normal((6, 1, 3, 3)) / by_channel,
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "first"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], name="two"),
        helper.make_node("Clip", ["c", "low", "high"], ["d"]),
        helper.make_node("Conv", ["d", "third"], ["out"], "three", group=6, pads=[padding] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["images", 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights | limits).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, path)
    return weights


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[dict[str, Array], onnx.ModelProto, onnx.ModelProto]:
    """The weights of `convolutions`, the model in float32, and in 8 bits."""
    weights, images = convolutions(tmp_path / "a.onnx"), pictures(16).numpy()
    quantize_convolutions(tmp_path / "a.onnx", tmp_path / "b.onnx", iter([images[:8], images[8:]]))
    return weights, onnx.load(tmp_path / "a.onnx"), onnx.load(tmp_path / "b.onnx")


def test_convolutions_have_a_scale_for_each_output_channel(quantized: Any) -> None:
    weights, _, made = quantized
    kept = {each.name: numpy_helper.to_array(each) for each in made.graph.initializer}
    np.testing.assert_array_equal(kept["first"], weights["first"])
    for name in ("second", "third"):
        assert name not in kept
        whole = kept[f"{name}_quantized"]
        scales = np.abs(weights[name]).max((1, 2, 3)) / 127
        np.testing.assert_allclose(kept[f"{name}_scale"], scales, rtol=1e-5)
        expected = np.rint(weights[name] / scales.reshape(-1, 1, 1, 1))
        assert np.abs(whole - expected).max() <= 1  # a tie may be rounded the other way
        assert (whole == expected).mean() > 0.95
        assert not kept[f"{name}_zero_point"].any()


def test_the_range_of_an_activation_is_the_one_behind_its_clipping(quantized: Any) -> None:
    """Otherwise most of the 256 steps lie where everything is clipped."""
    _, _, made = quantized
    assert "Clip" not in [node.op_type for node in made.graph.node]
    kept = {each.name: numpy_helper.to_array(each) for each in made.graph.initializer}
    assert kept["d_scale"] <= 6 / 255 * 1.001
    assert kept["d_zero_point"] == 0


@pytest.mark.parametrize(("name", "source"), [("two", "second"), ("three", "third")])
def test_a_corrected_bias_undoes_the_mean_error_of_rounded_weights(
    tmp_path: Path, name: str, source: str
) -> None:
    """Exactly so for images of one colour without padding; only this one is rounded, to 4 bits."""
    weights = convolutions(tmp_path / "a.onnx", padding=0)
    images = np.tile(pictures(16).numpy()[:, :, :1, :1], (1, 1, 8, 8))
    exact = onnx.load(tmp_path / "a.onnx")
    exact.graph.output[0].name = "c" if name == "two" else "out"
    fixed = onnx.load(tmp_path / "a.onnx")
    fixed.graph.output[0].name = exact.graph.output[0].name
    others = [each for each in ("one", "two", "three") if each != name]
    fixed = corrected(fixed, [images[:5], images[5:]], others, top=7)
    rows, scales = quantized_rows(weights[source].reshape(6, -1), 7)
    place = [each.name for each in fixed.graph.initializer].index(source)
    whole = (rows * scales[:, None]).reshape(weights[source].shape).astype(np.float32)
    fixed.graph.initializer[place].CopyFrom(numpy_helper.from_array(whole, source))
    wanted, given_means = (run(m, images=images).mean((0, 2, 3)) for m in (exact, fixed))
    size = np.abs(run(exact, images=images)).mean((0, 2, 3))
    np.testing.assert_allclose(given_means / size, wanted / size, atol=1e-4)
    assert np.abs(rows * scales[:, None] - weights[source].reshape(6, -1)).max() > 1e-3


def test_8_bit_convolutions_are_close_and_do_not_mix_images(quantized: Any) -> None:
    _, source, made = quantized
    images = pictures(16).numpy()
    exact, near = run(source, images=images), run(made, images=images)
    assert np.corrcoef(exact[:, 3:].ravel(), near[:, 3:].ravel())[0, 1] > 0.99
    alone = np.concatenate([run(made, images=images[i : i + 1]) for i in range(16)])
    np.testing.assert_allclose(alone, near, rtol=1e-6, atol=np.abs(near).max() * 1e-6)


def test_an_8_bit_captioner_says_the_same_alone_and_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LEAST", 16)
    captioner, images = toy("lstm", embed=6, hidden=8), pictures(5)
    cd.deploy.export(
        captioner, tmp_path, quantize="int8", calibration=images, greedy=True, progress=False
    )
    loaded = OnnxCaptioner.load(tmp_path)
    assert loaded.manifest.precision == "int8"
    kept = {each.name for each in onnx.load(tmp_path / "step.onnx").graph.initializer}
    assert "decoder.embedding.weight_uint8" in kept
    for beams in (1, 3):
        together = loaded.generate(images.numpy(), beam_size=beams)
        for i, hypothesis in enumerate(together):
            alone = loaded.generate(images[i : i + 1].numpy(), beam_size=beams)[0]
            assert alone.tokens == hypothesis.tokens
            assert alone.log_prob == pytest.approx(hypothesis.log_prob, abs=1e-6)
    graph = onnxruntime.InferenceSession(tmp_path / "greedy.onnx")
    ids = graph.run(None, {"images": images.numpy()})
    for row, hypothesis in zip(ids[0].tolist(), loaded.generate(images.numpy()), strict=True):
        assert tuple(row[: len(hypothesis.tokens)]) == hypothesis.tokens
    assert ids[1].all()


def test_calibration_takes_a_folder_a_data_set_splits_and_lists(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    expected = next(calibration_batches(paths, 8))
    assert (expected.shape, expected.dtype) == ((3, 3, 8, 8), np.uint8)
    assert expected[:, 0, 0, 0].tolist() == [0, 1, 2]
    for data in (tmp_path, str(tmp_path), Images(tmp_path), [Image.open(path) for path in paths]):
        np.testing.assert_array_equal(next(calibration_batches(data, 8)), expected)
    sizes = [len(batch) for batch in calibration_batches(cd.data.sample(), 8)]
    assert sum(sizes) == len(cd.data.sample().train)


def test_of_many_images_128_are_taken_from_the_whole_list() -> None:
    images = [np.full((8, 8, 3), i % 256, np.uint8) for i in range(300)]
    taken = np.concatenate([*calibration_batches(images, 8)])[:, 0, 0, 0]
    assert 90 <= len(taken) <= 128
    assert taken.tolist() == [i % 256 for i in range(0, 300, 3)]


@pytest.mark.parametrize("data", [None, 3, b"bytes"])
def test_int8_without_images_is_refused_before_anything_is_exported(
    data: Any, tmp_path: Path
) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    with pytest.raises(ConfigError, match="needs images like those"):
        cd.deploy.export(captioner, tmp_path, quantize="int8", calibration=data, progress=False)
    with pytest.raises(DataError, match="no image"):
        cd.deploy.export(captioner, tmp_path, quantize="int8", calibration=[], progress=False)
    with pytest.raises(ConfigError, match="None or 'int8'"):
        cd.deploy.export(captioner, tmp_path, quantize="int4", progress=False)
    with pytest.raises(ConfigError, match="belongs to quantize='int8'"):
        cd.deploy.export(captioner, tmp_path, calibration=tmp_path, progress=False)


def test_an_image_that_cannot_be_read_is_named_before_anything_is_exported(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    (tmp_path / "photo.jpg").write_bytes(b"none")
    with pytest.raises(DataError, match=r"photo\.jpg"):
        cd.deploy.export(captioner, tmp_path / "new", quantize="int8", calibration=tmp_path)
    assert not (tmp_path / "new").exists()


def test_sums_read_what_was_not_rounded_for_a_convolution() -> None:
    """But outputs of convolutions rounded, as they are computed."""

    def node(kind: str, given: list[str], made: str) -> onnx.NodeProto:
        return helper.make_node(kind, given, [made])

    nodes = []
    for name, kind in (("a", "Conv"), ("b", "Add")):
        nodes.append(node(kind, [f"{name}_in", f"{name}_other"], name))
        nodes.append(node("QuantizeLinear", [name, "step", "zero"], f"{name}_8bit"))
        nodes.append(node("DequantizeLinear", [f"{name}_8bit", "step", "zero"], f"{name}_float"))
    nodes += [node("Conv", ["b_float", "w"], "c"), node("Add", ["a_float", "b_float"], "d")]
    made = helper.make_model(helper.make_graph(nodes, "toy", [], []))
    read_unrounded(made)
    assert [*made.graph.node[-2].input] == ["b_float", "w"]
    assert [*made.graph.node[-1].input] == ["a_float", "b"]
