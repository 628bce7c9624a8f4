"""Choice of the best epoch: the monitored score, its direction, and patience."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.training.history import History, Row

LOSS = "loss"
ALIASES = {"cider": "cider_d", "meteor": "meteor_nltk", "val_loss": LOSS}
MEANINGFUL = {
    "cider_d": 0.05,
    "bleu_2": 0.05,
    "bleu_3": 0.02,
    "bleu_4": 0.01,
}  # scores below this are not meaningful


class Monitor:
    """Decide which epoch is the best, and when training should stop early.

    NaN or an equal value does not count as progress. Captions of the first epochs can score almost
    0, and such scores cannot rank epochs: while the best score and the new one are below
    `meaningful`, the validation loss decides.

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
            improved = not loss >= self.best_loss  # the first one may be NaN
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


class Stoppable(Protocol):
    """What `BestEpoch` uses of the trainer."""

    history: History
    stopping: bool


class BestEpoch:
    """Read the monitored value from each epoch's row, mark progress, stop when patience ends."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.losses: list[float] = []  # of validation, by epoch

    def on_fit_start(self, trainer: Stoppable) -> None:
        """A run that had stopped before it was resumed stays stopped."""
        self._stop_if_exhausted(trainer)

    def on_epoch(self, trainer: Stoppable, row: Row) -> None:
        """Mark the row as improved or not, if there are validation data."""
        if not row["val"]:
            return
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

    def on_fit_end(self, trainer: Stoppable) -> None:
        """Warn if no epoch was the best, or if it was the first although the model was learning."""
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

    def _stop_if_exhausted(self, trainer: Stoppable) -> None:
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


def is_complete(epoch: int, epochs: int, callbacks: Sequence[Any]) -> bool:
    """Whether a run has nothing left to train: all epochs are done, or its patience has run out.

    Args:
        epoch: Epochs done.
        epochs: Epochs of the run.
        callbacks: Those of the run.
    """
    stopped = any(isinstance(c, BestEpoch) and c.monitor.exhausted for c in callbacks)
    return epoch >= epochs or stopped


def monitored_value(row: Row, name: str) -> float:
    """The value of an epoch's row for a name.

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
        UnknownName: no such score is measured; the message lists those that are.
        ConfigError: a score has the name of the validation loss.
    """
    if LOSS in directions:
        raise ConfigError(
            f"monitor: your own metric gives a score called '{LOSS}', which is the validation "
            "loss. Rename the score."
        )
    known = {LOSS: False, **directions}
    key = name if name in directions else monitor_key(name)
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
