"""The examples run as a user runs them, from another directory."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from capdistill import losses

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart_has_at_most_30_lines_and_ends_with_a_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CI runs the examples in processes of their own; here they share this one, which is faster."""
    program = EXAMPLES / "quickstart.py"
    assert len(program.read_text().splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(losses.registry, "_decorated", {**losses.registry._decorated})
    runpy.run_path(str(program), run_name="__main__")
    caption, _, reference = capsys.readouterr().out.splitlines()[-1].partition(" | ")
    assert caption.split()
    assert reference.startswith("a family")
    assert (tmp_path / "runs" / "quickstart" / "best" / "model.safetensors").exists()
