from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from capdistill.cli import main
from capdistill.cli.demo import draw_curves
from capdistill.evaluation.comparison import Comparison
from capdistill.evaluation.measure import Memory
from capdistill.training.history import History

DRAWN = ("teacher", "baseline", "student") if importlib.util.find_spec("matplotlib") else ()


def test_the_demo_ends_with_a_command_that_captions_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("capdistill.evaluation.measure.cpu_memory", lambda *_, **__: Memory(1, 1))
    monkeypatch.setattr("capdistill.cli.demo._ATTENTION", 0)  # captions so early have forty words
    assert main(["demo", "--epochs", "1", "--limit", "3"]) == 0
    shown = capsys.readouterr()
    assert "do not teach a language" in shown.err
    assert Path("capdistill-demo/report/report.html").exists()
    for run in ("teacher", "baseline", "student"):
        assert Path(f"capdistill-demo/{run}/config.json").exists()
    pictures = list(Comparison.load("capdistill-demo/report").pictures)
    assert [title for title in pictures if "training" in title] == [
        f"{role}: training" for role in DRAWN
    ]
    words = shlex.split(shown.out.splitlines()[-1])
    arguments = words[words.index("caption") :]
    assert arguments[1] == "capdistill-demo/student/best"
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(arguments[2] + "\t")


def test_curves_are_left_in_every_run_unless_matplotlib_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra ui")
    runs = {role: tmp_path / role for role in ("teacher", "student")}
    for run in runs.values():
        run.mkdir()
        row = {"kind": "epoch", "epoch": 0, "step": 1, "train": {"loss": 2.0}}
        History(run / "history.jsonl").append(row)
    assert draw_curves(runs) == {"histories": runs, "attention": 1}
    for run in runs.values():
        assert (run / "history.png").read_bytes().startswith(b"\x89PNG")
        (run / "history.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(runs) == {}
    assert not list(tmp_path.glob("*/history.png"))
    assert "The report will have no plots" in capsys.readouterr().err


def test_the_demo_refuses_a_place_that_cannot_be_written_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "Cannot write" in capsys.readouterr().err


def test_the_demo_does_not_replace_runs_of_another_directory_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student" / "best").mkdir(parents=True)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "student") in message
    assert "--overwrite" in message
    assert not (tmp_path / "teacher").exists()
