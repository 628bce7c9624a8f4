"""`Trainer`: cross-entropy training of a captioner; `Distiller` adds the teacher.

`terms` and `step` are public, for loops of one's own (see `Stepper`); `fit` is a loop over `step`.
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from capdistill.captioner import Captioner
from capdistill.data.loader import Source
from capdistill.errors import ConfigError
from capdistill.outputs import Batch
from capdistill.runtime import seed_everything
from capdistill.training import callbacks as cb
from capdistill.training.callbacks import Checkpoints
from capdistill.training.checkpoint import (
    STATE,
    describe_run,
    forget_states,
    load_state,
    rehearse_saving,
    restore,
    snapshot,
)
from capdistill.training.config import parse
from capdistill.training.decoder_inputs import require_unknown_word
from capdistill.training.history import EpochSoFar, History, Row
from capdistill.training.sources import prepare_sources, require_usable
from capdistill.training.stepper import Scoring, Stepper, directions, validate

if TYPE_CHECKING:
    from capdistill.metrics import Metric
    from capdistill.training.check import CheckReport


class Trainer(Stepper):
    """Train a captioner by cross-entropy on the reference captions.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> trainer = cd.Trainer(captioner, epochs=1, batch_size=8, device="cpu", progress=False)
        >>> history = trainer.fit(data.train.subset(8))
        >>> history.epochs[0]["step"]
        1

    Args:
        captioner: The model; it is trained in place.
        options: Fields of `TrainConfig`, for instance `epochs=20, label_smoothing=0.1`.

    Attributes:
        metrics: What validation computes: names, or a `Metric` of one's own, whose scores
            `monitor` may name.
        stopping: A callback sets it to end the run after the epoch.

    Raises:
        ConfigError: an unknown option or a value that cannot be.
    """

    def __init__(self, captioner: Captioner, **options: Any) -> None:
        super().__init__(captioner, **options)
        self.metrics: Sequence[str | Metric] = ("bleu", "cider_d")
        self.history = History()
        self.callbacks: list[Any] = []
        self.out: Path | None = None
        self.train_source: Source | None = None
        self.val_source: Source | None = None
        self.so_far = EpochSoFar()
        self.stopping = False
        self._scoring = Scoring()
        self._batches_are_lost = False

    # -- a run ------------------------------------------------------------------------------

    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> History:
        """Train for the configured epochs, validating after each.

        Afterwards the captioner holds the weights of the best epoch by `monitor` (the last ones
        without `val`), in evaluation mode. Ctrl-C finishes the step, saves and returns the history
        with `interrupted` set; a second one stops at once.

        Args:
            train: A capdistill data set, a torch Dataset of (image, captions), or an iterable of
                `Batch`.
            val: The same, with references; without it nothing is scored and none is the best.
            out: Directory of the run: best/, final/, state.pt, history.jsonl, run.json. A run that
                starts anew replaces what an earlier one left there.
            resume: Go on from the state in `out`.
            callbacks: Objects with any of on_fit_start, on_step, on_epoch, on_fit_end. They are
                called before the row is written to the history, and may add to it.
            options: Fields of the configuration, over those of the constructor.

        Raises:
            ConfigError: options or data that cannot work, an `out` that cannot be written.
            DataError: no usable image.
            CheckpointError: nothing to resume.
            NotFiniteLoss: a loss became NaN; the last good checkpoint stays.
        """
        self._begin(train, val, None if out is None else Path(out), resume, callbacks, options)
        with self._session():
            while self.unfinished and not self.history.interrupted:
                for group in self._groups():
                    row = self.step(*group)
                    self._emit("on_step", self.so_far.add(row, len(group)))
                    if self.history.interrupted:
                        break
                else:
                    self._finish_epoch()
            self._end()
        return self.history

    @property
    def unfinished(self) -> bool:
        """Whether the run has epochs left."""
        return self.epoch < self.config.epochs and not self.stopping

    def _begin(
        self,
        train: Any,
        val: Any,
        out: Path | None,
        resume: bool,
        callbacks: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        """Everything that can be wrong is found here, before the first step."""
        self._configure(options)
        self.out = out
        monitor = self._make_monitor(val)
        state = self._open(out, resume)
        self.train_source, self.val_source = prepare_sources(self, train, val)
        self.steps_per_epoch = math.ceil(len(self.train_source) / self.config.accumulation_steps)
        self.epoch = self.step_count = 0
        self.stopping = self._batches_are_lost = False
        self.so_far = EpochSoFar()
        require_usable(self)
        self.callbacks = self._line_up(monitor, callbacks)
        self.optimizer = None
        self._optimizer()
        seed_everything(self.config.seed)
        if state is not None:
            self.load_state_dict(state)
        self._start_files(out, resume)

    def _configure(self, options: Mapping[str, Any]) -> None:
        values = {**self.config.model_dump(exclude_unset=True), **options}
        self.config = parse(self.config_class, values, f"{type(self).__name__}.fit")
        require_unknown_word(self.config, self.captioner.tokenizer)
        self.objective.label_smoothing = self.config.label_smoothing
        self._place()

    def _make_monitor(self, val: Any) -> cb.Monitor | None:
        name, higher = cb.resolve_monitor(self.config.monitor, directions(self.metrics))
        if val is None:
            return None
        return cb.Monitor(name, higher=higher, patience=self.config.patience)

    def _open(self, out: Path | None, resume: bool) -> dict[str, Any] | None:
        """The state to go on from, if any, and an output directory that can be written."""
        if out is None and resume:
            raise ConfigError("resume=True needs out=, the directory of the run to go on with.")
        state = load_state(out / STATE) if out is not None and resume else None
        if out is not None:
            rehearse_saving(self.captioner, out)
        return state

    def _line_up(self, monitor: cb.Monitor | None, callbacks: Sequence[Any]) -> list[Any]:
        """The choice of the best comes first, what is written comes last."""
        best = [] if monitor is None else [cb.BestEpoch(monitor)]
        self._bar = cb.Progress(self.config.progress)
        files = [cb.Recorder(), self._bar]
        self.checkpoints = Checkpoints(self.out)
        return [*best, cb.SkippedImages(), *callbacks, *files, self.checkpoints]

    def _start_files(self, out: Path | None, resume: bool) -> None:
        """Start the history and the run's description, or take up those that are there."""
        if out is None:
            self.history = History()
            return
        if not resume:
            forget_states(out)
        describe_run(self, out)
        self.history = History(out / "history.jsonl", self.step_count if resume else None)

    def _groups(self) -> Iterator[list[Batch]]:
        """The epoch's batches, those done left out, in groups; the last is short.

        Where unreadable images emptied whole batches, numbers of batches do not tell their places.
        """
        assert self.train_source is not None
        done = self.so_far.batches
        start, rest = (0, done) if self._batches_are_lost else (done, 0)
        batches = islice(self.train_source.epoch(self.epoch, start), rest, None)
        while group := list(islice(batches, self.config.accumulation_steps)):
            yield group

    def _finish_epoch(self) -> None:
        """Validate, then let history, choice of the best and checkpoints have the epoch's row."""
        row: Row = {
            "kind": "epoch",
            "epoch": self.epoch,
            "step": self.step_count,
            **self.so_far.row(),
            "skipped": len(self.train_source.skipped) if self.train_source else 0,
            "val": {},
            "scores": {},
        }
        if self.val_source is not None:
            row["val"], row["scores"] = self.validate(self.val_source)
        row["seconds"] = self.so_far.seconds
        self.epoch += 1  # what is saved goes on with the next
        self.so_far = EpochSoFar()
        self._emit("on_epoch", row)

    def _end(self) -> None:
        """Finish the run; or, after Ctrl-C, save where we are and say so."""
        if not self.unfinished:
            self.history.interrupted = False  # it came too late to matter
            self._emit("on_fit_end")
            return
        self.checkpoints.save(self)
        self._emit("on_fit_end")
        where = f"The state is in {self.out}; go on with resume=True."
        nowhere = "Nothing was saved: no out= was given."
        warnings.warn(
            f"Interrupted after step {self.step_count}. {where if self.out else nowhere}",
            stacklevel=3,
        )

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Ctrl-C asks for a stop inside; afterwards the captioner is ready to be used."""

        def stop_soon() -> bool:
            first, self.history.interrupted = not self.history.interrupted, True
            return first

        try:
            with noticing_ctrl_c(stop_soon):
                self._emit("on_fit_start")
                yield
        finally:
            self._bar.close()
            self.captioner.eval()

    def _emit(self, event: str, *row: Row) -> None:
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                handler(self, *row)

    # -- validation and state ---------------------------------------------------------------

    @property
    def scores_measured(self) -> tuple[str, ...]:
        """The scores that validation computes."""
        return tuple(directions(self.metrics))

    def validate(self, source: Source) -> tuple[dict[str, Any], dict[str, float]]:
        """Terms and scores over a source whose batches have references, in evaluation mode.

        Returns:
            `{"loss": ..., "terms": ..., "images": ..., "skipped": ...}`, and the scores of greedy
            captions.
        """
        return validate(self, source)

    def score(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> dict[str, float]:
        """Scores of validation captions; references are prepared once."""
        return self._scoring(references, captions, self.metrics)

    def check(self, train: Any = None, val: Any = None) -> CheckReport:
        """Try one step without changing anything, and say what does not fit and how to mend it.

        Args:
            train: Data as for `fit`; a synthetic batch is used unless given.
            val: The same.
        """
        from capdistill.training.check import check_training

        return check_training(self, train, val)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the data."""
        self._optimizer()
        return snapshot(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: it is of other models or losses.
        """
        self._optimizer()
        restore(self, state)
        self._batches_are_lost = bool(state["skipped"])


@contextmanager
def noticing_ctrl_c(notice: Callable[[], bool]) -> Iterator[None]:
    """Inside, Ctrl-C calls `notice`; what handled it before comes back afterwards.

    Outside the main thread, where Python forbids handlers, nothing is changed.

    Example:
        >>> asked = []
        >>> with noticing_ctrl_c(lambda: not asked and not asked.append("once")):
        ...     signal.raise_signal(signal.SIGINT)
        >>> asked
        ['once']

    Args:
        notice: Whether the request is heeded; False is a KeyboardInterrupt at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if not notice():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:  # None: the handler was not Python's own
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
