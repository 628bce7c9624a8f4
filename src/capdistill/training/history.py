"""The history of a run: one row a logged step and one an epoch, written while training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

Row = dict[str, Any]


class History:
    """Rows in memory and, where a path is given, as JSON Lines on disk.

    A row holds `kind` ("step" or "epoch"), `step`, `epoch` and what was measured. Step rows:
    `loss`, `terms` (each raw and weighted), `learning_rates`, `gradient_norm`, `seconds`,
    `images_per_second`. Epoch rows: `train` and `val` (each `loss` and `terms`), `scores`,
    `best`, `seconds`.

    Example:
        >>> history = History()
        >>> history.append({"kind": "epoch", "epoch": 0, "step": 4, "train": {"loss": 2.0}})
        >>> [row["train"]["loss"] for row in history.epochs]
        [2.0]

    Args:
        path: File that every row is appended to, or None.
        keep_until: Rows of an existing file up to this step are kept; None starts anew.
    """

    def __init__(self, path: str | Path | None = None, keep_until: int | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []
        self.interrupted = False
        if self.path is not None:
            self.rows = _read_until(self.path, keep_until)
            self._rewrite()

    def append(self, row: Row) -> None:
        """Add a row, on disk too."""
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))

    @property
    def steps(self) -> list[Row]:
        """The rows of logged steps."""
        return [row for row in self.rows if row["kind"] == "step"]

    @property
    def epochs(self) -> list[Row]:
        """The rows of finished epochs."""
        return [row for row in self.rows if row["kind"] == "epoch"]

    @property
    def best(self) -> Row | None:
        """The row of the epoch whose weights were kept as the best, or None."""
        chosen = [row for row in self.epochs if row.get("improved")]
        return chosen[-1] if chosen else None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a history file without writing to it; a half-written last line is left out."""
        history = cls()
        history.rows = _read_until(Path(path), math.inf)
        return history

    def _rewrite(self) -> None:
        from capdistill.files import write_text

        assert self.path is not None
        write_text(self.path, "".join(_line(row) for row in self.rows))


def _line(row: Row) -> str:
    return json.dumps(_finite(row), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: it is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_until(path: Path, step: float | None) -> list[Row]:
    if step is None or not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = cast(Row, json.loads(line))
        except ValueError:
            continue  # the last line of a killed run
        if row["step"] <= step:
            rows.append(row)
    return rows
