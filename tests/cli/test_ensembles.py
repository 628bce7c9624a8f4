"""Commands that read a saved captioner read a saved ensemble too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capdistill.cli import main
from capdistill.teachers import Ensemble, load
from tests.cli.cli_commands import TINY, refused

DATA = ["--data", "sample", "--limit", "2", "--device", "cpu", "--no-measure"]


@pytest.fixture
def ensemble(teacher: Path, student: Path, tmp_path: Path) -> Path:
    """A saved ensemble of the captioners of two runs."""
    tokenizer = load(teacher / "best").tokenizer
    members = {"large": load(teacher / "best"), "small": load(student / "best")}
    assert members["small"].tokenizer.vocabulary == tokenizer.vocabulary
    Ensemble(members, weights=[3, 1]).save(tmp_path / "both")
    return tmp_path / "both"


def test_caption(ensemble: Path, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", str(ensemble), *photos, "--beam-size", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["caption"] for row in rows] == load(ensemble).caption(photos, beam_size=2)


def test_evaluate(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(ensemble / "ensemble.json"), *DATA, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["name"] == "ensemble of 2: large, small"
    assert "caption together" in content["notes"][-1]


def test_compare(ensemble: Path, student: Path, tmp_path: Path) -> None:
    pair = [str(ensemble), str(student)]
    assert main(["compare", *pair, *DATA, "--out", str(tmp_path / "report")]) == 0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["models"]["teacher"]["name"] == "ensemble of 2: large, small"


def test_a_run_is_not_written_into_an_ensemble(
    ensemble: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "debug_teacher", "--data", "sample", "--limit", "2"]
    assert "holds a saved ensemble" in refused([*command, "--out", str(ensemble)], capsys)


@pytest.mark.parametrize("how", ["list", "mapping", "ensemble"])
def test_distil_from_several_teachers(
    teacher: Path, student: Path, ensemble: Path, tmp_path: Path, how: str
) -> None:
    large, small = str(teacher), str(student / "best")
    given = {"list": [large, small], "mapping": {"large": large, "small": small}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"teacher": given.get(how, str(ensemble))}))
    by = ["--teacher", large, small] if how == "list" else ["--config", str(file)]
    own = "debug_teacher" if how == "list" else "large"  # in a list, captioners have their names
    losses = {"mixed": {"name": "token"}, "own": {"name": "feature", "teacher": own}}
    out = tmp_path / "run"
    command = ["distill", *by, "--student", "debug_student", "--weights", "random", *TINY]
    assert main([*command, "--set", f"losses={json.dumps(losses)}", "--out", str(out)]) == 0
    written = json.loads((out / "config.json").read_text())
    best = {"large": str(teacher / "best"), "small": small}
    expected = {"list": [*best.values()], "mapping": best, "ensemble": str(ensemble)}
    assert written["teacher"] == expected[how]
    assert written["losses"]["own"] == losses["own"]
    run = json.loads((out / "run.json").read_text())
    assert run["models"][1]["members"][0]["name"] == own
    again = ["distill", "--config", str(out / "config.json"), "--out", str(tmp_path / "again")]
    assert main(again) == 0


def test_no_teacher_of_several_is_replaced_by_the_run(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", "--teacher", str(teacher), str(student), "--student", "debug_student"]
    message = refused([*command, *TINY, "--out", str(student)], capsys)
    assert "the teacher's own directory" in message


def test_a_misspelt_kind_of_teacher_is_no_missing_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", "--student", "debug_student", *TINY, "--out", str(tmp_path / "run")]
    told = refused([*command, "--set", "teacher.name=mean_techer"], capsys)
    assert "Did you mean 'mean_teacher'?" in told
