"""What happens beside the steps: the choice of the best epoch, history, checkpoints, progress.

A callback is any object with some of `on_fit_start(trainer)`, `on_step(trainer, row)`,
`on_epoch(trainer, row)` and `on_fit_end(trainer)`. `Run` lists what it may use of the trainer.
Callbacks with `state_dict` and `load_state_dict` are part of the state of a run.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from capdistill.captioner import Captioner
from capdistill.data.loader import Source, skipped_images
from capdistill.errors import UnknownName, suggest
from capdistill.files import printable
from capdistill.training.checkpoint import STATE, save_state
from capdistill.training.config import TrainConfig
from capdistill.training.history import History, Row
from capdistill.weights import load_exactly, read_state_dict

LOSS = "loss"
ALIASES = {"cider": "cider_d", "meteor": "meteor_nltk", "val_loss": LOSS}
MEANINGFUL = {
    "cider_d": 0.05,
    "bleu_2": 0.05,
    "bleu_3": 0.02,
    "bleu_4": 0.01,
}  # scores below say little
_PROBLEMS = 20  # images named in a warning


class Run(Protocol):
    """What a callback may use of the trainer that calls it."""

    captioner: Captioner
    config: TrainConfig
    history: History
    stopping: bool  # set it to end the run after the epoch
    train_source: Source | None
    val_source: Source | None
    steps_per_epoch: int | None
    checkpoints: Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the data."""

    def describe(self) -> list[str]:
        """Lines about the run: data, models, losses, weights and rates."""


class Monitor:
    """Decide which epoch is the best, and when there has been no progress for too long.

    NaN is no progress and never wins; an equal value is no progress either. Captions of the first
    epochs can score almost 0, and then their scores rank nothing: while the best score and the new
    one are below `meaningful`, the validation loss decides.

    Example:
        >>> monitor = Monitor("bleu_4", patience=2)
        >>> [monitor.update(value) for value in (0.2, float("nan"), 0.2)], monitor.exhausted
        ([True, False, False], True)
        >>> monitor = Monitor("cider_d", meaningful=0.05)
        >>> [monitor.update(*pair) for pair in ((0.01, 5.0), (0.0, 4.0), (0.06, 4.1), (0.04, 3.0))]
        [True, True, True, False]

    Args:
        name: The name of the value.
        higher: Whether more is better.
        patience: Epochs in a row without progress that end the run, or None.
        meaningful: Scores below this are too low to rank epochs.
    """

    def __init__(
        self,
        name: str,
        *,
        higher: bool = True,
        patience: int | None = None,
        meaningful: float = 0.0,
    ) -> None:
        self.name, self.higher, self.patience, self.meaningful = name, higher, patience, meaningful
        self.best: float | None = None
        self.best_loss = math.inf
        self.best_epoch: int | None = None
        self.epochs = 0
        self.waited = 0

    def update(self, value: float, loss: float = math.nan) -> bool:
        """Take the value of the next epoch, and its validation loss; whether it is the best."""
        low = self.higher and max(value, self.best or 0.0) < self.meaningful
        if math.isnan(value):
            improved = False
        elif self.best is None:
            improved = True
        elif low and not math.isnan(loss):
            improved = loss < self.best_loss
        else:
            improved = value > self.best if self.higher else value < self.best
        if improved:
            self.best, self.best_loss, self.best_epoch = value, loss, self.epochs
        self.waited = 0 if improved else self.waited + 1
        self.epochs += 1
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        keys = ("best", "best_loss", "best_epoch", "epochs", "waited")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        vars(self).update(state)


class BestEpoch:
    """Read the monitored value from each epoch's row, mark progress, stop when patience ends."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.losses: list[float] = []  # of validation, by epoch

    def on_fit_start(self, trainer: Run) -> None:
        """A run that had stopped before it was resumed stays stopped."""
        self._stop_if_exhausted(trainer)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Mark the row as improved or not."""
        value, loss = monitored_value(row, self.monitor.name), float(row["val"]["loss"])
        if math.isnan(value):
            warnings.warn(
                f"Epoch {row['epoch'] + 1}: {self.monitor.name} is NaN, which counts as no "
                "progress.",
                stacklevel=3,
            )
        row["improved"] = self.monitor.update(value, loss)
        row["best"] = {"epoch": self.monitor.best_epoch, self.monitor.name: self.monitor.best}
        self.losses.append(loss)
        self._stop_if_exhausted(trainer)

    def on_fit_end(self, trainer: Run) -> None:
        """Warn where no epoch was the best, or the first one although the model was learning."""
        if trainer.history.interrupted or not self.monitor.epochs:
            return
        if self.monitor.best is None:
            warnings.warn(
                f"No epoch had a number for {self.monitor.name} (all were NaN): the last weights "
                "were kept.",
                stacklevel=2,
            )
        elif self.monitor.best_epoch == 0 and len(self.losses) > 2 and self._loss_fell():
            warnings.warn(
                f"The best epoch by {self.monitor.name} is the first, although the validation loss "
                f"fell from {self.losses[0]:.3f} to {min(self.losses):.3f}. The model was still "
                "learning: train for more epochs, raise learning_rate, or monitor='loss'.",
                stacklevel=2,
            )

    def _loss_fell(self) -> bool:
        return min(self.losses) < 0.98 * self.losses[0]

    def _stop_if_exhausted(self, trainer: Run) -> None:
        if self.monitor.exhausted and not trainer.stopping:
            trainer.stopping = True
            trainer.history.stopped = (
                f"no progress in {self.monitor.name} for {self.monitor.waited} epochs "
                f"(patience={self.monitor.patience})"
            )

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state."""
        return {**self.monitor.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        rest = dict(state)
        self.losses = list(rest.pop("losses"))
        self.monitor.load_state_dict(rest)


def monitored_value(row: Row, name: str) -> float:
    """The value of an epoch's row that a name stands for.

    Raises:
        UnknownName: validation gave no such score.
    """
    if name == LOSS:
        return float(row["val"]["loss"])
    if name not in row["scores"]:
        raise UnknownName(f"monitor: validation gave no '{name}'. {suggest(name, row['scores'])}")
    return float(row["scores"][name])


def resolve_monitor(name: str, directions: Mapping[str, bool]) -> tuple[str, bool]:
    """A monitored name to its key and whether higher is better.

    Example:
        >>> resolve_monitor("CIDEr", {"cider_d": True})
        ('cider_d', True)

    Raises:
        UnknownName: nothing of that name is measured; the message lists what is.
    """
    known = {LOSS: False, **directions}
    key = monitor_key(name)
    if key not in known:
        shown = sorted({*known, *(a for a, k in ALIASES.items() if k in known)})
        raise UnknownName(
            f"monitor: nothing called '{name}' is measured. {suggest(name, shown)}{_way_to(key)}"
        )
    return key, known[key]


def monitor_key(name: str) -> str:
    """The name of a score as the metrics have it.

    Example:
        >>> monitor_key("BLEU-4"), monitor_key("cider")
        ('bleu_4', 'cider_d')
    """
    key = name.lower().replace("-", "_")
    return ALIASES.get(key, key)


def _way_to(key: str) -> str:
    """How to measure a score that is not measured by default."""
    from capdistill.metrics import DIRECTIONS
    from capdistill.metrics.scorer import select

    if key not in DIRECTIONS:
        return ""
    [[measured]] = select([key]).values()
    if measured != key:
        return (
            " The table of paraphrases is not installed (extra coco): measure and monitor "
            f"'{measured}'."
        )
    return f" To measure it, give metrics=(..., '{key}')."


class Recorder:
    """Write the first and every `log_every`-th step, every epoch and the end to the history."""

    def on_step(self, trainer: Run, row: Row) -> None:
        """Keep the row of a step, now and then."""
        if row["step"] % trainer.config.log_every == 0 or row["step"] == 1:
            trainer.history.append(row)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Keep the row of an epoch."""
        trainer.history.append(row)


class SkippedImages:
    """Name the images that could not be used, in the epoch's row and as a warning, once each."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Name those that were not known yet."""
        sources = [source for source in (trainer.train_source, trainer.val_source) if source]
        problems = {str(problem): None for source in sources for problem in skipped_images(source)}
        row["problems"] = [problem for problem in problems if problem not in self.known]
        self.known.update(problems)
        if row["problems"]:
            shown = "\n  ".join(row["problems"][:_PROBLEMS])
            more = len(row["problems"]) - _PROBLEMS
            warnings.warn(
                f"{len(row['problems'])} images could not be used and were left out:\n  {shown}"
                + (f"\n  ... and {more} more (see the history)" if more > 0 else ""),
                stacklevel=3,
            )


class Checkpoints:
    """Save the best student to best/, the state to state.pt, and at the end the last to final/.

    Args:
        out: Directory of the run, or None.
        monitor: Decides what is best; None where nothing is validated.
        every_steps, every_minutes: When the state is also saved within an epoch.
    """

    def __init__(
        self,
        out: Path | None,
        monitor: Monitor | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        self.out, self.monitor = out, monitor
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.best: dict[str, torch.Tensor] | None = None  # kept here only without a directory
        self.saved = time.monotonic()

    def on_step(self, trainer: Run, row: Row) -> None:
        """Save the state within an epoch, by steps or by time."""
        due = self.every_steps is not None and row["step"] % self.every_steps == 0
        if self.every_minutes is not None:
            due |= time.monotonic() - self.saved > 60 * self.every_minutes
        if due:
            self.save(trainer)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Keep the student if it improved, then the state to continue from."""
        if row.get("improved"):
            if self.out is None:
                self.best = _copy_weights(trainer.captioner)
            else:
                trainer.captioner.save(self.out / "best")
        self.save(trainer)

    def save(self, trainer: Run) -> None:
        """Write what a resumed run needs."""
        if self.out is not None:
            save_state(self.out / STATE, trainer.state_dict())
        self.saved = time.monotonic()

    def on_fit_end(self, trainer: Run) -> None:
        """Write the last student; then the captioner takes the best weights.

        Where no epoch was the best, the last weights are kept as the best.
        """
        if trainer.history.interrupted:
            return
        chosen = self.monitor is not None and self.monitor.best_epoch is not None
        if self.out is not None:
            trainer.captioner.save(self.out / "final")
            if chosen:
                _load_weights(trainer.captioner, self.out / "best" / "model.safetensors")
            else:
                trainer.captioner.save(self.out / "best")
        elif self.best is not None:
            trainer.captioner.load_state_dict(self.best)


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _load_weights(captioner: Captioner, path: Path) -> None:
    """Read what `save` wrote: without the prefixes of torch.compile."""
    names = {key.replace("_orig_mod.", ""): key for key in captioner.state_dict()}
    state = {names.get(key, key): value for key, value in read_state_dict(path).items()}
    load_exactly(captioner, state, f"The weights in '{path}'")


class Progress:
    """A bar on a terminal, lines elsewhere; what is trained before, and what was kept after.

    Args:
        show: None shows a bar on a terminal only; False shows nothing.
        monitor: Named in the summary.
    """

    def __init__(self, show: bool | None, monitor: Monitor | None = None) -> None:
        self.bar_wanted = sys.stderr.isatty() if show is None else show
        self.lines_wanted = show is not False
        self.monitor = monitor
        self.bar: Any = None

    def on_fit_start(self, trainer: Run) -> None:
        """Describe the run."""
        if self.lines_wanted:
            self._write("\n".join(trainer.describe()))

    def on_step(self, trainer: Run, row: Row) -> None:
        """Move the bar."""
        if not self.bar_wanted:
            return
        if self.bar is None:
            from tqdm import tqdm

            total = trainer.config.epochs * (trainer.steps_per_epoch or 0)
            self.bar = tqdm(total=total, initial=row["step"] - 1, unit="step", dynamic_ncols=True)
        shown = {"epoch": row["epoch"] + 1, "loss": f"{row['loss']:.3f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Report the epoch in one line."""
        if self.lines_wanted:
            monitored = None if self.monitor is None else self.monitor.name
            self._write(describe_epoch(row, trainer.config.epochs, monitored))

    def on_fit_end(self, trainer: Run) -> None:
        """Report why the run ended and what was kept."""
        self.close()
        if self.lines_wanted:
            self._write("\n".join(_describe_end(trainer, self.monitor)))

    def close(self) -> None:
        """Remove the bar, also where the run ended with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _write(self, text: str) -> None:
        text = printable(text, sys.stderr)
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def describe_epoch(row: Row, epochs: int, monitored: str | None = None) -> str:
    """One line of at most 80 columns about an epoch, aligned with the lines of other epochs.

    Example:
        >>> row = {"epoch": 0, "seconds": 3.0, "train": {"loss": 2.5}, "images": 6, "skipped": 5,
        ...        "val": {"loss": 2.7, "images": 2, "skipped": 0}, "improved": True,
        ...        "scores": {"bleu_4": 0.02, "cider_d": 0.31}}
        >>> print(describe_epoch(row, 30, "cider_d"))
        epoch  1/30  train  2.5000  val  2.7000  cider_d 0.3100 best      3 s  (5 left out)

    Args:
        row: The epoch's row.
        epochs: Of the whole run.
        monitored: The score to show; the last one unless given.
    """
    width = len(str(epochs))
    line = f"epoch {row['epoch'] + 1:>{width}}/{epochs}  train {row['train']['loss']:7.4f}"
    if row["val"]:
        line += f"  val {row['val']['loss']:7.4f}"
    scores = row["scores"]
    name = monitored if monitored in scores else next(reversed(scores), None)
    if name is not None:
        line += f"  {name} {scores[name]:6.4f}"
    line += " best" if row.get("improved") else "     "
    line += f"  {row['seconds']:5.0f} s"
    left_out = row["skipped"] + (row["val"].get("skipped", 0) if row["val"] else 0)
    return f"{line}  ({left_out} left out)" if left_out else line


def _describe_end(trainer: Run, monitor: Monitor | None) -> Iterator[str]:
    """Why the run ended, which epoch was kept and why, and what to do next."""
    history, out = trainer.history, trainer.checkpoints.out
    yield f"stopped: {history.stopped}"
    if history.interrupted:
        return
    if monitor is not None and monitor.best_epoch is not None:
        reason = f"best {monitor.name} {monitor.best:.4f}"
        if monitor.name != LOSS and monitor.best is not None and monitor.best < monitor.meaningful:
            reason = f"lowest validation loss {monitor.best_loss:.4f}; scores are still near 0"
        yield f"kept: epoch {monitor.best_epoch + 1} ({reason})" + (f", {out}/best" if out else "")
    else:
        yield "kept: the last epoch" + (f", {out}/best" if out else "")
    if out is not None:
        yield f"next: capdistill caption {out}/best photo.jpg"
