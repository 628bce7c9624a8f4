"""`Trainer`: cross-entropy training of a captioner; `Distiller` adds the teacher.

`terms` and `step` are public, for loops of one's own; `fit` is a loop over `step`.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner, evaluating
from capdistill.errors import ConfigError, DataError, NotFiniteLoss
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, LossTerm
from capdistill.training import callbacks as cb
from capdistill.training.checkpoint import STATE, Checkpoints, load_state
from capdistill.training.config import TrainConfig, parse
from capdistill.training.history import History, Row
from capdistill.training.objective import Objective, Weight
from capdistill.training.optim import Scheduler, make_schedule, parameter_groups
from capdistill.training.run import describe_run, prepare_sources
from capdistill.training.runtime import autocast, pick_device, pick_precision, seed_everything
from capdistill.training.source import Source
from capdistill.training.tally import Tally

if TYPE_CHECKING:
    from capdistill.training.check import CheckReport


class Trainer:
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

    Raises:
        ConfigError: an unknown option or a value that can not be.
    """

    config_class: type[TrainConfig] = TrainConfig

    def __init__(self, captioner: Captioner, **options: Any) -> None:
        self.config = parse(self.config_class, options, type(self).__name__)
        self.captioner = captioner
        self.objective = self._make_objective({}, {"ce": 1.0})
        self.history = History()
        self.callbacks: list[Any] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps_per_epoch = 1
        self.step_count = 0
        self.epoch = 0
        self.stopping = False

    def _make_objective(
        self, losses: Mapping[str, DistillationLoss], weights: Mapping[str, Weight]
    ) -> Objective:
        return Objective(self.captioner, losses, weights, self.config.label_smoothing)

    # -- one step ---------------------------------------------------------------------------

    def terms(self, batch: Batch, counts: Mapping[str, float] | None = None) -> dict[str, LossTerm]:
        """The terms of a batch: forward only, with gradients, for a loop of one's own.

        Args:
            batch: On any device.
            counts: What each sum is divided by; the batch's own unless given.
        """
        counts = counts or self.objective.counts(batch)
        batch = batch.to(self.device)
        with autocast(self.device, self.precision):
            sums = self.objective(batch, self.teach(batch))
        return {
            name: LossTerm(value, counts[name], self.objective.weight(name, self.progress))
            for name, value in sums.items()
        }

    def teach(self, batch: Batch) -> CaptionerOutput | None:
        """What the teacher says of a batch; a plain trainer has none."""
        return None

    def step(self, *micro_batches: Batch) -> Row:
        """One optimizer step over all the given batches, as if they were one.

        Each term is divided once by its count over all of them.

        Returns:
            A row with loss, terms (raw and weighted), learning rates, gradient norm and speed.

        Raises:
            NotFiniteLoss: a term is NaN or infinite; nothing was updated.
        """
        began = time.perf_counter()
        optimizer = self._optimizer()
        self.objective.train()
        optimizer.zero_grad(set_to_none=True)
        counts = total_counts(self.objective, micro_batches)
        tally = Tally()
        for batch in micro_batches:
            terms = self.terms(batch, counts)
            loss = total(terms)
            self._require_finite(loss, terms)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            tally.add(terms)
        norm = self._update(optimizer)
        seconds = time.perf_counter() - began
        images = sum(batch.num_images for batch in micro_batches)
        return self._step_row(tally, counts, norm, seconds, images)

    def _update(self, optimizer: torch.optim.Optimizer) -> float:
        """Clip, step the optimizer and the schedule; the gradient norm before clipping."""
        self.scaler.unscale_(optimizer)
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # a step that overflowed in fp16 does not count
            self.schedule.step()
        optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return float(norm)

    def _require_finite(self, loss: Tensor, terms: Mapping[str, LossTerm]) -> None:
        if bool(torch.isfinite(loss)):
            return
        bad = [name for name, term in terms.items() if not bool(torch.isfinite(term.sum))]
        raise NotFiniteLoss(
            f"Step {self.step_count + 1} (epoch {self.epoch}): the loss is {float(loss)}; not "
            f"finite: {', '.join(bad) or 'the weighted sum'}. The weights were not changed by "
            "this step and the last checkpoint is intact. Try a smaller learning_rate, clip=, or "
            "precision='fp32'."
        )

    def _step_row(
        self, tally: Tally, counts: Mapping[str, float], norm: float, seconds: float, images: int
    ) -> Row:
        terms = tally.means(counts)
        return {
            "kind": "step",
            "step": self.step_count,
            "epoch": self.epoch,
            "loss": sum(term["weighted"] for term in terms.values()),
            "terms": terms,
            "counts": dict(counts),
            "learning_rates": {g["name"]: g["lr"] for g in self._optimizer().param_groups},
            "gradient_norm": norm,
            "seconds": seconds,
            "images": images,
            "images_per_second": images / seconds,
        }

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
            out: Directory of the run: best/, final/, state.pt, history.jsonl, run.json.
            resume: Go on from the state in `out`.
            callbacks: Objects with any of on_fit_start, on_step, on_epoch, on_fit_end.
            options: Fields of the configuration, over those of the constructor.

        Raises:
            ConfigError: options or data that can not work, an `out` that can not be written.
            DataError: no usable image.
            CheckpointError: nothing to resume.
            NotFiniteLoss: a loss became NaN; the last good checkpoint stays.
        """
        self._begin(train, val, None if out is None else Path(out), resume, callbacks, options)
        with self._session():
            while self.epoch < self.config.epochs and not self.stopping:
                for group in self._groups():
                    self._emit("on_step", self._counted(self.step(*group)))
                    if self.history.interrupted:
                        return self._leave()
                self._finish_epoch()
            self._emit("on_fit_end")
        return self.history

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
        self.train_source, self.val_source = prepare_sources(self, train, val)
        self.steps_per_epoch = math.ceil(len(self.train_source) / self.config.accumulate)
        self._prepare(next(self.train_source.epoch(0), None))
        self.optimizer = None
        self._optimizer()
        self.epoch = self.step_count = 0
        self.stopping = False
        self._epoch_began, self._epoch_images, self._skip = time.perf_counter(), 0, 0
        self._train_tally, self._train_counts = Tally(), dict[str, float]()
        self.checkpoints = Checkpoints(out)
        best = [] if monitor is None else [cb.BestEpoch(monitor)]
        progress = cb.Progress(self.config.progress)
        self.callbacks = [*best, cb.Recorder(), *callbacks, progress, self.checkpoints]
        self._open(out, resume)

    def _configure(self, options: Mapping[str, Any]) -> None:
        values = {**self.config.model_dump(exclude_unset=True), **options}
        self.config = parse(self.config_class, values, f"{type(self).__name__}.fit")
        self.objective.label_smoothing = self.config.label_smoothing
        seed_everything(self.config.seed)
        self._place()

    def _place(self) -> None:
        """Choose device and precision, and move there what is trained."""
        self.device = pick_device(self.config.device)
        self.precision = pick_precision(self.device, self.config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.objective.to(self.device)

    def _make_monitor(self, val: Any) -> cb.Monitor | None:
        from capdistill.metrics import DIRECTIONS

        directions = {key: DIRECTIONS[key] == "higher" for key in self.scores_measured}
        name, higher = cb.resolve_monitor(self.config.monitor, directions)
        if val is None:
            return None
        return cb.Monitor(name, higher=higher, patience=self.config.patience)

    def _prepare(self, batch: Batch | None) -> None:
        """Look at the first batch before the optimizer exists."""
        if batch is None:
            raise DataError(
                f"No usable training image: {self.train_source.skipped or 'the data are empty'}."
            )

    def _open(self, out: Path | None, resume: bool) -> None:
        """Start the history and the run's description, or take up those that are there."""
        if resume and out is None:
            raise ConfigError("resume=True needs out=, the directory of the run to go on with.")
        if resume and out is not None:
            self.load_state_dict(load_state(out / STATE))
        if out is not None:
            describe_run(self, out)
        self.history = History(
            None if out is None else out / "history.jsonl", self.step_count if resume else None
        )

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of the epoch in groups of `accumulate`; the last may be short."""
        batches = islice(self.train_source.epoch(self.epoch), self._skip, None)
        self._skip = 0
        while group := list(islice(batches, self.config.accumulate)):
            yield group

    def _counted(self, row: Row) -> Row:
        """Add a step to the epoch's sums, which weigh every token alike."""
        self._train_tally.add_row(row)
        for name, count in row.pop("counts").items():
            self._train_counts[name] = self._train_counts.get(name, 0.0) + count
        self._epoch_images += row["images"]
        return row

    def _finish_epoch(self) -> None:
        """Validate, then let history, choice of the best and checkpoints have the epoch's row."""
        trained = time.perf_counter() - self._epoch_began
        row: Row = {
            "kind": "epoch",
            "epoch": self.epoch,
            "step": self.step_count,
            "train": self._train_tally.summary(self._train_counts),
            "val": {},
            "scores": {},
            "skipped": len(self.train_source.skipped),
            "images": self._epoch_images,
            "images_per_second": self._epoch_images / trained,
        }
        if self.val_source is not None:
            row["val"], row["scores"] = self.validate(self.val_source)
        row["seconds"] = time.perf_counter() - self._epoch_began
        self.epoch += 1  # what is saved goes on with the next
        self._train_tally, self._train_counts = Tally(), {}
        self._epoch_began, self._epoch_images = time.perf_counter(), 0
        self._emit("on_epoch", row)

    @property
    def scores_measured(self) -> tuple[str, ...]:
        """The scores that validation computes."""
        return ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d")

    def validate(self, source: Source) -> tuple[dict[str, Any], dict[str, float]]:
        """Terms and scores over a source whose batches have references, in evaluation mode.

        Returns:
            `{"loss": ..., "terms": ...}`, and the scores of greedy captions.
        """
        tally, counts = Tally(), dict[str, float]()
        said: dict[str, str] = {}
        references: dict[str, tuple[str, ...]] = {}
        with evaluating(self.objective), torch.no_grad():
            for batch in source.epoch(0):
                for name, count in self.objective.counts(batch).items():
                    counts[name] = counts.get(name, 0.0) + count
                batch = batch.to(self.device)
                tally.add(self.terms(batch))
                said |= self._say(batch)
                references |= _references(batch)
        return tally.summary(counts), self.score(references, said)

    def _say(self, batch: Batch) -> dict[str, str]:
        with autocast(self.device, self.precision):
            hypotheses = self.captioner.generate(batch)
        texts = (hypothesis.text for hypothesis in hypotheses)
        return dict(zip(batch.image_ids, texts, strict=True))

    def score(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> dict[str, float]:
        """Scores of validation captions; references are prepared once."""
        from capdistill.metrics import CaptionScorer

        ids = tuple(references)
        if getattr(self, "_scored_ids", None) != ids:
            self._scored_ids = ids
            self._scorer = CaptionScorer(references, metrics=("bleu", "cider_d"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = self._scorer(captions)
        return {name: float(scores[name]) for name in self.scores_measured}

    def check(self, train: Any = None, val: Any = None) -> CheckReport:
        """Try one step without changing anything, and say what does not fit and how to mend it.

        Args:
            train: Data as for `fit`; a synthetic batch is used unless given.
            val: The same.
        """
        from capdistill.training.check import check_training

        return check_training(self, train, val)

    # -- state ------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """The share of the run's steps that is done, 0 to 1."""
        return min(self.step_count / max(self.config.epochs * self.steps_per_epoch, 1), 1.0)

    @property
    def models(self) -> list[nn.Module]:
        """The models that read a batch."""
        return [self.captioner]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the data."""
        optimizer = self._optimizer()
        return {
            "objective": self.objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": _random_state(),
            "epoch": self.epoch,
            "step": self.step_count,
            "done_in_epoch": self._batches_done(),
            "tally": [self._train_tally.state_dict(), self._train_counts, self._epoch_images],
            "callbacks": [c.state_dict() for c in self.callbacks if hasattr(c, "state_dict")],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.objective.load_state_dict(state["objective"])
        self._optimizer().load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        _restore_random(state["random"])
        self.epoch, self.step_count = state["epoch"], state["step"]
        self._skip = state["done_in_epoch"]
        tally, self._train_counts, self._epoch_images = state["tally"]
        self._train_tally.load_state_dict(tally)
        stateful = [c for c in self.callbacks if hasattr(c, "state_dict")]
        for callback, saved in zip(stateful, state["callbacks"], strict=False):
            callback.load_state_dict(saved)

    def _batches_done(self) -> int:
        """Batches of the current epoch that have been trained on."""
        steps = self.step_count - self.epoch * self.steps_per_epoch
        return max(steps, 0) * self.config.accumulate

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW and its schedule, made when first needed: after the losses' projectors."""
        if self.optimizer is None:
            if not hasattr(self, "device"):
                self._place()
            groups = parameter_groups(self.objective, self.captioner, self.config)
            self.optimizer = torch.optim.AdamW(groups)
            self.schedule: Scheduler = make_schedule(
                self.optimizer, self.config, self.steps_per_epoch
            )
        return self.optimizer

    def _emit(self, event: str, *row: Row) -> None:
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                handler(self, *row)

    def _leave(self) -> History:
        """Ctrl-C: save where we are and say so."""
        self.checkpoints.save(self)
        where = (
            f"The state is in {self.out}; go on with resume=True."
            if self.out
            else ("Nothing was saved: no out= was given.")
        )
        warnings.warn(f"Interrupted after step {self.step_count}. {where}", stacklevel=3)
        self._emit("on_fit_end")
        return self.history

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Ctrl-C asks for a stop inside; afterwards the captioner is ready to be used."""

        def ask(number: int, frame: Any) -> None:
            if self.history.interrupted:
                raise KeyboardInterrupt
            self.history.interrupted = True

        before = _take_signal(ask)
        self._emit("on_fit_start")
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
            self.captioner.eval()


def _take_signal(handler: Any) -> Any:
    """Handle Ctrl-C ourselves where that is allowed; what handled it before, or None."""
    try:
        return signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread
        return None


def total(terms: Mapping[str, LossTerm]) -> Tensor:
    """The objective: the sum of the weighted means."""
    return torch.stack([term.weighted for term in terms.values()]).sum()


def total_counts(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """Each term's count over all batches of a step."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    return counts


def _references(batch: Batch) -> dict[str, tuple[str, ...]]:
    if batch.references is None:
        raise ConfigError(
            "A validation batch has no references. Scores against truncated or unknown-word ids "
            "would mislead: give Batch(references=...) with the raw captions of every image."
        )
    return dict(zip(batch.image_ids, batch.references, strict=True))


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
