"""Progress of a long loop: lines off a terminal, with the rate and the time left."""

from __future__ import annotations

from typing import Any

import pytest

from capdistill import progress as module
from capdistill.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the loop sees."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_share_the_rate_and_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    for _ in progress(["ab", "cd", "e"], 5, "Encoding", seconds=10, size=len):
        clock[0] += 80.0
    assert capsys.readouterr().err.splitlines() == [
        "Encoding: 2 of 5 images (40%), 0.025 per second, 0:02:00 left",
        "Encoding: 4 of 5 images (80%), 0.025 per second, 0:00:40 left",
        "Encoding: 5 of 5 images (100%), 0.0208 per second, 0:00:00 left",
        "Encoding: 5 images, done",
    ]


def test_a_process_without_standard_error_reports_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "stderr", None)  # a service, or `2>&-`
    assert list(progress("abc", 3, "Reading", seconds=0)) == ["a", "b", "c"]
    assert not module.on_terminal()
    module.report("epoch 1")
    assert capsys.readouterr().out == ""


def test_an_unknown_total_has_no_share(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    for _ in progress("abc", None, "Reading", unit="batch"):
        clock[0] += 5.0
    assert capsys.readouterr().err.splitlines() == [
        "Reading: 2 batches, 0.2 per second",
        "Reading: 3 batches, done",
    ]


@pytest.mark.parametrize("options", [{"show": False, "seconds": 0}, {"seconds": 60}])
def test_short_or_silenced_loops_print_nothing(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    assert list(progress("abc", 3, "Encoding", **options)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
