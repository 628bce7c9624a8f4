"""The examples run as a user runs them, from another directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart_has_at_most_30_lines_and_ends_with_a_caption(tmp_path: Path) -> None:
    program = EXAMPLES / "quickstart.py"
    assert len(program.read_text().splitlines()) <= 30
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    caption, _, reference = done.stdout.splitlines()[-1].partition(" | ")
    assert caption.split()
    assert reference.startswith("a family")
    assert (tmp_path / "runs" / "quickstart" / "best" / "model.safetensors").exists()
