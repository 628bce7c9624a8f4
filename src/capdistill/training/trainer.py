"""`Trainer`: cross-entropy training of a captioner; `Distiller` adds the teacher.

`terms` and `step` are public, for your own loops (see `Stepper`); `fit` is a loop over `step`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from capdistill.captioner import Captioner
from capdistill.data.loader import Loader
from capdistill.data.rows import accept_rows
from capdistill.data.source import numbered_batches, part_of
from capdistill.data.workers import naming_lost_workers
from capdistill.errors import ConfigError, LossSpike, NotFiniteLoss, require_bool
from capdistill.files import DirectoryLock
from capdistill.outputs import Batch
from capdistill.runtime import drawn, evaluating, isolated, seed_everything
from capdistill.training.callbacks import (
    Callback,
    Checkpoints,
    SkippedImages,
    check_callbacks,
    handle_interrupt,
)
from capdistill.training.checkpoint import load_state, restore, restore_frozen, snapshot
from capdistill.training.config import (
    NEVER,
    SelfCriticalOptions,
    TrainConfig,
    TrainOptions,
    parse_interval,
)
from capdistill.training.decoder_inputs import require_unknown_word
from capdistill.training.distributed import Parallel, tensors_of
from capdistill.training.execution import PLACING
from capdistill.training.failed_step import explained
from capdistill.training.history import HISTORY, EpochMeter, History, Row
from capdistill.training.loggers import writers
from capdistill.training.monitor import BestEpoch, Monitor, is_complete
from capdistill.training.objective import Objective
from capdistill.training.optim import StepGuard
from capdistill.training.run_directory import (
    STATE,
    Resume,
    check_can_save,
    clear_directory,
    describe_run,
    identity,
    open_directory,
    run_lines,
)
from capdistill.training.sharding import any_sharded, gathered
from capdistill.training.sources import (
    close_workers,
    number_of_batches,
    open_sources,
    require_usable,
)
from capdistill.training.step import Stepper

if TYPE_CHECKING:
    from capdistill.data.source import Source
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
        config: A `TrainConfig` as a whole.
        options: Fields of `TrainConfig`, instead of those of `config`, for instance
            `epochs=20, label_smoothing=0.1`.

    Attributes:
        metrics: Metrics that validation computes, as `CaptionScorer` takes them, instead of
            `config.metrics`; `monitor` may name any of their scores.
        stopping: A callback sets it to end the run after the epoch.

    Raises:
        ConfigError: an unknown option, an invalid value, or a model that is not a `Captioner`.
    """

    def __init__(
        self,
        captioner: Captioner,
        config: TrainConfig | None = None,
        **options: Unpack[TrainOptions],
    ) -> None:
        if not isinstance(captioner, Captioner):
            raise ConfigError(
                f"{type(self).__name__} was given {type(captioner).__name__} to train. Give a "
                "Captioner (compile=True compiles it); others can be teachers (cd.teachers: wrap)."
            )
        config = self.config_class.resolve(config, options, type(self).__name__)
        objective = Objective(captioner, {}, {"ce": 1.0}, config.label_smoothing)
        super().__init__(captioner, config, objective)
        self.history = History()
        self.callbacks: list[Any] = []
        self.checkpoints = Checkpoints(None)
        self.train_source: Source | None = None
        self.val_source: Source | None = None
        self.stopping = False
        self._identity: dict[str, Any] | None = None
        self.cached = False  # whether the training batches carry cached features

    # -- a run ----------------------------------------------------------------------------------

    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        out: str | Path | None = None,
        resume: Resume = False,
        overwrite: bool = False,
        accept_changes: bool = False,
        callbacks: Sequence[Any] = (),
        parallel: Parallel | None = None,
        **options: Unpack[SelfCriticalOptions],  # of all trainers; others' are refused
    ) -> History:
        """Train for the configured epochs, validating after each.

        Afterwards the captioner holds the weights of the best epoch by `monitor` (the last ones
        without `val`), in evaluation mode. Ctrl-C and SIGTERM finish the step, save and return the
        history with `interrupted` set; a second Ctrl-C stops at once.

        Args:
            train: A capdistill data set, a Hugging Face one, a torch Dataset of (image, captions),
                an iterable of `Batch`, or anything with `epoch(n, start)`, which is used as it is.
            val: The same, with references. Without it nothing is scored and no epoch is the best.
            out: Directory of the run: best/, final/, state.pt, history.jsonl, run.json.
            resume: True continues from the state in `out`; "auto" does so if there is one.
            overwrite: Replace the results of an earlier run in `out`; otherwise they are an error.
            accept_changes: Resume although losses, weights, teacher or data have changed.
            callbacks: Objects with some of the methods of `capdistill.training.Callback`. They are
                called before the row is written to the history, and may add to it.
            parallel: For several processes: wraps the trained module, `fully_shard` for instance,
                in the place of DistributedDataParallel. Kept in the attribute `parallel`.
            options: Fields of the configuration; they apply to this fit only.

        Raises:
            ConfigError: invalid options or data; `out` holds a run, is in use or not writable.
            DataError: no usable image.
            CheckpointError: nothing to resume, or a state of another run.
            NotFiniteLoss: a loss became NaN; the last good checkpoint stays, and the step is in
                failed_step.pt, from which `replay_step` runs it again.
            LossSpike: the loss jumped and `on_spike` is "stop"; the same.
            RankFailed: another process of the training failed.
        """
        check_callbacks(callbacks)
        require_bool("fit: accept_changes", accept_changes)
        self.parallel = parallel or self.parallel
        settings, ranks = self._options(options), self.ranks
        with isolated(), settings, ranks.failing_together(), DirectoryLock() as lock:
            # What can be wrong is found before the first step.
            ranks.join(self.device)
            monitor = self.make_monitor()  # refuses a score that nothing measures
            directory, state = self._open_directory(out, resume, overwrite, lock)
            first = self._open_data(train, val)
            chose = state is not None and "BestEpoch.0" in state["callbacks"]
            monitored = monitor if val is not None or chose else None
            self.callbacks = self._make_callbacks(directory, monitored, callbacks)
            self._begin(first, directory, state, accept_changes)
            with self._session():
                going_on = True
                while going_on and self.epoch < self.config.epochs and not self.stopping:
                    going_on = self._train_epoch()
                self._finish()
        return self.history

    def _open_directory(
        self, out: str | Path | None, resume: Resume, overwrite: bool, lock: DirectoryLock
    ) -> tuple[Path | None, dict[str, Any] | None]:
        """The directory, which belongs to rank 0, and the state to continue from."""
        on_main = self.ranks.on_main
        directory, resumes = on_main(open_directory, out, resume, overwrite, lock)
        state = None
        if directory is not None:
            state = on_main(load_state, directory / STATE) if resumes else None
            on_main(check_can_save, self.captioner, directory, lock)
        if state is not None:
            restore_frozen(self, state)
        return (directory if self.ranks.main else None), state

    def _open_data(self, train: Any, val: Any) -> Batch:
        """Set the sources of this rank; the first batch of training."""
        train, val, ranks = accept_rows(train), accept_rows(val), self.ranks
        ranks.share(tensors_of(self.objective))
        self.prepare_data(train)
        whole, held_out = open_sources(self, train, val)
        first = require_usable(self, whole, held_out)
        self.train_source = part_of(whole, ranks.rank, ranks.world_size)
        self.val_source = held_out and part_of(held_out, ranks.rank, ranks.world_size)
        self.cached = isinstance(self.train_source, Loader) and self.train_source.has_caches
        return first

    def _begin(
        self, first: Batch, out: Path | None, state: dict[str, Any] | None, accept_changes: bool
    ) -> None:
        """A fresh run, or the state of the one to continue."""
        assert self.train_source is not None
        batches = number_of_batches(self.train_source)
        self.steps_per_epoch = math.ceil(batches / self.config.accumulation_steps)
        self.epoch = self.step_count = 0
        self.meter, self.guard, self.stopping = EpochMeter(), StepGuard(), False
        self.history = History()
        self.make_ready(first)
        if any_sharded(self.objective):
            self.checkpoints.every = NEVER  # within an epoch: rank 0 alone cannot save
        self._identity = identity(self, self.train_source, self.val_source)
        if self.ranks.several:
            self.ranks.require_equal(self._identity)
        seed_everything(self.config.seed)
        if state is not None:
            self.load_state_dict(state, accept_changes=accept_changes)
        if out is not None:
            clear_directory(out, keep_results=state is not None)
            if state is None or not is_complete(self.epoch, self.config.epochs, self.callbacks):
                describe_run(self, self.train_source, out)
            keep_until = self.step_count if state is not None else None
            self.history = History(out / HISTORY, keep_until, self.epoch)
        if state is None:
            self._save()  # a run that is killed early can be resumed

    def _train_epoch(self) -> bool:
        """The steps of an epoch that are not done, and its end; False where it is interrupted."""
        assert self.train_source is not None
        # None is in the place of a batch that this rank does not have.
        batches = numbered_batches(self.train_source, self.epoch, self.meter.position)
        while micro_batches := list(islice(batches, self.config.accumulation_steps)):
            self.meter.position += len(micro_batches)
            before = drawn()
            try:
                row = self.step(*micro_batches)
            except (NotFiniteLoss, LossSpike) as error:
                raise explained(error, self, micro_batches, before) from error
            if row:
                self._emit("on_step", row)
            if self.ranks.interrupted(self.history):
                return False
        self._finish_epoch()
        return not self.ranks.interrupted(self.history)

    def _finish_epoch(self) -> None:
        """Validate; then the callbacks choose the best, write the history and save."""
        row: Row = {
            "kind": "epoch",
            "epoch": self.epoch,
            "step": self.step_count,
            **self.meter.row(),
            "weights": {n: self.objective.weight(n, self.progress) for n in self.objective.weights},
            "settings": self.objective.settings(self.progress),
            "skipped": self.ranks.gather_problems(self.train_source),
            "val": {},
            "scores": {},
        }
        if self.val_source is not None:
            row["val"], row["scores"] = self.validate(self.val_source)
        row["seconds"] = self.meter.seconds
        self.epoch += 1  # what is saved continues with the next
        self.meter = EpochMeter()
        self._emit("on_epoch", row)

    def _finish(self) -> None:
        """End the run; or, where it was interrupted, save where it is."""
        done = self.epoch >= self.config.epochs
        over = done or self.stopping
        if over:
            if self.average is not None:
                self.average.assign()  # what is kept from here on
            self.history.complete(self.config.epochs if done else None)
        else:
            self.history.stopped = f"interrupted after step {self.step_count}"
            self._save()
            out = self.checkpoints.out
            kept = f"The state is in {out}; continue with resume=True."
            kept = kept if out else "Nothing was saved: no out= was given."
            if self.ranks.main:
                warnings.warn(f"Interrupted after step {self.step_count}. {kept}", stacklevel=3)
        self._emit("on_fit_end")
        self.ranks.share(tensors_of(self.captioner))  # rank 0 has loaded the best
        if over and self.average is not None:
            self.average.restart()  # the captioner holds the kept weights
        self.history.end(self.epoch, self.step_count)
        ended = self.ranks.on_main(lambda: (self.history.rows, self.history.stopped))
        self.history.rows, self.history.stopped = ended

    def _make_callbacks(
        self, out: Path | None, monitor: Monitor | None, callbacks: Sequence[Any]
    ) -> list[Any]:
        """The choice of the best comes first; files come last."""
        config = self.config
        best = [] if monitor is None else [BestEpoch(monitor)]
        every = parse_interval(config.save_every)
        self.checkpoints = Checkpoints(out, monitor, every, config.keep, config.keep_best)
        files = writers(config.log, config.progress, config.profile, monitor, self.checkpoints)
        return [*best, SkippedImages(), *callbacks, *files] if self.ranks.main else []

    @contextmanager
    def _options(self, options: Mapping[str, Any]) -> Iterator[None]:
        """The options of a fit, in force inside the block only."""
        before = self.config
        self.config = self.config_class.resolve(before, options, f"{type(self).__name__}.fit")
        try:
            self.check_options()
            self.objective.label_smoothing = self.config.label_smoothing
            self.place()
            yield
        finally:
            used, self.config = self.config, before
            self.objective.label_smoothing = before.label_smoothing
            if any(getattr(used, name) != getattr(before, name) for name in PLACING):
                self.place()

    def check_options(self) -> None:
        """Refuse options that do not fit the models, at construction and at each fit.

        Raises:
            ConfigError: with the reason and the fix.
        """
        require_unknown_word(self.config, self.captioner.tokenizer)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Training mode, and Ctrl-C asks for a stop; afterwards the captioner can be used."""

        def stop_soon(number: int) -> bool:
            first, self.history.interrupted = not self.history.interrupted, True
            self.history.signal = self.history.signal or number
            return first

        try:
            with evaluating(*self.models[1:]), handle_interrupt(stop_soon), naming_lost_workers():
                self.objective.train()
                self._emit("on_fit_start")
                yield
        finally:
            close_workers(self.train_source, self.val_source)
            for callback in self.callbacks:
                if isinstance(callback, Callback):
                    callback.close()
            self.objective.release()

    def __repr__(self) -> str:
        models = " <- ".join(repr(getattr(m, "name", type(m).__name__)) for m in self.models)
        terms, epochs = ", ".join(self.objective.weights), self.config.epochs
        return (
            f"<{type(self).__name__} {models}, terms {terms}, {epochs} epoch{'s' * (epochs != 1)}, "
            f"{self.device} in {self.precision}>"
        )

    def _emit(self, event: str, *row: Row) -> None:
        """Call the callbacks, on rank 0; outside of steps they see whole weights and may stop."""
        handlers = [getattr(callback, event, None) for callback in self.callbacks]
        step, end = event == "on_step", event == "on_fit_end"
        with nullcontext() if step else gathered(self.objective, self.optimizer, keep=end):
            for handler in filter(None, handlers):
                handler(self, *row)
        self.stopping = self.stopping if step else self.ranks.on_main(lambda: self.stopping)

    def _save(self) -> None:
        """Save the state, on rank 0."""
        with gathered(self.objective, self.optimizer):
            self.checkpoints.save(self)

    def describe(self) -> list[str]:
        """Lines about the run: models, data, terms and rates."""
        return run_lines(self, self.train_source, self.val_source)

    # -- validation and state -------------------------------------------------------------------

    def check(self, train: Any = None, val: Any = None) -> CheckReport:
        """Try one step without changing anything; report what does not fit and how to fix it.

        Args:
            train: Data as for `fit`; a synthetic batch is used unless given.
            val: The same.
        """
        from capdistill.training.check import check_training

        return check_training(self, train, val)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the data."""
        if self.optimizer is None:
            self.make_ready()
        who = self._identity or identity(self, self.train_source, self.val_source)
        return snapshot(self, self.train_source, self.callbacks, who)

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: it is of other models, losses or data.
        """
        if self.optimizer is None:
            self.make_ready()
        who = self._identity or identity(self, self.train_source, self.val_source)
        with gathered(self.objective, self.optimizer, keep=True):
            restore(self, state, self.train_source, self.callbacks, who, accept_changes)
