"""Schedules of weights and temperatures as data, for run files: ramps and points over a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from capdistill.errors import ConfigError, as_float, shortened, suggest

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "sigmoid": lambda share: math.exp(-5 * (1 - share) ** 2) if share > 0 else 0.0,
}


@dataclass(frozen=True)
class Ramp:
    """From one value to another between two points of a run, constant before and after.

    Example:
        >>> fade = Ramp("cosine", first=1.0, last=0.0, until=0.5)
        >>> [round(fade(progress), 3) for progress in (0.0, 0.125, 0.25, 0.5, 1.0)]
        [1.0, 0.854, 0.5, 0.0, 0.0]

    Args:
        schedule: The shape: "linear", "cosine" (half a period) or "sigmoid",
            `exp(-5 (1 - share)^2)`, which stays near the first value for long; at the beginning it
            is the first value itself.
        first, last: Values before `start` and from `until` on.
        start, until: Progress, 0 to 1.

    Source:
        The sigmoid: Laine and Aila (2017), Temporal ensembling, section 2.1.
    """

    schedule: str
    first: float
    last: float
    start: float = 0.0
    until: float = 1.0

    def __call__(self, progress: float) -> float:
        """The value at `progress` (0 to 1) of the run."""
        share = (progress - self.start) / (self.until - self.start)
        return self.first + (self.last - self.first) * _SHAPES[self.schedule](min(max(share, 0), 1))

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which it moves."""
        return self.first, self.last


@dataclass(frozen=True)
class Points:
    """Linear between points (progress, value), constant before the first and after the last.

    Example:
        >>> points = Points("points", ((0.0, 0.0), (0.5, 1.0), (1.0, 0.4)))
        >>> [round(points(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75)]
        [0.0, 0.5, 1.0, 0.7]
    """

    schedule: str
    points: tuple[tuple[float, float], ...]

    def __call__(self, progress: float) -> float:
        """The value at `progress` (0 to 1) of the run."""
        before = [point for point in self.points if point[0] <= progress] or [self.points[0]]
        after = [point for point in self.points if point[0] > progress] or [self.points[-1]]
        (x, y), (x_next, y_next) = before[-1], after[0]
        return y if x_next <= x else y + (y_next - y) * max(progress - x, 0) / (x_next - x)

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which it moves."""
        return tuple(value for _, value in self.points)


NamedSchedule = Ramp | Points


def named_schedule(what: str, given: Mapping[str, Any], *, positive: bool = False) -> NamedSchedule:
    """A schedule given as data: {"schedule": "cosine", "first": 1, "last": 0, "until": 0.5}.

    Example:
        >>> named_schedule("weights: 'token'", {"schedule": "points", "points": [[0, 1], [1, 0]]})
        Points(schedule='points', points=((0.0, 1.0), (1.0, 0.0)))

    Args:
        what: Beginning of the message.
        given: "schedule" is "linear", "cosine", "sigmoid" or "points"; the other keys are the
            arguments of `Ramp` or `Points`.
        positive: Whether values of 0 are invalid.

    Raises:
        ConfigError: an unknown schedule or key, a value that is missing or not allowed, or
            points of the run that are not in order.
    """
    name, kinds = given.get("schedule"), (*_SHAPES, "points")
    if name not in kinds:
        raise ConfigError(f"{what}: there is no schedule {name!r}. {suggest(str(name), kinds)}")
    kind: type[NamedSchedule] = Points if name == "points" else Ramp
    known = kind.__dataclass_fields__
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{what}: the schedule '{name}' has no '{key}'. {suggest(str(key), known)}"
            )
    needed = {"points"} if name == "points" else {"first", "last"}
    if needed - given.keys():
        missing = ", ".join(sorted(needed - given.keys()))
        raise ConfigError(f"{what}: the schedule '{name}' needs {missing}. Given: {dict(given)}.")
    rest = {key: value for key, value in given.items() if key != "schedule"}
    numbers = {key: _numbers(value) for key, value in rest.items()}
    if not all(isinstance(n, tuple if kind is Points else float) for n in numbers.values()):
        raise _invalid(what, given, positive)
    made = kind(name, **numbers)
    times = [t for t, _ in made.points] if isinstance(made, Points) else [made.start, made.until]
    in_order = all(a < b for a, b in itertools.pairwise(times))
    allowed = all(0 <= value < math.inf and not (positive and value == 0) for value in made.values)
    if not (times and in_order and times[0] >= 0 and times[-1] <= 1 and allowed):
        raise _invalid(what, given, positive)
    return made


def as_data(schedule: NamedSchedule) -> dict[str, Any]:
    """The schedule as it may be given again.

    Example:
        >>> as_data(Ramp("linear", 0.0, 1.0))["until"]
        1.0
    """
    return {key: _listed(value) for key, value in asdict(schedule).items()}


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _numbers(value: Any) -> Any:
    """A number, or pairs of numbers, as floats; None for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return as_float(value)
    if not isinstance(value, (list, tuple)):
        return None
    pairs = [_pair(each) for each in value]
    return None if None in pairs or not pairs else tuple(pairs)


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    first, last = (_numbers(each) for each in value)
    valid = isinstance(first, float) and isinstance(last, float)
    return (first, last) if valid else None


def _invalid(what: str, given: Mapping[str, Any], positive: bool) -> ConfigError:
    return ConfigError(
        f"{what} is {shortened(dict(given))}; give finite values {'> 0' if positive else '>= 0'} "
        "and increasing points of the run from 0 to 1, for instance "
        '{"schedule": "cosine", "first": 1.0, "last": 0.1, "until": 0.5} or '
        '{"schedule": "points", "points": [[0, 1.0], [0.5, 0.1]]}.'
    )
