"""What `export` writes computes what torch computes, for any number of images and beams."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import capdistill as cd
from capdistill.deploy.greedy import write_greedy
from capdistill.deploy.manifest import read_manifest
from capdistill.errors import ConfigError, MissingExtra, NotFiniteLogits
from capdistill.generation import GenerationSpec
from capdistill.teachers import Ensemble
from tests.deploy.conftest import Exported, toy
from tests.toy_captioner import LetterTokenizer, Patches, pictures

Arrays = dict[str, np.ndarray[Any, Any]]


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, **feeds: Any) -> Arrays:
    names = [each.name for each in graph.get_outputs()]
    return dict(zip(names, graph.run(None, feeds), strict=True))


def first_state(made: Exported, images: Tensor, beams: int) -> Arrays:
    """The encoder's outputs, with a row for each beam."""
    out = run(session(made.directory / "encoder.onnx"), images=images.numpy())
    manifest = read_manifest(made.directory)
    return {
        name: np.repeat(value[:, None], beams, 1) if name in manifest.state else value
        for name, value in out.items()
    }


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_the_encoder_graph_gives_the_first_state_of_torch(exported: Exported, count: int) -> None:
    captioner, images = exported.captioner, pictures(count)
    state = captioner.decoder.start(captioner.encode(images))
    out = first_state(exported, images, 1)
    for name, value in state.image.items():
        np.testing.assert_allclose(out[f"image_{name}"], value, atol=1e-4)
    for name, value in state.row.items():
        np.testing.assert_allclose(out[f"state_{name}"][:, 0], value, atol=1e-4)


@pytest.mark.parametrize(("count", "beams"), [(1, 1), (1, 3), (3, 1), (3, 3), (3, 2)])
@torch.no_grad()
def test_steps_give_the_logits_of_torch(exported: Exported, count: int, beams: int) -> None:
    captioner, images = exported.captioner, pictures(count)
    state = captioner.decoder.start(captioner.encode(images)).expand(beams)
    step, feeds = session(exported.directory / "step.onnx"), first_state(exported, images, beams)
    random = np.random.default_rng(0)
    for position in range(8):  # also beyond the longest caption
        tokens = random.integers(0, len(captioner.tokenizer.vocabulary), (count, beams))
        logits, state = captioner.decoder.step(torch.from_numpy(tokens).flatten(), state)
        out = run(step, tokens=tokens, position=np.array(position), **feeds)
        np.testing.assert_allclose(out["logits"].reshape(logits.shape), logits, atol=1e-4)
        feeds |= {name.removeprefix("next_"): out[name] for name in out if name != "logits"}


@torch.no_grad()
def test_beams_that_change_places_and_images_that_leave_act_as_in_torch(
    exported: Exported,
) -> None:
    captioner, images = exported.captioner, pictures(3)
    manifest = read_manifest(exported.directory)
    state = captioner.decoder.start(captioner.encode(images)).expand(2)
    step, feeds = session(exported.directory / "step.onnx"), first_state(exported, images, 2)
    tokens = np.array([[3, 4], [5, 6], [7, 8]])
    for position in range(3):
        logits, state = captioner.decoder.step(torch.from_numpy(tokens).flatten(), state)
        out = run(step, tokens=tokens, position=np.array(position), **feeds)
        np.testing.assert_allclose(out["logits"].reshape(logits.shape), logits, atol=1e-4)
        feeds |= {name.removeprefix("next_"): out[name] for name in out if name != "logits"}
        state = state.reorder(torch.tensor([1, 1, 2, 3, 5, 4][: len(tokens) * 2]))
        order = np.array([[1, 1], [0, 1], [1, 0]][: len(tokens)])
        rows = np.arange(len(tokens))[:, None]
        feeds |= {name: feeds[name][rows, order] for name in manifest.state}
        if position == 1:
            state, tokens = state.keep(torch.tensor([0, 1])), tokens[:2]
            feeds = {name: value[:2] for name, value in feeds.items()}


def test_the_declared_axes_are_dynamic(exported: Exported) -> None:
    for name in ("encoder.onnx", "step.onnx"):
        graph = onnx.load(exported.directory / name).graph
        for value in (*graph.input, *graph.output):
            axes = [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
            wanted = ["images"]
            if value.name in ("tokens", "logits") or "state_" in value.name:
                wanted += ["beams"] if name == "step.onnx" else []
            assert axes[: len(wanted)] == (wanted if axes else []), value.name
            assert bool(axes) == (value.name != "position")


@pytest.mark.parametrize("count", [1, 3])
def test_the_greedy_graph_gives_the_words_of_torch(exported: Exported, count: int) -> None:
    captioner, images = exported.captioner, pictures(count)
    ids = run(session(exported.directory / "greedy.onnx"), images=images.numpy())["ids"]
    hypotheses = captioner.generate(images)
    end, pad = captioner.tokenizer.end_id, captioner.tokenizer.pad_id
    longest = max(len(each.tokens) + each.finished for each in hypotheses)
    expected = [[*each.tokens, *[end] * each.finished] for each in hypotheses]
    assert ids.tolist() == [row + [pad] * (longest - len(row)) for row in expected]
    assert ids.dtype == np.int64


@pytest.fixture(scope="module")
def ends_early(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The end token is made likely for some pictures by its bias."""
    captioner = toy("lstm", embed=6, hidden=8, tied=False)
    with torch.no_grad():
        captioner.decoder.bias[captioner.tokenizer.end_id] = 1.5  # type: ignore[index]
    directory = tmp_path_factory.mktemp("early")
    cd.deploy.export(captioner, directory, greedy=True, progress=False)
    return Exported(captioner, directory)


def test_greedy_captions_that_end_early_are_padded_and_stop_the_loop(ends_early: Exported) -> None:
    captioner, images = ends_early.captioner, pictures(5)
    hypotheses = captioner.generate(images)
    lengths = {len(each.tokens) for each in hypotheses}
    assert len(lengths) > 1, "choose another bias: captions of several lengths are needed"
    graph = session(ends_early.directory / "greedy.onnx")
    together = run(graph, images=images.numpy())["ids"]
    for i, hypothesis in enumerate(hypotheses):
        words = [*hypothesis.tokens, *[captioner.tokenizer.end_id] * hypothesis.finished]
        alone = run(graph, images=images[i : i + 1].numpy())["ids"][0]
        assert alone.tolist() == words
        assert together[i].tolist() == words + [0] * (together.shape[1] - len(words))


def test_logits_after_the_end_of_a_caption_do_not_count(
    ends_early: Exported, tmp_path: Path
) -> None:
    """The word vector of the end token, which no caption that goes on reads, is NaN."""
    images, end = pictures(5).numpy(), ends_early.captioner.tokenizer.end_id
    graph = greedy_with(ends_early, tmp_path, "decoder.embedding.weight", end, np.nan)
    found, expected = run(graph, images=images), session(ends_early.directory / "greedy.onnx")
    assert found["ids"].tolist() == run(expected, images=images)["ids"].tolist()
    assert found["finite"].all()


class Dividing(Patches):
    """Black pictures are divided by their brightness: zero."""

    def trunk(self, images: Tensor) -> Tensor:
        brightness = images.float().mean((1, 2, 3))
        return super().trunk(images) * (brightness / brightness)[:, None, None]


def test_an_image_whose_logits_are_nan_is_told_by_the_graph_and_named_by_python(
    tmp_path: Path,
) -> None:
    captioner, images = toy("lstm", embed=6, hidden=8), pictures(3)
    captioner.encoder = Dividing(dim=8).eval()
    expected = captioner.caption(images)
    cd.deploy.export(captioner, tmp_path, greedy=True, progress=False)
    graph = session(tmp_path / "greedy.onnx")
    images[1] = 0
    out = run(graph, images=images.numpy())
    assert out["finite"].tolist() == [True, False, True]
    words = [captioner.tokenizer.decode(row) for row in out["ids"].tolist()]
    assert words == [expected[0], "", expected[2]]
    alone = run(graph, images=images[1:2].numpy())
    assert (alone["ids"].tolist(), alone["finite"].tolist()) == ([[0]], [False])
    with pytest.raises(NotFiniteLogits, match=r"Image 2 of 3: .*NaN"):
        cd.deploy.OnnxCaptioner.load(tmp_path).generate(images.numpy())


def greedy_with(made: Exported, folder: Path, name: str, row: Any, value: float) -> Any:
    """greedy.onnx of a step graph, some of whose numbers are others."""
    model = onnx.load(made.directory / "step.onnx")
    (weights,) = (each for each in model.graph.initializer if each.name == name)
    values = onnx.numpy_helper.to_array(weights).copy()
    values[row] = value
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(model, folder / "step.onnx")
    spec = GenerationSpec.from_ids(1, 2, 7)
    encoder = made.directory / "encoder.onnx"
    write_greedy(encoder, folder / "step.onnx", folder / "greedy.onnx", spec, 0)
    return session(folder / "greedy.onnx")


@pytest.mark.parametrize(
    ("row", "value", "finite"),
    [
        (5, np.nan, False),
        (5, np.inf, False),
        (5, -np.inf, True),  # a word that never comes
        (slice(None), -np.inf, False),
    ],
)
def test_the_greedy_graph_tells_of_every_kind_of_logits_that_are_no_numbers(
    exported_lstm: Exported, tmp_path: Path, row: Any, value: float, finite: bool
) -> None:
    graph = greedy_with(exported_lstm, tmp_path, "decoder.bias", row, value)
    out = run(graph, images=pictures(2).numpy())
    assert out["finite"].tolist() == [finite] * 2
    assert finite or out["ids"].tolist() == [[0], [0]]


@torch.no_grad()
def test_an_image_alone_gives_the_logits_that_it_gives_in_a_batch(exported: Exported) -> None:
    images = pictures(3)
    step = session(exported.directory / "step.onnx")
    tokens = np.full((3, 1), 4)
    together = run(step, tokens=tokens, position=np.array(0), **first_state(exported, images, 1))
    for i in range(3):
        feeds = first_state(exported, images[i : i + 1], 1)
        alone = run(step, tokens=tokens[:1], position=np.array(0), **feeds)
        np.testing.assert_allclose(alone["logits"][0], together["logits"][i], atol=1e-5)


def test_generation_json_says_what_the_options_mean_in_ids(
    exported_lstm: Exported, tmp_path: Path
) -> None:
    content = json.loads((exported_lstm.directory / "generation.json").read_text())
    words = exported_lstm.captioner.tokenizer
    assert (content["start_id"], content["end_id"], content["pad_id"]) == (1, 2, 0)
    assert content["max_length"] == words.max_length + 1
    assert content["banned"] == [0, 1, 3]
    assert cd.GenerationConfig(**content["config"]) == cd.GenerationConfig()


def test_files_name_neither_paths_nor_sources(exported: Exported) -> None:
    for path in exported.directory.glob("*.onnx"):
        data = path.read_bytes()
        assert b".py" not in data
        assert str(Path.cwd()).encode() not in data


def test_the_captioner_is_left_as_it_was(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8).double().train()
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    with pytest.raises(ConfigError, match="greedy=True"):
        cd.deploy.export(captioner, tmp_path, greedy=True, generation={"min_length": 2})
    cd.deploy.export(captioner, tmp_path, progress=False)
    assert captioner.training
    assert all(p.requires_grad for p in captioner.decoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in captioner.state_dict().items())


class Branching(Patches):
    """A trunk that torch.export cannot follow: Python looks at a value."""

    def head(self, tokens: Tensor) -> Tensor:
        return self.project(tokens if float(tokens.sum()) > 0 else -tokens)


def test_a_part_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    captioner.encoder = Branching(dim=8)
    with pytest.raises(ConfigError, match="cannot export the encoder Branching"):
        cd.deploy.export(captioner.eval(), tmp_path / "new", progress=False)
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_captioner_with_damaged_weights_is_refused_with_the_reason(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    with torch.no_grad():
        captioner.decoder.bias[3] = torch.nan  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"'logits' of the LSTMDecoder is NaN.*weights"):
        cd.deploy.export(captioner, tmp_path, progress=False)
    assert [*tmp_path.iterdir()] == []


def test_logits_of_words_that_never_come_are_minus_infinity(tmp_path: Path) -> None:
    captioner, images = toy("lstm", embed=6, hidden=8), pictures(3)
    with torch.no_grad():
        captioner.decoder.bias[3] = -torch.inf  # type: ignore[index]
    cd.deploy.export(captioner, tmp_path, progress=False)
    found = cd.deploy.OnnxCaptioner.load(tmp_path).caption(images)
    assert found == captioner.caption(images)


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"export needs {name} .*capdistill\[onnx\]"):
        cd.deploy.export(toy("lstm", embed=6, hidden=8), tmp_path)


def test_what_is_no_captioner_is_refused_with_the_reason(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    with pytest.raises(ConfigError, match=r"Ensemble cannot be exported.*distil it"):
        cd.deploy.export(Ensemble([captioner, toy("lstm", embed=6, hidden=8)]), tmp_path)  # type: ignore[arg-type]
    letters = cd.Captioner(Patches(), cd.decoders.create("lstm", dim=8, heads=2), LetterTokenizer())
    with pytest.raises(ConfigError, match="LetterTokenizer cannot be written"):
        cd.deploy.export(letters, tmp_path)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    captioner = toy("lstm", embed=6, hidden=8)
    captioner.save(tmp_path / "saved", allow_unregistered=True)
    with pytest.raises(ConfigError, match="holds a saved captioner"):
        cd.deploy.export(captioner, tmp_path / "saved")
    page = tmp_path / "page"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ConfigError, match="not written by capdistill"):
        cd.deploy.export(captioner, page, progress=False)
    assert (page / "manifest.json").read_text() == '{"name": "a web page"}'


def test_progress_names_each_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capdistill.deploy.exporting.write_graph", _touch)
    with pytest.raises(Exception, match=r"encoder\.onnx"):
        cd.deploy.export(toy("lstm", embed=6, hidden=8), tmp_path)
    assert "Exporting encoder.onnx ...\nExported encoder.onnx: 0.0 MB" in capsys.readouterr().err


def _touch(graph: object, path: Path) -> None:
    path.touch()
