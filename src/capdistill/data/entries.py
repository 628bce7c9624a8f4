"""Entries of JSON caption files: looked at one by one, so that a bad one is named, not fatal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capdistill.data.report import Problem, Report
from capdistill.data.rows import read_json
from capdistill.errors import DataError


def read_lists(path: Path, *keys: str, form: str) -> dict[str, list[Any]]:
    """The lists that a JSON file holds under the given keys.

    Raises:
        DataError: the file is no JSON object with those lists; the message names what it holds.
    """
    content = read_json(path)
    held = list(content)[:8] if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise DataError(f"{path}: no {form} file; expected the lists {keys}, found {held}.")
    return {key: content[key] for key in keys}


def entries(
    rows: list[Any], key: str, needs: tuple[str, ...], file: Path, report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of those that are objects with the needed fields; the others are reported."""
    for number, entry in enumerate(rows):
        place = f"{key}[{number}]"
        missing = [n for n in needs if n not in entry] if isinstance(entry, dict) else list(needs)
        if missing:
            report.add(Problem("malformed row", str(file), place, f"no {', '.join(missing)}"))
        else:
            yield place, entry
