"""Schedules as data: shapes, ends, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capdistill.errors import ConfigError
from capdistill.losses.base import check_schedule, scheduled
from capdistill.losses.schedules import Points, Ramp, as_data, named_schedule

progresses = st.floats(0, 1)
numbers = st.floats(0, 100)


def value(schedule: dict[str, Any], progress: float) -> float:
    return scheduled("weight", check_schedule("weight", schedule), progress)


@given(first=numbers, last=numbers, progress=progresses)
def test_a_linear_ramp_over_the_whole_run_is_the_pair(
    first: float, last: float, progress: float
) -> None:
    ramp = {"schedule": "linear", "first": first, "last": last}
    assert value(ramp, progress) == pytest.approx(scheduled("x", (first, last), progress))


@given(
    shape=st.sampled_from(["linear", "cosine", "sigmoid"]),
    progress=progresses,
    start=st.floats(0, 0.4),
    until=st.floats(0.5, 1),
)
def test_a_ramp_stays_within_its_values_and_reaches_both(
    shape: str, progress: float, start: float, until: float
) -> None:
    ramp = {"schedule": shape, "first": 2.0, "last": 0.5, "start": start, "until": until}
    found = value(ramp, progress)
    assert 0.5 <= found <= 2.0
    if progress <= start:
        assert found == 2.0
    if progress >= until:
        assert found == 0.5


def test_the_shapes_are_their_formulas() -> None:
    for x in (0.1, 0.25, 0.5, 0.8):
        cosine = {"schedule": "cosine", "first": 1.0, "last": 0.0, "until": 0.9}
        assert value(cosine, 0.9 * x) == pytest.approx(0.5 * (1 + math.cos(math.pi * x)))
        sigmoid = {"schedule": "sigmoid", "first": 0.0, "last": 3.0}
        assert value(sigmoid, x) == pytest.approx(3 * math.exp(-5 * (1 - x) ** 2))


@given(
    times=st.lists(progresses, min_size=1, max_size=5, unique=True),
    values=st.lists(numbers, min_size=5, max_size=5),
    progress=progresses,
)
def test_points_are_joined_by_lines(
    times: list[float], values: list[float], progress: float
) -> None:
    import numpy as np

    points = [*zip(sorted(times), values, strict=False)]
    expected = np.interp(progress, [t for t, _ in points], [v for _, v in points])
    found = value({"schedule": "points", "points": points}, progress)
    assert found == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "points"])
def test_a_schedule_survives_a_file(kind: str) -> None:
    given_: dict[str, Any] = {"schedule": "cosine", "first": 1.0, "last": 0.1, "until": 0.5}
    if kind == "points":
        given_ = {"schedule": "points", "points": [[0, 1.0], [0.5, 0.2]]}
    made = named_schedule("x", given_)
    again = named_schedule("x", json.loads(json.dumps(as_data(made))))
    assert made == again
    assert isinstance(made, Points if kind == "points" else Ramp)


def test_a_schedule_that_is_0_throughout_is_0() -> None:
    assert check_schedule("x", {"schedule": "linear", "first": 0, "last": 0}) == 0.0
    assert check_schedule("x", {"schedule": "points", "points": [[0.5, 0]]}) == 0.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"schedule": "cosin", "first": 1, "last": 0}, "no schedule 'cosin'.*mean 'cosine'"),
        ({"first": 1, "last": 0}, "no schedule None.*Available: cosine"),
        ({"schedule": "linear", "first": 1, "lst": 0}, "no 'lst'.*mean 'last'"),
        ({"schedule": "linear", "first": 1}, "needs last"),
        ({"schedule": "points"}, "needs points"),
        ({"schedule": "points", "points": []}, "increasing points"),
        ({"schedule": "points", "points": [[0.5, 1], [0.5, 2]]}, "increasing points"),
        ({"schedule": "points", "points": [[0, 1], [1.5, 2]]}, "increasing points"),
        ({"schedule": "points", "points": [[0, 1, 2]]}, "increasing points"),
        ({"schedule": "points", "points": 3}, "increasing points"),
        ({"schedule": "linear", "first": [[0, 1]], "last": 0}, "finite values"),
        ({"schedule": "linear", "first": -1, "last": 0}, "finite values >= 0"),
        ({"schedule": "linear", "first": True, "last": 0}, "finite values"),
        ({"schedule": "linear", "first": math.nan, "last": 0}, "finite values"),
        ({"schedule": "linear", "first": 1, "last": 0, "until": 0}, "increasing points"),
        ({"schedule": "linear", "first": 1, "last": 0, "start": 0.9, "until": 0.5}, "increasing"),
    ],
)
def test_mistakes_are_named(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule("weights: 'token'", schedule)


def test_a_temperature_may_not_reach_0() -> None:
    with pytest.raises(ConfigError, match="finite values > 0"):
        check_schedule("T", {"schedule": "linear", "first": 4, "last": 0}, positive=True)
