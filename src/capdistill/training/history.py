"""The history of a run, one row per logged step and per epoch, and the meters behind the rows."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from capdistill.errors import ConfigError, DataError, MissingExtra
from capdistill.files import finite_or_none, from_json, user_path, write_text

HISTORY = "history.jsonl"
Row = dict[str, Any]
Verdict = Literal["good", "overflow", "spike"]  # of a step, before it changes the weights


class History:
    """Rows in memory and, if a path is given, as JSON Lines on disk.

    A row holds `kind` ("step" or "epoch"), `step`, `epoch` (from 0) and what was measured.

    - Step rows: `loss`, `terms` (each raw and weighted), `weights` and `learning_rates` (of that
      step), `gradient_norm` (before clipping), `skipped_steps` (in a row, by loss scaling),
      `spike` (whether it was skipped because the loss jumped), `seconds`, `images`, `captions`,
      `images_per_second`.
    - Epoch rows: `train` (`loss` and `terms`), `val` (the same, with the number of `images` it
      covers and of those `skipped`; empty without validation data), `weights` (at the end of the
      epoch), `scores`, `improved` and `best` (with validation data), `images`, `skipped`,
      `dropped_mass` (probability that a trimmed teacher gives to entries that the student lacks),
      `problems` (images that could not be used, named in the epoch that met them first),
      `skipped_steps`, `spikes`, `running_statistics` (micro-batches of one image whose batch norms
      used running statistics), `images_per_second`, `seconds`, `profile` (if asked for).
    - The last row, of kind "end", holds `stopped`: why the run ended, and `interrupted`.

    On disk NaN is null.

    Example:
        >>> history = History()
        >>> history.append({"kind": "epoch", "epoch": 0, "step": 4, "train": {"loss": 2.0}})
        >>> [row["train"]["loss"] for row in history.epochs]
        [2.0]

    Args:
        path: File that every row is appended to, or None.
        keep_until: Rows of an existing file up to this step are kept; None starts a new file.
        epochs: Epoch rows are kept for this many epochs only. A run that was killed after it wrote
            the row of an epoch, but before it saved its state, finishes that epoch again.

    Attributes:
        interrupted: Whether the run was interrupted (Ctrl-C or SIGTERM) before its end.
        signal: Number of the signal that asked for it in this process, or None.
        stopped: Why the run ended, in words; None while it continues.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        keep_until: int | None = None,
        epochs: float = math.inf,
    ) -> None:
        self.path = None if path is None else user_path(path)
        self.rows: list[Row] = []
        self.interrupted = False
        self.signal: int | None = None
        self.stopped: str | None = None
        if self.path is not None:
            rows = [] if keep_until is None else _read_until(self.path, keep_until)
            rows = [row for row in rows if row.get("kind") != "end"]
            again = [r for r in rows if r.get("kind") == "epoch" and r["epoch"] >= epochs]
            self.rows = [row for row in rows if row not in again]
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
                "so far are as they were; make room, then continue with resume=True."
            ) from error

    def complete(self, epochs: int | None) -> None:
        """Say why the run is over: its epochs are done; None where a callback asked for the end."""
        done = f"all {epochs} epochs are done" if epochs != 1 else "its epoch is done"
        self.stopped = self.stopped or (done if epochs else "a callback asked for it")
        self.interrupted = False  # it came too late to matter

    def end(self, epoch: int, step: int) -> None:
        """Record why the run ended: `stopped` and `interrupted`."""
        ended = {"stopped": self.stopped, "interrupted": self.interrupted}
        self.append({"kind": "end", "epoch": epoch, "step": step, **ended})

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

    def table(self, kind: Literal["epoch", "step"] = "epoch") -> list[Row]:
        """The rows of epochs or of logged steps, each without nesting; see `flat`.

        Example:
            >>> history = History()
            >>> history.append({"kind": "epoch", "epoch": 0, "step": 4, "train": {"loss": 2.0}})
            >>> history.table()
            [{'epoch': 0, 'step': 4, 'train/loss': 2.0}]

        Raises:
            ConfigError: another kind.
        """
        if kind not in ("epoch", "step"):
            raise ConfigError(
                f"History: there are no rows of kind {kind!r}. Use 'epoch' or 'step'."
            )
        rows = ({**row} for row in self.rows if row["kind"] == kind)
        return [flat({key: row[key] for key in row if key != "kind"}) for row in rows]

    def to_csv(self, path: str | Path, kind: Literal["epoch", "step"] = "epoch") -> None:
        """Write `table(kind)` to a CSV file, one column per name; what a row lacks is empty.

        Raises:
            ConfigError: the file cannot be written.
        """
        rows, text = self.table(kind), io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(path), text.getvalue())

    def to_pandas(self, kind: Literal["epoch", "step"] = "epoch") -> Any:
        """`table(kind)` as a `pandas.DataFrame`; what a row lacks is NaN.

        Raises:
            MissingExtra: pandas is not installed.
        """
        pandas = import_extra("pandas", "History.to_pandas")
        return pandas.DataFrame(self.table(kind))

    def __repr__(self) -> str:
        """One line: how far the run is, and its best epoch."""
        count = len(self.epochs)
        logged = len(self.steps)
        parts = [f"{count} epoch{'s' * (count != 1)}", f"{logged} logged step{'s' * (logged != 1)}"]
        if self.best is not None:
            monitored = {k: v for k, v in self.best.get("best", {}).items() if k != "epoch"}
            shown = "".join(f" ({name} {value:.4f})" for name, value in monitored.items())
            parts.append(f"best epoch {self.best['epoch'] + 1}{shown}")
        parts += [self.stopped] if self.stopped else []
        return f"History({', '.join(parts)})"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read the history of a run without writing to it; a half-written last line is left out.

        Args:
            path: The directory of the run, or its history.jsonl.

        Raises:
            DataError: there is no such file, or it is not a history.
        """
        history, file = cls(), user_path(path, DataError)
        file = file / HISTORY if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                f"There is no history in {file}. Give the directory of a run, or its {HISTORY}."
            )
        history.rows = _read_until(file, math.inf)
        if not history.rows and b"\n" in file.read_bytes():
            raise DataError(f"{file} has no row of a history. Give the {HISTORY} of a run.")
        ends = [row for row in history.rows if row.get("kind") == "end"]
        if ends:
            history.stopped = ends[-1].get("stopped")
            history.interrupted = bool(ends[-1].get("interrupted"))
        return history


def flat(row: Mapping[str, Any], prefix: str = "") -> Row:
    """A row without nesting: a value within others is named by its path. Lists are left out.

    Example:
        >>> flat({"step": 3, "terms": {"ce": {"raw": 2.0, "weighted": 1.0}}, "problems": []})
        {'step': 3, 'terms/ce/raw': 2.0, 'terms/ce/weighted': 1.0}
    """
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif not isinstance(value, (list, tuple)):
            found[f"{prefix}{name}"] = value
    return found


def import_extra(module: str, what: str) -> Any:
    """Import an optional dependency, which an extra of the same name installs.

    Example:
        >>> import_extra("math", "Rounding").floor(1.5)
        1

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{what} needs {module}, which cannot be imported ({error}). Install the extra: "
            f'pip install "capdistill[{module}]"'
        ) from error


def _line(row: Row) -> str:
    return json.dumps(finite_or_none(row), ensure_ascii=False, default=str) + "\n"


def _read_until(path: Path, step: float) -> list[Row]:
    rows = []
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    for line in text.split("\n"):
        try:
            row = from_json(line)
        except ValueError:
            continue  # the last line of a killed run
        if _is_row(row) and row["step"] <= step:
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    numbers = isinstance(row, dict) and all(type(row.get(n)) is int for n in ("step", "epoch"))
    return numbers and isinstance(row.get("kind"), str)


class LossMeter:
    """Raw and weighted sums of terms, added over batches and divided once by their counts.

    Example:
        >>> meter = LossMeter()
        >>> for value in (6.0, 2.0):
        ...     meter.add({"ce": value}, weights={"ce": 0.5}, counts={"ce": 2.0})
        >>> meter.summary()
        {'loss': 1.0, 'terms': {'ce': {'raw': 2.0, 'weighted': 1.0}}}
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weighted: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(
        self,
        sums: Mapping[str, float],
        weights: Mapping[str, float],
        counts: Mapping[str, float],
    ) -> None:
        """Add the sums of a batch, with their weights and the counts of the batch."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.weighted[name] = self.weighted.get(name, 0.0) + weights[name] * value
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def merge(self, other: LossMeter) -> None:
        """Add what another meter has measured."""
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            mine |= {name: mine.get(name, 0.0) + value for name, value in theirs.items()}

    def _tables(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        return self.sums, self.weighted, self.counts

    def summary(self) -> dict[str, Any]:
        """Each term's mean, raw and weighted, and the loss they add up to."""
        terms = {}
        for name, value in self.sums.items():
            count = self.counts[name] or 1.0
            terms[name] = {"raw": value / count, "weighted": self.weighted[name] / count}
        return {"loss": sum(term["weighted"] for term in terms.values()), "terms": terms}


class EpochMeter(LossMeter):
    """Progress within the current epoch, from which an interrupted run can continue.

    Attributes:
        images: Trained on so far in this epoch.
        position: Number of the batch with which the epoch goes on; those without any usable image
            count too.
        skipped_steps: Steps that loss scaling skipped because the gradient overflowed.
        spikes: Steps that were skipped because the loss jumped; see `on_spike`.
        running_statistics: Micro-batches whose batch norms had one value per channel, and used
            their running statistics.
    """

    COUNTERS = ("images", "position", "skipped_steps", "spikes", "running_statistics")

    def __init__(self) -> None:
        super().__init__()
        self.images = self.position = self.skipped_steps = self.spikes = 0
        self.running_statistics = 0
        self.began = time.perf_counter()

    def count(self, images: int, verdict: Verdict) -> None:
        """Count the images of a step, and the step if it was skipped."""
        self.images += images
        self.skipped_steps += verdict == "overflow"
        self.spikes += verdict == "spike"

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, including those before an interruption."""
        return time.perf_counter() - self.began

    def row(self) -> Row:
        """The training entries of the epoch's row."""
        return {
            "train": self.summary(),
            "images": self.images,
            "images_per_second": self.images / self.seconds,
            "skipped_steps": self.skipped_steps,
            "spikes": self.spikes,
            "running_statistics": self.running_statistics,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        sums = {"sums": self.sums, "weighted": self.weighted, "counts": self.counts}
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return {**sums, **counters, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        for name in ("sums", "weighted", "counts", *self.COUNTERS):
            setattr(self, name, state[name])
        self.began = time.perf_counter() - state["seconds"]
