"""Command lines that tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capdistill.cli import main

TINY = ["--data", "sample", "--limit", "6", "--epochs", "1", "--batch-size", "3", "--device", "cpu"]


def distill(teacher: Path, out: Path, *more: str) -> list[str]:
    """A distillation of one epoch on six photos."""
    models = ["--teacher", str(teacher / "best"), "--student", "debug_student"]
    return ["distill", *models, *TINY, "--out", str(out), *more]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must end with exit code 1 says on stderr."""
    assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err
