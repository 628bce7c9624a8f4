"""Programs of ExecuTorch compute what torch computes, and what cannot be one is refused.

Most tests need the extra `executorch`, and are skipped where it is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import capdistill as cd
from capdistill.deploy import executorch as programs
from capdistill.deploy.executorch import Program, lowered, write_programs
from capdistill.deploy.graphs import trace
from capdistill.errors import CheckpointError, ConfigError, MissingExtra
from capdistill.generation.config import GenerationConfig, GenerationSpec
from tests.deploy.conftest import toy
from tests.deploy.test_export import Branching
from tests.test_docs import ROOT, blocks
from tests.toy_captioner import Patches, pictures

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch (an extra) is not installed"
)
Execute = Callable[[Sequence[Tensor]], list[Tensor]]


def ignore(text: str) -> None:
    """Progress that nobody reads."""


def small(decoder: str, **options: Any) -> cd.Captioner:
    sizes = {"width": 12, "ffn": 20} if decoder == "transformer" else {"embed": 6, "hidden": 8}
    return toy(decoder, **sizes, **options).requires_grad_(False)


def written(captioner: cd.Captioner, folder: Path, **options: Any) -> tuple[Execute, Execute]:
    spec = GenerationSpec.of(GenerationConfig(**options), captioner.tokenizer)
    programs.require_executorch()
    write_programs(captioner, spec, folder, ignore)
    encoder, step = (programs._method(folder / name) for name in ("encoder.pte", "step.pte"))
    return cast("Execute", encoder), cast("Execute", step)


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "options", "beams"),
    [
        ("lstm", {}, 1),
        ("lstm", {"attention": "recurrent"}, 3),
        ("transformer", {}, 1),
        ("transformer", {}, 3),
    ],
)
@torch.no_grad()
def test_steps_give_the_logits_of_torch_also_after_rows_change_places(
    decoder: str, options: dict[str, str], beams: int, tmp_path: Path
) -> None:
    captioner, images = small(decoder, **options), pictures(1)
    encoder, step = written(captioner, tmp_path, beam_size=beams)
    state = captioner.decoder.start(captioner.encode(images)).expand(beams)
    values, rows = list(encoder([images])), torch.tensor([2, 0, 0][:beams] if beams > 1 else [0])
    is_row = [entry.kind == "row" for entry in trace(captioner, 1, beams).entries]
    random = torch.Generator().manual_seed(3)
    for position in range(captioner.tokenizer.max_length + 1):
        tokens = torch.randint(0, len(captioner.tokenizer.vocabulary), (1, beams), generator=random)
        expected, state = captioner.decoder.step(tokens.flatten(), state)
        logits, *changed = step([tokens, torch.tensor(position), *values])
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
        values[len(values) - len(changed) :] = changed
        state = state.reorder(rows)
        values = [v[:, rows] if row else v for v, row in zip(values, is_row, strict=True)]


@needs_executorch
@pytest.mark.slow
def test_the_loop_of_the_page_gives_the_captions_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two blocks, run as they stand, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = [b.body for b in blocks(ROOT / "docs" / "deploy.md") if "executorch" in b.body]
    export, loop = (body for body in page if "$ " not in body)
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.mul_(2.0)  # so that captions depend on the picture
    names = {"cd": cd, "student": student, "photos": [each.path for each in data.val.examples]}
    exec(export, names)
    exec(loop, names)
    caption = cast("Callable[[Any], str]", names["caption"])
    expected = student.caption(names["photos"])
    assert len({*expected}) > 1
    assert [caption(photo) for photo in names["photos"]] == expected

    directory = next(tmp_path.glob("exported/*"))
    content = json.loads((directory / "manifest.json").read_text())
    assert {"encoder.pte", "step.pte", "encoder.onnx", "step.onnx"} <= content["files"].keys()
    assert content["versions"]["executorch"]
    assert cd.deploy.OnnxCaptioner.load(directory).caption(names["photos"]) == expected
    for path in directory.glob("*.pte"):
        assert b".py" not in path.read_bytes()
    (directory / "step.pte").write_bytes(b"of somebody else")
    with pytest.raises(CheckpointError, match=r"step\.pte has 16 bytes"):
        cd.deploy.OnnxCaptioner.load(directory)


@needs_executorch
@pytest.mark.slow
def test_a_program_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = small("lstm")
    written(captioner, tmp_path)
    contents = {name: (tmp_path / f"{name}.pte").read_bytes() for name in ("encoder", "step")}
    monkeypatch.setattr(
        programs, "lowered", lambda it: contents["step" if "decoder" in it.part else "encoder"]
    )
    for part, message in (
        (captioner.decoder.bias, r"'logits' of step\.pte.*operator of the LSTMDecoder"),
        (captioner.encoder.project[0].bias, r"of encoder\.pte.*operator of the Patches"),
    ):
        part.add_(1.0)  # type: ignore[operator]
        with pytest.raises(ConfigError, match=message):
            written(captioner, tmp_path)


class Placed(Patches):
    """Resizes its position embedding, as timm does, by an operator that ExecuTorch lacks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.position = nn.Parameter(torch.rand(1, 8, 3, 3))

    def head(self, tokens: Tensor) -> Tensor:
        places = F.interpolate(self.position, (2, 2), mode="bicubic", antialias=True)
        return self.project(tokens) + places.flatten(2).transpose(1, 2)


@needs_executorch
@pytest.mark.slow
def test_what_depends_on_weights_alone_is_computed_when_exporting(tmp_path: Path) -> None:
    programs.require_executorch()
    encoder, images = Placed(dim=8).eval().requires_grad_(False), pictures(1)
    (tmp_path / "placed.pte").write_bytes(lowered(Program("encoder", encoder, (images,))))
    given = programs._method(tmp_path / "placed.pte")([images])[0]
    torch.testing.assert_close(given, encoder(images), atol=1e-4, rtol=0)


@needs_executorch
def test_a_part_that_cannot_be_a_program_is_named(tmp_path: Path) -> None:
    captioner = small("lstm")
    captioner.encoder = Branching(dim=8).eval().requires_grad_(False)
    with pytest.raises(ConfigError, match="ExecuTorch cannot take the encoder Branching"):
        written(captioner, tmp_path)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(MissingExtra, match=r"pip install 'capdistill\[executorch\]'"):
        cd.deploy.export(small("lstm"), tmp_path / "new", executorch=True)
    assert not (tmp_path / "new").exists()


def test_programs_are_not_written_in_8_bits(tmp_path: Path) -> None:
    images = pictures(2)
    with pytest.raises(ConfigError, match="Leave quantize out"):
        cd.deploy.export(
            small("lstm"), tmp_path, quantize="int8", calibration=images, executorch=True
        )
    with pytest.raises(ConfigError, match="executorch='yes'"):
        cd.deploy.export(small("lstm"), tmp_path, executorch="yes")  # type: ignore[arg-type]


def test_programs_are_written_beside_the_graphs_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ExecuTorch: what writes programs and graphs is replaced."""
    module = "capdistill.deploy.exporting."

    def stubs(captioner: cd.Captioner, folder: Path, say: Any) -> tuple[()]:
        for name in ("encoder.onnx", "step.onnx"):
            (folder / name).touch()
        return ()

    def write(captioner: cd.Captioner, spec: Any, folder: Path, say: Any) -> None:
        assert isinstance(captioner.encoder, Patches)
        assert spec.config.beam_size == 2
        (folder / "encoder.pte").write_bytes(b"1")
        (folder / "step.pte").write_bytes(b"22")

    monkeypatch.setattr(module + "require_executorch", lambda: None)
    monkeypatch.setattr(module + "write_programs", write)
    monkeypatch.setattr(module + "_write_float32", stubs)
    monkeypatch.setattr(module + "importlib.metadata.version", lambda name: f"{name} 1.0")
    export = cd.deploy.export
    manifest = export(small("lstm"), tmp_path, executorch=True, generation={"beam_size": 2})
    assert {name: entry.bytes for name, entry in manifest.files.items() if "pte" in name} == {
        "encoder.pte": 1,
        "step.pte": 2,
    }
    assert manifest.versions["executorch"] == "executorch 1.0"
    manifest = export(small("lstm"), tmp_path)
    assert "executorch" not in manifest.versions
    assert not [*tmp_path.glob("*.pte")]
