"""The history of a run: one row a logged step and one an epoch, written while training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capdistill.errors import ConfigError
from capdistill.files import finite_or_none, write_text
from capdistill.outputs import LossTerm

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
            ConfigError: the file cannot be written.
        """
        self.rows.append(row)
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.path}: {error.strerror or error}. The checkpoints written "
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
    return json.dumps(finite_or_none(row), ensure_ascii=False, default=str) + "\n"


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


Number = Tensor | float


class Tally:
    """Raw and weighted sums of terms, added over batches and divided once by their counts.

    Example:
        >>> tally = Tally()
        >>> for value in (6.0, 2.0):
        ...     tally.add({"ce": LossTerm(torch.tensor(value), count=4.0, weight=0.5)}, {"ce": 2.0})
        >>> tally.summary()
        {'loss': 1.0, 'terms': {'ce': {'raw': 2.0, 'weighted': 1.0}}}
    """

    def __init__(self) -> None:
        self.sums: dict[str, Number] = {}
        self.weighted: dict[str, Number] = {}
        self.counts: dict[str, float] = {}

    def add(self, terms: Mapping[str, LossTerm], counts: Mapping[str, float]) -> None:
        """Add the terms of a batch, and what the batch counts for."""
        for name, term in terms.items():
            value = term.sum.detach()
            _add(self.sums, name, value)
            _add(self.weighted, name, term.weight * value)
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def add_means(
        self, means: Mapping[str, Mapping[str, float]], counts: Mapping[str, float]
    ) -> None:
        """Add what another tally came to: means times counts, so that every token weighs alike."""
        for name, term in means.items():
            _add(self.sums, name, term["raw"] * counts[name])
            _add(self.weighted, name, term["weighted"] * counts[name])
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def read(self, *others: Tensor) -> list[float]:
        """Turn all sums into plain numbers, and others with them, in one transfer."""
        values = [*self.sums.values(), *self.weighted.values(), *others]
        numbers = to_floats(values)
        for sums in (self.sums, self.weighted):
            for name in sums:
                sums[name] = numbers.pop(0)
        return numbers

    def summary(self) -> dict[str, Any]:
        """Each term's mean, raw and weighted, and the loss they add up to."""
        self.read()
        terms = {
            name: {"raw": self._mean(name, self.sums), "weighted": self._mean(name, self.weighted)}
            for name in self.sums
        }
        return {"loss": sum(term["weighted"] for term in terms.values()), "terms": terms}

    def _mean(self, name: str, sums: Mapping[str, Number]) -> float:
        return float(sums[name]) / max(self.counts[name], 1.0)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The sums as plain numbers."""
        self.read()
        return {"sums": self.sums, "weighted": self.weighted, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Go on from saved sums."""
        self.sums, self.weighted = dict(state["sums"]), dict(state["weighted"])
        self.counts = dict(state["counts"])


def to_floats(values: Sequence[Number]) -> list[float]:
    """Scalars on a device to numbers here, with one synchronisation for all of them.

    Example:
        >>> to_floats([torch.tensor(1.5), 2.0])
        [1.5, 2.0]
    """
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else value for value in values]


def _add(sums: dict[str, Number], name: str, value: Number) -> None:
    sums[name] = sums[name] + value if name in sums else value


class EpochSoFar:
    """Sums, images, batches and seconds of the steps of one epoch.

    Example:
        >>> epoch = EpochSoFar()
        >>> terms = {"ce": {"raw": 2.0, "weighted": 1.0}}
        >>> row = epoch.add({"terms": terms, "counts": {"ce": 3.0}, "images": 4}, batches=1)
        >>> epoch.row()["train"]["loss"], epoch.row()["images"], "counts" in row
        (1.0, 4, False)
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self.images = 0
        self.batches = 0
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the epoch began, the time before a stop included."""
        return time.perf_counter() - self.began

    def add(self, row: Row, batches: int) -> Row:
        """Add a step; its row without the counts, which only these sums need."""
        self.tally.add_means(row["terms"], row.pop("counts"))
        self.images += row["images"]
        self.batches += batches
        return row

    def row(self) -> Row:
        """What the epoch's row says of its training."""
        return {
            "train": self.tally.summary(),
            "images": self.images,
            "images_per_second": self.images / self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        numbers = {"images": self.images, "batches": self.batches, "seconds": self.seconds}
        return {"tally": self.tally.state_dict(), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.tally.load_state_dict(state["tally"])
        self.images, self.batches = state["images"], state["batches"]
        self.began = time.perf_counter() - state["seconds"]
