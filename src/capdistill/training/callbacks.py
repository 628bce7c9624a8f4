"""Callbacks: history, checkpoints, progress and other actions between steps.

A callback is any object with some of the methods of `Callback`. `Run` lists what it may use of the
trainer. Callbacks with `state_dict` and `load_state_dict` are part of the state of a run.
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from capdistill.captioner import Captioner
from capdistill.data.source import Source, skipped_images
from capdistill.errors import CheckpointError, ConfigError, suggest
from capdistill.files import printable
from capdistill.progress import on_terminal, report
from capdistill.saving import WEIGHTS, read_weights, saved_file
from capdistill.training.checkpoint import save_state
from capdistill.training.config import NEVER, Interval, TrainConfig
from capdistill.training.history import History, Row
from capdistill.training.monitor import LOSS, Monitor
from capdistill.training.run_directory import BEST_OF, STATE, kept_bests
from capdistill.weights import load_exactly

_PROBLEMS = 20  # most images named in a warning


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

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block, the captioner holds the averaged weights if there is an average."""


class Callback:
    """Base class of callbacks. Every method does nothing: override those that you need.

    Any object with some of these methods is a callback, too; the class saves looking them up. The
    rows are those of `History`, before they are written: a callback may add to them. An exception
    ends the run and is raised.

    Example:
        >>> class StopAt(Callback):
        ...     def on_epoch(self, trainer, row):
        ...         trainer.stopping = row["train"]["loss"] < 1.0
    """

    def on_fit_start(self, trainer: Run) -> None:
        """The run begins or continues; its state is restored and nothing is trained yet."""

    def on_step(self, trainer: Run, row: Row) -> None:
        """An optimizer step is done."""

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """An epoch and its validation are done."""

    def on_fit_end(self, trainer: Run) -> None:
        """The run ends, or was interrupted (`trainer.history.interrupted`)."""

    def close(self) -> None:
        """The run is over, also if by an error: release what is held."""


EVENTS = ("on_fit_start", "on_step", "on_epoch", "on_fit_end")


def check_callbacks(callbacks: Any) -> None:
    """Reject objects that no event would reach.

    Raises:
        ConfigError: not a list of objects, a class instead of an object, or an object without
            events.
    """
    several = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    known = (*EVENTS, "state_dict")
    wrong = [each for each in several if not any(hasattr(each, name) for name in known)]
    wrong += [each for each in several if isinstance(each, type)]
    handlers = [(each, getattr(each, event, None)) for each in several for event in EVENTS]
    wrong += [each for each, handler in handlers if not (handler is None or callable(handler))]
    if wrong or several is not callbacks:
        raise ConfigError(
            f"fit: callbacks={callbacks!r:.200} was given. Expected a list of objects with some of "
            f"{', '.join(EVENTS)}."
        )
    for each in (each for each in several if isinstance(each, Callback)):
        for name in (n for n in dir(each) if n.startswith("on_") and n not in EVENTS):
            kind = type(each).__name__
            raise ConfigError(f"fit: '{name}' of {kind} is no event. {suggest(name, EVENTS)}")


def is_logged(row: Row, config: TrainConfig) -> bool:
    """Whether a step has a row in the history: the first, every `log_every`-th, and spikes."""
    return row["step"] % config.log_every == 0 or row["step"] == 1 or bool(row.get("spike"))


class Recorder(Callback):
    """Write the first and every `log_every`-th step, spikes and every epoch to the history."""

    def on_step(self, trainer: Run, row: Row) -> None:
        """Write the row of every `log_every`-th step, and of every spike."""
        if is_logged(row, trainer.config):
            trainer.history.append(row)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Write the row of an epoch."""
        trainer.history.append(row)


class SkippedImages:
    """Name the images that could not be used, in the epoch's row and as a warning, once each."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What was reported before."""
        return {"known": sorted(self.known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.known = set(state["known"])

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Report the images that were not reported before."""
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
        monitor: Selects the best epoch; None without validation.
        every: How often the state is also saved within an epoch.
        keep: Earlier states that are kept.
        keep_best: Best captioners that are kept.
    """

    def __init__(
        self,
        out: Path | None,
        monitor: Monitor | None = None,
        every: Interval = NEVER,
        keep: int = 1,
        keep_best: int = 1,
    ) -> None:
        self.out, self.monitor, self.every = out, monitor, every
        self.keep, self.keep_best = keep, keep_best
        self.best: dict[str, torch.Tensor] | None = None  # kept here only without a directory
        self.saved = time.monotonic()
        self.has_saved = False

    def on_fit_start(self, trainer: Run) -> None:
        """Load the best student so far, which is needed at the end.

        Raises:
            CheckpointError: it is no longer in the directory, or damaged.
        """
        if self.out is None or self.monitor is None or self.monitor.best_epoch is None:
            return
        try:
            read_weights(saved_file(self.out / "best", WEIGHTS))
        except CheckpointError as error:
            raise CheckpointError(
                f"The best epoch of this run is {self.monitor.best_epoch + 1}, but {self.out}/best "
                f"does not hold its weights ({error}). Restore the directory, or start again with "
                "overwrite=True."
            ) from error

    def on_step(self, trainer: Run, row: Row) -> None:
        """Save the state within an epoch, by steps or by time."""
        steps, seconds = self.every
        due = steps is not None and row["step"] % steps == 0
        if due or (seconds is not None and time.monotonic() - self.saved > seconds):
            self.save(trainer)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Keep the student if it improved, then the state to continue from."""
        if row.get("improved"):
            with trainer.averaged():
                if self.out is None:
                    self.best = _copy_weights(trainer.captioner)
                else:
                    trainer.captioner.save(self.out / "best")
                    self._keep_best(trainer.captioner, row["epoch"] + 1)
        self.save(trainer)

    def _keep_best(self, captioner: Captioner, epoch: int) -> None:
        """Save the captioner under its epoch too, and remove those that are too many."""
        if self.out is None or self.keep_best == 1:
            return
        captioner.save(self.out / f"{BEST_OF}{epoch}")
        epochs = {int(path.name.removeprefix(BEST_OF)): path for path in kept_bests(self.out)}
        for number in sorted(epochs)[: -self.keep_best]:
            shutil.rmtree(epochs[number])

    def save(self, trainer: Run) -> None:
        """Write what a resumed run needs."""
        if self.out is not None:
            first, self.has_saved = not self.has_saved, True
            save_state(self.out / STATE, trainer.state_dict(), self.keep, check=first)
        self.saved = time.monotonic()

    def on_fit_end(self, trainer: Run) -> None:
        """Write the last student; then the captioner takes the best weights.

        If no epoch was the best, the last weights are kept as the best.
        """
        if trainer.history.interrupted:
            return
        chosen = self.monitor is not None and self.monitor.best_epoch is not None
        if self.out is not None:
            trainer.captioner.save(self.out / "final")
            if chosen:
                _load_weights(trainer.captioner, saved_file(self.out / "best", WEIGHTS))
            else:
                trainer.captioner.save(self.out / "best")
        elif self.best is not None:
            trainer.captioner.load_state_dict(self.best)


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _load_weights(captioner: Captioner, path: Path) -> None:
    """Read what `save` wrote: without the prefixes of torch.compile."""
    names = {key.replace("_orig_mod.", ""): key for key in captioner.state_dict()}
    state = {names.get(key, key): value for key, value in read_weights(path).items()}
    load_exactly(captioner, state, f"The weights in '{path}'")


class Progress(Callback):
    """A bar on a terminal, lines elsewhere; a description before and a summary after the run.

    Args:
        show: None shows a bar on a terminal only; False shows nothing.
        monitor: Named in the summary.
    """

    def __init__(self, show: bool | None, monitor: Monitor | None = None) -> None:
        self.bar_wanted = on_terminal() if show is None else show
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
        kind = "reward" if "reward" in row else "loss"  # the loss of a reward is 0 on average
        shown = {"epoch": row["epoch"] + 1, kind: f"{row[kind]:.3f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Report the epoch in one line."""
        if self.lines_wanted:
            monitored = None if self.monitor is None else self.monitor.name
            self._write(describe_epoch(row, trainer.config.epochs, monitored))
            if "profile" in row:
                shares = [
                    f"{k} {share:.0%}" for k, share in row["profile"].items() if share >= 0.005
                ]
                self._write(f"  time    {', '.join(shares)}")

    def on_fit_end(self, trainer: Run) -> None:
        """Report why the run ended and what was kept."""
        self.close()
        if self.lines_wanted:
            self._write("\n".join(_describe_end(trainer, self.monitor)))

    def close(self) -> None:
        """Remove the bar, also if the run ended with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _write(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(printable(text, sys.stderr), file=sys.stderr)
        else:
            report(text)


def describe_epoch(row: Row, epochs: int, monitored: str | None = None) -> str:
    """One line of at most 80 columns about an epoch, aligned with the lines of other epochs.

    The reward of the samples, where there is one, stands in place of the losses.

    Example:
        >>> row = {"epoch": 0, "seconds": 3.0, "train": {"loss": 2.5}, "images": 6, "skipped": 5,
        ...        "val": {"loss": 2.7, "images": 2, "skipped": 0}, "improved": True,
        ...        "scores": {"bleu_4": 0.02, "cider_d": 0.31}}
        >>> print(describe_epoch(row, 30, "cider_d"))
        epoch  1/30  train  2.5000  val  2.7000  cider_d 0.3100 best      3 s  (5 left out)

    Args:
        row: The epoch's row.
        epochs: Number of epochs of the whole run.
        monitored: The score to show; the last one by default.
    """
    width = len(str(epochs))
    train, line = row["train"], f"epoch {row['epoch'] + 1:>{width}}/{epochs}  "
    rewarded = "reward" in train  # then the losses tell little
    line += f"reward {train['reward']:7.4f}" if rewarded else f"train {train['loss']:7.4f}"
    if row["val"] and not rewarded:
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


@contextmanager
def handle_interrupt(notice: Callable[[int], bool]) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM call `notice`; the handlers before come back after it.

    Outside the main thread, where Python forbids handlers, nothing is changed.

    Example:
        >>> asked = []
        >>> with handle_interrupt(lambda number: not asked and not asked.append(number)):
        ...     signal.raise_signal(signal.SIGINT)
        >>> asked == [signal.SIGINT]
        True

    Args:
        notice: Takes the number of the signal and returns whether the request is heeded; if not,
            the handler before is called, or it is a KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if notice(number):
            return
        earlier = before[signal.Signals(number)]
        if callable(earlier):
            earlier(number, frame)
        raise KeyboardInterrupt

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, ask) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            default = signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL
            signal.signal(kind, default if handler is None else handler)  # None: not Python's own
