"""Modules of the page, run by node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "src" / "capdistill" / "deploy" / "page"


class Node:
    """Runs JavaScript beside a copy of the page's modules.

    Args:
        folder: An empty directory.
    """

    def __init__(self, folder: Path) -> None:
        if not shutil.which("node"):
            pytest.skip("needs node (18 or later)")
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        (folder / "package.json").write_text('{"type": "module"}')
        self.folder = folder

    def __call__(self, script: str, value: Any = None) -> Any:
        """What the script writes by `answer(...)`; it reads `given`, the value."""
        program = f"""
            import fs from "node:fs";
            const given = JSON.parse(fs.readFileSync(0, "utf-8"));
            const answer = (value) => fs.writeSync(1, JSON.stringify(value));
            {script}
        """
        (self.folder / "program.js").write_text(program, encoding="utf-8")
        done = subprocess.run(
            ["node", "program.js"],
            cwd=self.folder,
            input=json.dumps(value),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
