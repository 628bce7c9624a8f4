"""Recipes of a whole run, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.cli import main
from capdistill.evaluation.measure import Memory
from capdistill.saving import TOKENIZER, saved_file
from capdistill.tokenizer import WordTokenizer
from tests.cli.cli_commands import refused


def test_a_recipe_of_a_whole_run_trains_teacher_baseline_and_student_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capdistill.evaluation.measure.cpu_memory", lambda *_, **__: Memory(1, 1))
    out = tmp_path / "small"
    command = ["distill", "--recipe", "flickr8k_small", "--data", "sample", "--limit", "3"]
    command += ["--weights", "random", "--teacher-weights", "random", "--epochs", "1"]
    command += ["--set", "train.cache_views=1", "--set", "train.flip=false"]
    command += ["--set", "tokenizer.min_count=1", "--out", str(out)]
    assert main(command) == 0
    best = {role: out / role / "best" / "captioner.json" for role in ("teacher", "baseline")}
    written = {role: path.stat().st_mtime_ns for role, path in best.items()}
    content = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == ["teacher", "student", "baseline"]
    assert f"captioner: {out / 'student' / 'best'}" in capsys.readouterr().out
    losses = json.loads((out / "student" / "run.json").read_text(encoding="utf-8"))["losses"]
    assert losses["token"]["temperature"] == 4.0
    capsys.readouterr()
    assert main(command) == 0  # finished runs are not trained again
    assert {role: path.stat().st_mtime_ns for role, path in best.items()} == written


def test_a_recipe_with_stages_trains_the_student_of_given_teachers_and_continues(
    teacher: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("capdistill.evaluation.measure.cpu_memory", lambda *_, **__: Memory(1, 1))
    out = tmp_path / "best"
    command = ["distill", "--recipe", "best_small", "--teacher", str(teacher), str(student)]
    command += ["--student", "debug_student", "--data", "sample", "--limit", "3", "--epochs", "1"]
    command += ["--set", "train.cache_views=1", "--set", "train.flip=false"]
    command += ["--set", f"train.cache_dir={tmp_path}", "--out", str(out), "--json"]
    assert main(command) == 0
    content = json.loads(capsys.readouterr().out)
    names = ["cross-entropy", "sequences"]
    assert [row["name"] for row in content["stages"]] == names
    assert [row["epochs"] for row in content["stages"]] == [1, 1]
    assert content["models"]["teacher"]["name"].startswith("ensemble of 2")
    kept = [out / f"{n}-{name}" / "best" / "captioner.json" for n, name in enumerate(names, 1)]
    written = [path.stat().st_mtime_ns for path in kept]
    assert main(command) == 0  # finished stages are not trained again
    assert [path.stat().st_mtime_ns for path in kept] == written
    saved = cd.Captioner.load(content["captioner"])
    last = cd.Captioner.load(kept[1].parent).state_dict()
    assert all(torch.equal(value, last[n]) for n, value in saved.state_dict().items())
    words = cd.Captioner.load(teacher / "best").tokenizer.vocabulary
    assert list(saved.tokenizer.vocabulary) == list(words)


@pytest.mark.parametrize("command", ["train", "check", "cache"])
def test_a_recipe_with_stages_is_no_recipe_for_other_commands(
    command: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--recipe", "best_small", "--data", "sample"]
    given += [] if command == "train" else ["--teacher", str(teacher)]
    assert "capdistill distill --recipe best_small --teacher DIR" in refused(
        [command, *given], capsys
    )


def staged(tmp_path: Path, *more: str) -> list[str]:
    """A recipe with stages for one epoch each on three photos; the teacher is not given."""
    command = ["distill", "--recipe", "best_small", "--data", "sample", "--limit", "3"]
    command += ["--epochs", "1", "--device", "cpu", "--precision", "fp32"]
    for option in ("cache_features=false", "cache_views=1", "flip=false"):
        command += ["--set", f"train.{option}"]
    return [*command, "--out", str(tmp_path / "staged"), *more]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The comparison at the end does nothing but tell its options."""
    found: list[dict[str, Any]] = []

    class Nothing:
        def save(self, out: Path) -> Path:
            return out

        def to_json(self) -> dict[str, Any]:
            return {}

    def compare(*models: Any, **options: Any) -> Nothing:
        found.append(options)
        return Nothing()

    monkeypatch.setattr("capdistill.evaluation.comparison.compare", compare)
    return found


def test_teacher_and_student_of_a_recipe_with_stages_may_stand_in_a_run_file_or_in_settings(
    teacher: Path, tmp_path: Path, compared: list[dict[str, Any]]
) -> None:
    file, student = tmp_path / "run.json", {"preset": "debug_student"}
    file.write_text(json.dumps({"teacher": str(teacher), "student": student}))
    settings = ["--set", f"teacher={teacher}", "--set", "student.preset=debug_student"]
    for given in (["--config", str(file)], settings):
        assert main(staged(tmp_path, *given, "--overwrite")) == 0
        rows = json.loads((tmp_path / "staged" / "stages.json").read_text())["rows"]
        assert [row["name"] for row in rows] == ["cross-entropy", "sequences"]
    assert [(o["device"], o["precision"]) for o in compared] == [("cpu", "fp32")] * 2


def test_a_recipe_with_stages_reads_the_section_tokenizer(
    teacher: Path, tmp_path: Path, compared: list[dict[str, Any]]
) -> None:
    words = WordTokenizer.load(saved_file(teacher / "best", TOKENIZER))
    own = WordTokenizer(words.vocabulary[4:], max_length=7)
    own.save(tmp_path / "own.json")
    models = ["--teacher", str(teacher), "--student", "debug_student"]
    assert main(staged(tmp_path, *models, "--tokenizer", str(tmp_path / "own.json"))) == 0
    assert cd.Captioner.load(tmp_path / "staged" / "student").tokenizer == own


@pytest.mark.filterwarnings("default:The resumed run")
def test_a_recipe_with_stages_goes_on_with_accepted_changes_or_not_at_all(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compared: list[dict[str, Any]],
) -> None:
    models = ["--teacher", str(teacher), "--student", "debug_student"]
    command = staged(tmp_path, *models)
    assert main(command) == 0
    changed = [*command, "--set", "train.label_smoothing=0.2"]
    capsys.readouterr()
    assert "label_smoothing: 0.1 -> 0.2" in refused(changed, capsys)
    assert main([*changed, "--accept-changes"]) == 0
    assert "label_smoothing: 0.1 -> 0.2" in capsys.readouterr().err
    assert "contradict" in refused([*command, "--resume", "--overwrite"], capsys)
    assert "--recipe" in refused(["distill", "--resume", "--out", str(tmp_path / "staged")], capsys)
    fresh = [*staged(tmp_path / "new", *models), "--resume"]
    assert "no training state to resume" in refused(fresh, capsys)


def test_a_student_is_no_teacher_of_its_own_in_a_recipe_with_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--set", 'teacher={"name": "mean_teacher"}']
    assert "Give --teacher DIR" in refused(staged(tmp_path, *own), capsys)


def test_losses_and_weights_of_a_recipe_with_stages_are_not_changed_from_the_command_line(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", "--recipe", "best_small", "--teacher", str(teacher), "--data", "sample"]
    for setting in ("weights.ce=0.5", "losses.token.temperature=2"):
        assert main([*command, "--out", str(tmp_path / "new"), "--set", setting]) == 1
        assert "each stage of 'best_small' has its own" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_options_of_a_recipe_are_refused_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--teacher-weights", "random"]
    for command in (
        ["distill"],
        ["distill", "--recipe", "kd_2024"],
        staged(tmp_path, "--teacher", "t"),
    ):
        assert "--teacher-weights: no teacher is trained" in refused([*command, *weights], capsys)
    model = ["--preset", "debug_student", "--data", "sample", "--role", "student"]
    assert "--role belongs to --recipe" in refused(["train", *model], capsys)
