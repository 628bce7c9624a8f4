"""What commands print: results on stdout (text or JSON), everything else on stderr."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capdistill.files import write_text

DONE, PROBLEM, INTERRUPTED = 0, 1, 130


def say(text: str) -> None:
    """A line for the reader, on stderr."""
    print(text, file=sys.stderr, flush=True)


def give(options: argparse.Namespace, content: Any, text: Callable[[], str]) -> None:
    """The result on stdout: `content` as JSON with `--json`, otherwise what `text` gives."""
    print(as_json(content) if options.json else text(), flush=True)


def as_json(content: Any) -> str:
    """JSON for programs: numbers that are not finite become null.

    Example:
        >>> as_json({"cider_d": float("nan")})
        '{\\n  "cider_d": null\\n}'
    """
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text as aligned columns; those numbered in `right` are set to the right.

    Example:
        >>> print(columns([("name", "size"), ("lstm", "5"), ("transformer", "12")], right=[1]))
        name         size
        lstm            5
        transformer    12
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(widths[i]) if i in right else text.ljust(widths[i])
            for i, text in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def require_writable(directory: str | Path) -> None:
    """Find out now, not after an hour of work, that a directory can not be written.

    Raises:
        ConfigError: it can not; the message says why.
    """
    probe = Path(directory) / ".capdistill-probe"
    write_text(probe, "")
    probe.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
