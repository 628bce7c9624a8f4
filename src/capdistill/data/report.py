"""What is wrong with a data set: named, counted, and skipped or raised by choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from capdistill.errors import ConfigError, DataError

Policy = Literal["skip", "raise"]

# Every copy of the official Flickr8k file has the first; a header row says nothing wrong.
TOLERATED = frozenset({"phantom row", "header row"})
_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that can not be used, and where it stands.

    Example:
        >>> print(Problem("empty caption", "captions.csv", "row 4", "dog.jpg"))
        captions.csv, row 4: empty caption (dog.jpg)

    Args:
        kind: What it is, such as "missing image", "corrupt image" or "empty caption".
        file: The file that holds it.
        place: The row or entry within the file, or "".
        detail: The image or the reason.
    """

    kind: str
    file: str
    place: str = ""
    detail: str = ""

    def __str__(self) -> str:
        where = f"{self.file}, {self.place}" if self.place else self.file
        return f"{where}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """The problems found so far, each once.

    Example:
        >>> report = Report()
        >>> report.add(Problem("missing image", "captions.csv", "row 2", "cat.jpg"))
        >>> print(report)
        1 problem: 1 missing image
          captions.csv, row 2: missing image (cat.jpg)

    Args:
        errors: "skip" keeps what is wrong here; "raise" makes it an error at once.
        problems: What was found, in the order of finding.
    """

    errors: Policy = "skip"
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.errors not in ("skip", "raise"):
            raise ConfigError(f"errors={self.errors!r} was given; use errors='skip' or 'raise'.")
        self._seen = set(self.problems)

    def add(self, problem: Problem) -> None:
        """Count a problem, or raise it where that was asked for.

        Raises:
            DataError: the policy is "raise" and the problem is not a harmless one.
        """
        if self.errors == "raise" and problem.kind not in TOLERATED:
            raise DataError(f"{problem}. Mend it, or pass errors='skip' to go on without it.")
        if problem not in self._seen:
            self._seen.add(problem)
            self.problems.append(problem)

    @property
    def counts(self) -> dict[str, int]:
        """How many problems there are of each kind."""
        return dict(Counter(problem.kind for problem in self.problems))

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def summary(self) -> str:
        """One line: the number of problems of each kind."""
        if not self.problems:
            return "no problems"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{many(len(self), 'problem')}: {kinds}"

    def __str__(self) -> str:
        lines = [self.summary(), *(f"  {problem}" for problem in self.problems[:_SHOWN])]
        if len(self) > _SHOWN:
            lines.append(f"  ... and {len(self) - _SHOWN} more (see .problems)")
        return "\n".join(lines)


def many(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> many(1, "image"), many(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")
