from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from capdistill.cli import main
from capdistill.comparison import Comparison
from capdistill.measure import Memory


def test_the_demo_ends_with_a_command_that_captions_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("capdistill.evaluation.cpu_memory", lambda *_, **__: Memory(1, 1))
    assert main(["demo", "--epochs", "1", "--limit", "3"]) == 0
    shown = capsys.readouterr()
    assert "not the language" in shown.err
    assert Path("capdistill-demo/report/report.html").exists()
    for run in ("teacher", "baseline", "student"):
        assert Path(f"capdistill-demo/{run}/config.json").exists()
    words = shlex.split(shown.out.splitlines()[-1])
    arguments = words[words.index("caption") :]
    assert arguments[1] == "capdistill-demo/student/best"
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(arguments[2] + "\t")


def test_the_demo_leaves_curves_and_shows_them_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra ui")
    monkeypatch.setattr("capdistill.evaluation.cpu_memory", lambda *_, **__: Memory(1, 1))
    command = ["demo", "--epochs", "1", "--limit", "2", "--out", str(tmp_path / "with")]
    assert main(command) == 0
    for run in ("teacher", "baseline", "student"):
        assert (tmp_path / "with" / run / "history.png").read_bytes().startswith(b"\x89PNG")
    shown = Comparison.load(tmp_path / "with" / "report").pictures
    assert list(shown)[:3] == ["teacher: training", "baseline: training", "student: training"]
    assert sum("where it looked" in title for title in shown) == 6

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command[:-1], str(tmp_path / "without")]) == 0
    assert not (tmp_path / "without" / "student" / "history.png").exists()
    assert "There will be no pictures" in capsys.readouterr().err


def test_the_demo_refuses_a_place_that_can_not_be_written_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "Can not write" in capsys.readouterr().err
