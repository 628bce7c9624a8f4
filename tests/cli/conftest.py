from __future__ import annotations

from pathlib import Path

import pytest

from capdistill.cli import main
from tests.cli.cli_commands import TINY, distill


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny teacher, made by the command."""
    out = tmp_path_factory.mktemp("teacher")
    command = ["train", "--preset", "debug_teacher", *TINY, "--set", "tokenizer.min_count=2"]
    assert main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The run directory of a student distilled from it."""
    out = tmp_path_factory.mktemp("student")
    assert main(distill(teacher, out)) == 0
    return out


@pytest.fixture
def photos() -> list[str]:
    from capdistill.data import sample

    return [str(example.path) for example in sample().val.examples[:2]]
