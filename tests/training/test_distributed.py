"""Training in several processes on gloo; tests/training/ranks.py has what the processes do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Results = dict[str, dict[int, list[Any]]]


def launch(out: Path, worlds: str, *checks: str) -> Results:
    """Results by check, world size and rank."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.training.ranks", worlds, str(out), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found: Results = {}
    for path in sorted(out.glob("*.json")):
        name, world, _ = path.stem.split(".")
        results = found.setdefault(name, {}).setdefault(int(world), [])
        results.append(json.loads(path.read_text()))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory.mktemp("ranks"), "1,2,4", "training") | launch(
        tmp_path_factory.mktemp("pairs"), "1,2"
    )


METHODS = ("accumulation", "uncertainty", "ratio", "reward")


def test_one_two_and_four_processes_train_the_same(found: Results) -> None:
    [alone] = found["training"][1]
    for world in (2, 4):
        for result in found["training"][world]:
            for name in ("weights", "losses", "norms", "val", "scores", "images", "skipped"):
                assert result[name] == close(alone[name]), (world, name)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_with(found: Results, method: str) -> None:
    [alone] = found[method][1]
    for result in found[method][2]:
        for name in alone.keys() - {"seconds"}:
            assert result[name] == close(alone[name]), name


def close(value: Any) -> Any:
    """The same value, numbers within rounding."""
    if isinstance(value, dict):
        return {name: close(each) for name, each in value.items()}
    if isinstance(value, list):
        return [close(each) for each in value]
    return pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
