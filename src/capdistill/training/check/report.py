"""What a check found, as rows, a table and plain data."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class CheckRow:
    """One finding.

    Args:
        topic: What was looked at.
        status: "ok", "note" (works, but look at it) or "fail".
        finding: What was seen.
        fix: What to do about it; empty where nothing needs doing.
    """

    topic: str
    status: Literal["ok", "note", "fail"]
    finding: str
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What a check found; `print` it.

    Example:
        >>> row = CheckRow("memory", "fail", "20.0 GB of 8.0 GB", "Lower batch_size (now 16).")
        >>> print(CheckReport((row,)))
        fail  memory  20.0 GB of 8.0 GB
                      -> Lower batch_size (now 16).
        not ready: 1 failure, 0 notes

    Args:
        rows: The findings, in the order of looking.
    """

    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.select("fail")

    def select(self, status: str) -> list[CheckRow]:
        """The rows of one status."""
        return [row for row in self.rows if row.status == status]

    def to_json(self) -> dict[str, Any]:
        """Plain data: `{"ok": bool, "rows": [{"topic", "status", "finding", "fix"}]}`."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max((len(row.topic) for row in self.rows), default=0)
        lines = [line for row in self.rows for line in _lines(row, width)]
        failures, notes = len(self.select("fail")), len(self.select("note"))
        verdict = "ready" if self.ok else "not ready"
        many = (f"{failures} failure{'s' * (failures != 1)}", f"{notes} note{'s' * (notes != 1)}")
        return "\n".join([*lines, f"{verdict}: {', '.join(many)}"])


def _lines(row: CheckRow, width: int) -> list[str]:
    text = textwrap.wrap(row.finding, 100 - width - 8) or [""]
    text += textwrap.wrap(row.fix, 100 - width - 8, initial_indent="-> ", subsequent_indent="   ")
    heads = [f"{row.status:<4}  {row.topic:<{width}}", *[" " * (width + 6)] * (len(text) - 1)]
    return [f"{head}  {line}".rstrip() for head, line in zip(heads, text, strict=True)]
