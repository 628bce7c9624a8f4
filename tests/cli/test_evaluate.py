from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from capdistill.cli import main

DATA = ["--data", "sample", "--limit", "3", "--device", "cpu", "--no-measure"]


def test_evaluate_prints_the_scores_as_json_and_nothing_else_on_stdout(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(student / "best"), *DATA, "--json"]) == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert content["images"] == 3
    assert 0 <= content["scores"]["bleu_1"] <= 1
    assert "sample" in shown.err


def test_compare_writes_the_report_and_prints_the_table(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    pair = [str(teacher / "best"), str(student / "best"), "--baseline", str(student / "final")]
    assert main(["compare", *pair, *DATA, "--out", str(out)]) == 0
    content = json.loads((out / "report.json").read_text())
    assert list(content["models"]) == ["teacher", "student", "baseline"]
    assert "<html" in (out / "report.html").read_text()
    shown = capsys.readouterr()
    assert "BLEU-1" in shown.out
    assert str(out / "report.html") in shown.err


def test_compare_takes_several_students_by_the_names_of_their_runs_or_given_ones(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(teacher), str(student), f"last={student / 'final'}"]
    assert main(["compare", *runs, *DATA, "--out", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["models"]) == ["teacher", student.name, "last"]
    twice = [str(teacher), str(student), str(student / "best")]
    assert main(["compare", *twice, *DATA, "--out", str(tmp_path)]) == 1
    assert f"the name '{student.name}' is taken" in capsys.readouterr().err


def test_compare_draws_as_many_samples_as_asked(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(teacher / "best"), str(student / "best")]
    given = [*pair, *DATA, "--out", str(tmp_path), "--bootstrap", "50", "--json"]
    assert main(["compare", *given]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bootstrap"]["samples"] == 50
    assert set(content["rows"][0]["differences"]) == {"teacher"}


def test_curves_need_a_run(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "saved"
    shutil.copytree(student / "best", alone)
    command = ["compare", str(alone), str(alone), *DATA, "--out", str(tmp_path), "--curves"]
    assert main(command) == 1
    assert "--curves: no captioner lies in the directory of a run" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compare", "absent", "absent", *DATA, "--out", str(tmp_path / "file")]) == 1
    assert "Cannot write" in capsys.readouterr().err


def test_a_split_that_is_not_there_is_named(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(student / "best"), *DATA, "--split", "test"]) == 1
    assert "no split 'test'" in capsys.readouterr().err
