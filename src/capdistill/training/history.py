"""The history of a run: one row a logged step and one an epoch, written while training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capdistill.errors import ConfigError
from capdistill.files import write_text

Row = dict[str, Any]


class History:
    """Rows in memory and, where a path is given, as JSON Lines on disk.

    A row holds `kind` ("step" or "epoch"), `step`, `epoch` and what was measured. Step rows:
    `loss`, `terms` (each raw and weighted), `learning_rates` (those the step took),
    `gradient_norm` (before clipping), `seconds`, `images`, `captions`, `images_per_second`. Epoch
    rows: `train` (`loss` and `terms`), `val` (the same, with the number of `images` it covers and
    of those `skipped`; empty without validation data), `scores`, `improved` and `best` (with
    validation data), `images`, `skipped`, `problems` (images that could not be used, named in the
    epoch that met them first), `images_per_second`, `seconds`. On disk NaN is null.

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
            self.rows = [] if keep_until is None else _read_until(self.path, keep_until)
            write_text(self.path, "".join(_line(row) for row in self.rows))

    def append(self, row: Row) -> None:
        """Add a row, on disk too.

        Raises:
            ConfigError: the file can not be written.
        """
        self.rows.append(row)
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise ConfigError(
                f"Can not write {self.path}: {error.strerror or error}. The checkpoints written "
                "so far are as they were; make room, then go on with resume=True."
            ) from error

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


def _line(row: Row) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: it is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_until(path: Path, step: float) -> list[Row]:
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if isinstance(row, dict) and row.get("step", math.inf) <= step:
            rows.append(row)
    return rows
