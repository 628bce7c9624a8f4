"""Callbacks that follow a run elsewhere: CSV files, TensorBoard, Weights & Biases.

They write the rows that the history gets. A number is named by its path in the row, below "step" or
"epoch": "step/terms/ce/raw", "epoch/val/loss", "epoch/scores/cider_d". The option `log` makes them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from capdistill.errors import ConfigError
from capdistill.training.callbacks import (
    Callback,
    Checkpoints,
    Progress,
    Recorder,
    Run,
    is_logged,
)
from capdistill.training.history import History, Row, flat, import_extra
from capdistill.training.monitor import Monitor
from capdistill.training.profile import profiled


def make_loggers(log: Iterable[str | Mapping[str, Any]]) -> list[Callback]:
    """The callbacks of the option `log`.

    Example:
        >>> [type(each).__name__ for each in make_loggers(["csv"])]
        ['CSVLogger']

    Args:
        log: Names, or {"name": ..., arguments}.

    Raises:
        ConfigError: an argument that a logger does not have.
        MissingExtra: the package of a logger is not installed.
    """
    kinds = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandBLogger}
    made: list[Callback] = []
    for each in log:
        arguments = {"name": each} if isinstance(each, str) else dict(each)
        name = arguments.pop("name")
        try:
            made.append(kinds[name](**arguments))
        except TypeError as error:
            raise ConfigError(f"log: '{name}' was given {arguments}: {error}.") from error
    return made


def writers(
    log: Iterable[str | Mapping[str, Any]],
    progress: bool | None,
    profile: bool,
    monitor: Monitor | None,
    checkpoints: Checkpoints,
) -> list[Any]:
    """The callbacks that write a run: loggers, history, terminal, and its directory at the end."""
    made = [*make_loggers(log), Recorder(), Progress(progress, monitor), checkpoints]
    return profiled(made) if profile else made


class _Logger(Callback):
    """Hand every logged row to `write`."""

    def on_step(self, trainer: Run, row: Row) -> None:
        """Write the row if the history has it, too."""
        if is_logged(row, trainer.config):
            self.write("step", row)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Write the row."""
        self.write("epoch", row)

    @abstractmethod
    def write(self, kind: str, row: Row) -> None:
        """Write the numbers of a row of kind "step" or "epoch"."""


def numbers(kind: str, row: Row) -> dict[str, float]:
    """The numbers of a row that change, by name.

    Example:
        >>> numbers("step", {"kind": "step", "step": 1, "epoch": 0, "terms": {"ce": {"raw": 2.0}}})
        {'step/terms/ce/raw': 2.0}
    """
    rest = {key: value for key, value in row.items() if key not in ("kind", "step", "epoch")}
    return {
        f"{kind}/{name}": float(value)
        for name, value in flat(rest).items()
        if isinstance(value, (int, float))
    }


class CSVLogger(Callback):
    """Keep epochs.csv and steps.csv up to date, after every epoch and at the end.

    Example:
        >>> CSVLogger("runs/tables").directory
        PosixPath('runs/tables')

    Args:
        directory: Where the files go; by default the directory of the run.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)

    def on_fit_start(self, trainer: Run) -> None:
        """Choose the directory."""
        self.directory = _directory(self.directory, trainer, "csv", "")

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Write the rows so far."""
        self._write([*trainer.history, row])

    def on_fit_end(self, trainer: Run) -> None:
        """Write all rows."""
        self._write(trainer.history)

    def _write(self, rows: Iterable[Row]) -> None:
        assert self.directory is not None
        history = History()
        history.rows = list(rows)
        history.to_csv(self.directory / "epochs.csv", "epoch")
        history.to_csv(self.directory / "steps.csv", "step")


class TensorBoardLogger(_Logger):
    """Write event files for TensorBoard: `tensorboard --logdir runs`.

    A run that is resumed continues its curves; steps that are done again replace the old ones.

    Args:
        directory: Where the files go; by default tensorboard/ in the directory of the run.
        options: Further arguments of `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        MissingExtra: tensorboard is not installed (extra `tensorboard`).
    """

    def __init__(self, directory: str | Path | None = None, **options: Any) -> None:
        import_extra("tensorboard", "log='tensorboard'")
        self.directory = None if directory is None else Path(directory)
        self.options = options
        self.writer: Any = None

    def on_fit_start(self, trainer: Run) -> None:
        """Open the file; events of steps that the history does not have are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.directory = _directory(self.directory, trainer, "tensorboard", "tensorboard")
        last = max((row["step"] for row in trainer.history), default=-1)
        options = {"purge_step": last + 1, **self.options}
        self.writer = SummaryWriter(str(self.directory), **options)

    def write(self, kind: str, row: Row) -> None:
        """Write the numbers at their step, on disk at once."""
        for name, value in numbers(kind, row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()


class WandBLogger(_Logger):
    """Send the rows to Weights & Biases, with the options of the run as its configuration.

    A run that is resumed continues the same run there. Without a network, `mode="offline"` keeps
    the files in the directory of the run, for `wandb sync`.

    Args:
        project: The project there.
        options: Further arguments of `wandb.init`, such as name, entity, tags and mode.

    Raises:
        MissingExtra: wandb is not installed (extra `wandb`).
    """

    def __init__(self, project: str = "capdistill", **options: Any) -> None:
        self.wandb = import_extra("wandb", "log='wandb'")
        self.options = {"project": project, **options}
        self.id: str | None = options.get("id")
        self.run: Any = None
        self.failed = False

    def on_fit_start(self, trainer: Run) -> None:
        """Begin or continue the run there."""
        known = {} if self.id is None else {"id": self.id, "resume": "allow"}
        out = trainer.checkpoints.out
        folder = {} if out is None else {"dir": str(out)}
        config = trainer.config.model_dump(mode="json")
        self.run = self.wandb.init(**{**folder, "config": config, **known, **self.options})
        self.id, self.failed = self.run.id, True
        self.run.define_metric("*", step_metric="step")

    def write(self, kind: str, row: Row) -> None:
        """Send the numbers with their step."""
        self.run.log({**numbers(kind, row), "step": row["step"]})

    def on_fit_end(self, trainer: Run) -> None:
        """The run did not fail."""
        self.failed = False

    def close(self) -> None:
        """End the run there, as failed if it ended by an error."""
        if self.run is not None:
            self.run.finish(exit_code=int(self.failed))

    def state_dict(self) -> dict[str, Any]:
        """Which run it is."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that run."""
        self.id = self.options.get("id") or state["id"]


def _directory(given: Path | None, trainer: Run, name: str, folder: str) -> Path:
    """The directory of a logger: as given, or in that of the run."""
    if given is not None:
        return given
    if trainer.checkpoints.out is None:
        raise ConfigError(
            f"log: '{name}' has no directory, as the run has none. Give fit an out=, or the logger "
            f'a directory: {{"name": "{name}", "directory": DIR}}.'
        )
    return trainer.checkpoints.out / folder
