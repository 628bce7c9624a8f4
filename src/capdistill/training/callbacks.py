"""What happens beside the steps: history, the choice of the best epoch, checkpoints, progress.

A callback is any object with some of `on_fit_start(trainer)`, `on_step(trainer, row)`,
`on_epoch(trainer, row)`, `on_fit_end(trainer)`. Those that have `state_dict` and
`load_state_dict` are carried over by a resumed run.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capdistill.captioner import Captioner
from capdistill.errors import UnknownName, suggest
from capdistill.training.checkpoint import (
    STATE,
    save_state,
)
from capdistill.training.history import Row
from capdistill.weights import load_exactly, read_state_dict

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


LOSS = "loss"
ALIASES = {"cider": "cider_d", "meteor": "meteor_nltk", "val_loss": LOSS}


class Monitor:
    """Decide which epoch is the best, and when there has been no progress for too long.

    A NaN is no progress and never wins; an equal value is no progress either.

    Example:
        >>> monitor = Monitor("bleu_4", patience=2)
        >>> [monitor.update(value) for value in (0.2, float("nan"), 0.2)], monitor.exhausted
        ([True, False, False], True)

    Args:
        name: What is watched.
        higher: Whether more is better.
        patience: Epochs in a row without progress that end the run, or None.
    """

    def __init__(self, name: str, *, higher: bool = True, patience: int | None = None) -> None:
        self.name, self.higher, self.patience = name, higher, patience
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.epochs = 0
        self.waited = 0

    def update(self, value: float) -> bool:
        """Take the value of the next epoch; whether it is the best so far."""
        improved = not math.isnan(value) and (
            self.best is None or (value > self.best if self.higher else value < self.best)
        )
        if improved:
            self.best, self.best_epoch = value, self.epochs
        self.waited = 0 if improved else self.waited + 1
        self.epochs += 1
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        keys = ("best", "best_epoch", "epochs", "waited")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        vars(self).update(state)


class BestEpoch:
    """Read the monitored value from each epoch's row, mark progress, stop when patience ends."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_fit_start(self, trainer: Trainer) -> None:
        """A run that had stopped before it was resumed stays stopped."""
        trainer.stopping |= self.monitor.exhausted

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Mark the row as improved or not."""
        value = monitored_value(row, self.monitor.name)
        if math.isnan(value):
            warnings.warn(
                f"Epoch {row['epoch']}: {self.monitor.name} is NaN, which counts as no progress.",
                stacklevel=3,
            )
        row["improved"] = self.monitor.update(value)
        row["best"] = {"epoch": self.monitor.best_epoch, self.monitor.name: self.monitor.best}
        trainer.stopping |= self.monitor.exhausted

    def on_fit_end(self, trainer: Trainer) -> None:
        """Say so where no epoch could be called the best."""
        if self.monitor.epochs and self.monitor.best is None and not trainer.history.interrupted:
            warnings.warn(
                f"No epoch had a number for {self.monitor.name} (all were NaN): the last weights "
                "were kept.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.monitor.load_state_dict(state)


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


def resolve_monitor(name: str, directions: dict[str, bool]) -> tuple[str, bool]:
    """A monitored name to its key and whether higher is better.

    Example:
        >>> resolve_monitor("CIDEr", {"cider_d": True})
        ('cider_d', True)

    Raises:
        UnknownName: nothing of that name is measured; the message lists what is.
    """
    known = {LOSS: False, **directions}
    key = name.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in known:
        shown = sorted({*known, *(a for a, k in ALIASES.items() if k in known)})
        raise UnknownName(
            f"monitor: nothing called '{name}' is measured. {suggest(name, shown)}{_way_to(key)}"
        )
    return key, known[key]


def _way_to(key: str) -> str:
    """How to have a score measured that is not measured unless asked for."""
    from capdistill.metrics import DIRECTIONS
    from capdistill.metrics.scorer import select

    if key not in DIRECTIONS:
        return ""
    [[measured]] = select([key]).values()
    if measured != key:
        return f" Here is no table of paraphrases (extra coco): measure and monitor '{measured}'."
    return f" To measure it, set trainer.metrics = (*trainer.metrics, '{key}')."


class Recorder:
    """Write the first and every `log_every`-th step and every epoch to the history."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Keep the row of a step, now and then."""
        if row["step"] % trainer.config.log_every == 0 or row["step"] == 1:
            trainer.history.append(row)

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Keep the row of an epoch."""
        trainer.history.append(row)


class SkippedImages:
    """Name the images that could not be used, in the epoch's row and as a warning, once each."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Name those that were not known yet."""
        sources = [source for source in (trainer.train_source, trainer.val_source) if source]
        problems = {str(problem): None for source in sources for problem in source.skipped}
        row["problems"] = [problem for problem in problems if problem not in self.known]
        self.known.update(problems)
        if row["problems"]:
            shown = "\n  ".join(row["problems"][:20])
            more = len(row["problems"]) - 20
            warnings.warn(
                f"{len(row['problems'])} images could not be used and were left out:\n  {shown}"
                + (f"\n  ... and {more} more (see the history)" if more > 0 else ""),
                stacklevel=3,
            )


class Progress:
    """A bar with the terms and the time left on a terminal; a line an epoch elsewhere."""

    def __init__(self, show: bool | None) -> None:
        self.bar_wanted = sys.stderr.isatty() if show is None else show
        self.lines_wanted = show is not False
        self.bar: Any = None

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Move the bar."""
        if not self.bar_wanted:
            return
        if self.bar is None:
            from tqdm import tqdm

            total = trainer.config.epochs * trainer.steps_per_epoch
            self.bar = tqdm(total=total, initial=row["step"] - 1, unit="step", dynamic_ncols=True)
        terms = {name: f"{term['raw']:.3f}" for name, term in row["terms"].items()}
        shown = {**terms, "epoch": row["epoch"], "loss": f"{row['loss']:.3f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Say how the epoch ended."""
        if not self.lines_wanted:
            return
        line = describe_epoch(row)
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_fit_end(self, trainer: Trainer) -> None:
        """The run is over."""
        self.close()

    def close(self) -> None:
        """Take the bar away, also where the run ended with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe_epoch(row: Row) -> str:
    """One line about an epoch.

    Example:
        >>> describe_epoch({"epoch": 0, "seconds": 3.0, "train": {"loss": 2.5}, "images": 6,
        ...                 "skipped": 5, "val": {}, "scores": {"cider_d": 0.31}, "improved": True})
        'epoch 0: train loss 2.5000 (6 images, 5 left out), cider_d 0.3100 (best so far), 3.0 s'
    """
    parts = [f"train loss {row['train']['loss']:.4f}{_left_out(row)}"]
    if row["val"]:
        parts.append(f"val loss {row['val']['loss']:.4f}{_left_out(row['val'])}")
    parts += [f"{name} {value:.4f}" for name, value in row["scores"].items()]
    best = " (best so far)" if row.get("improved") else ""
    return f"epoch {row['epoch']}: {', '.join(parts)}{best}, {row['seconds']:.1f} s"


def _left_out(part: Row) -> str:
    return f" ({part['images']} images, {part['skipped']} left out)" if part["skipped"] else ""


class Checkpoints:
    """After each epoch: the best student to best/, the state to state.pt; at the end final/."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.best: dict[str, torch.Tensor] | None = None  # kept here only without a directory

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Keep the student if it improved, then the state to go on from."""
        if row.get("improved"):
            if self.out is None:
                self.best = _copy_weights(trainer.captioner)
            else:
                trainer.captioner.save(self.out / "best")
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write what a resumed run needs."""
        if self.out is not None:
            save_state(self.out / STATE, trainer.state_dict())

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write the last student; then the captioner takes the best weights.

        Where no epoch was the best, the last weights are the best there are.
        """
        if trainer.history.interrupted:
            return
        if self.out is not None:
            trainer.captioner.save(self.out / "final")
            if trainer.history.best is None:
                trainer.captioner.save(self.out / "best")
            else:
                _load_weights(trainer.captioner, self.out / "best" / "model.safetensors")
        elif self.best is not None:
            trainer.captioner.load_state_dict(self.best)


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _load_weights(captioner: Captioner, path: Path) -> None:
    """Read what `save` wrote: without what torch.compile adds to names."""
    names = {key.replace("_orig_mod.", ""): key for key in captioner.state_dict()}
    state = {names.get(key, key): value for key, value in read_state_dict(path).items()}
    load_exactly(captioner, state, f"The weights in '{path}'")
