"""`capdistill export` and `capdistill bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import capdistill as cd
from capdistill.cli import main
from capdistill.cli.deploy import _directory, _named
from capdistill.evaluation import benchmark
from capdistill.evaluation.bench_table import Bench
from tests.cli.cli_commands import refused
from tests.toy_captioner import WORDS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    tokenizer = cd.WordTokenizer(WORDS)
    cd.Captioner.create("debug_student", tokenizer=tokenizer).save(directory)
    return directory


@pytest.mark.slow
def test_export_writes_what_the_page_and_the_runtime_read(
    saved: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert runtime.__version__
    out, page = tmp_path / "exported", tmp_path / "page"
    command = ["export", str(saved), "--out", str(out), "--web", str(page), "--max-length", "4"]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["directory"], shown["page"]) == (str(out), str(page / "index.html"))
    assert shown["precision"] == "float32"
    expected = cd.Captioner.load(saved).caption(photos, max_length=4)
    assert cd.deploy.OnnxCaptioner.load(out).caption(photos) == expected
    assert (page / "index.html").is_file()


def test_export_asks_for_programs_of_executorch(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    pytest.importorskip("onnxscript")
    message = refused(
        ["export", str(saved), "--out", str(tmp_path / "out"), "--executorch"], capsys
    )
    assert "capdistill[executorch]" in message
    assert not (tmp_path / "out").exists()


def test_options_of_export_that_belong_together(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(saved), "--out", str(tmp_path / "out")]
    assert "--calibration PATH" in refused([*command, "--quantize", "int8"], capsys)
    assert "--quantize int8" in refused([*command, "--calibration", "photos"], capsys)
    assert "--web" in refused([*command, "--ort", "dist"], capsys)
    page = ["--web", str(tmp_path / "page")]
    assert "decodes greedily" in refused([*command, *page, "--beam-size", "3"], capsys)
    assert "has no ort." in refused([*command, *page, "--ort", str(tmp_path)], capsys)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    site = ["--web", str(tmp_path / "site")]
    assert "holds no page" in refused([*command, *site], capsys)
    assert "whose files are replaced" in refused([*command, "--web", command[-1]], capsys)
    assert not (tmp_path / "out").exists()


def test_bench_passes_its_options_on(
    saved: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def record(models: Any, images: Any, **options: Any) -> Bench:
        given.update(models=models, images=images, **options)
        return Bench({}, {}, "mine", {"threads": 2})

    monkeypatch.setattr(benchmark, "bench", record)
    command = ["bench", f"mine={saved}", "debug_teacher", "hf-config:blip-base"]
    command += ["--images", *photos, "--threads", "2", "--words", "0", "--reference", "mine"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threads"] == 2
    assert given["models"] == {
        "mine": str(saved),
        "debug_teacher": "debug_teacher",
        "hf-config:blip-base": "hf-config:blip-base",
    }
    assert given["images"] == photos
    assert (given["words"], given["reference"], given["rounds"]) == (None, "mine", 5)


def test_bench_ends_with_an_error_where_a_model_failed(
    photos: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"mine": "no memory"}
    monkeypatch.setattr(benchmark, "bench", lambda *_, **__: Bench({}, {}, "a", {}, failed))
    assert main(["bench", "mine=debug_student", "--images", photos[0], "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == failed


def test_models_of_bench_by_name_and_place(saved: Path, tmp_path: Path) -> None:
    assert _named("a=b/c") == ("a", "b/c")
    assert _named("b/c") == ("b/c", "b/c")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(saved)
    assert _directory(str(tmp_path / "run")) == str(tmp_path / "run" / "best")


def test_bench_refuses_what_is_not_there(
    photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["bench", "no-such-model", "--images", photos[0]], capsys)
    assert "'no-such-model' is neither a directory nor a preset" in said
    said = refused(["bench", "a=debug_student", "a=debug_teacher", "--images", photos[0]], capsys)
    assert "same name" in said
