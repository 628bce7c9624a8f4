"""One optimizer step and one validation: `Stepper`, the part of `Trainer` below its run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.averaging import WeightAverage
from capdistill.captioner import Captioner
from capdistill.data.source import Source
from capdistill.errors import ConfigError, LossSpike, NotFiniteLoss
from capdistill.metrics.base import Metric, Metrics, listed_metrics
from capdistill.outputs import Batch, CaptionerOutput, LossTerm, part, require_batches
from capdistill.ranks import Ranks
from capdistill.runtime import (
    autocast,
    batch_norms,
    batch_norms_in_eval,
    pick_device,
    pick_precision,
)
from capdistill.training.config import TrainConfig
from capdistill.training.decoder_inputs import noisy_inputs, require_unknown_word
from capdistill.training.distributed import Parallel, misses_some, standing_in, tensors_of, wrap
from capdistill.training.execution import Execution
from capdistill.training.history import EpochMeter, LossMeter, Row, Verdict
from capdistill.training.monitor import Monitor
from capdistill.training.objective import Objective, warn_of_untrained
from capdistill.training.optim import (
    WEIGHTING,
    Scheduler,
    StepGuard,
    make_schedule,
    parameter_groups,
    warn_of_constant_rate,
)
from capdistill.training.sharding import move, move_models, require_shardable
from capdistill.training.validation import PreparedScorer, make_monitor, measured, run_validation


class Stepper:
    """The terms of a batch and the step over one or more: for your own training loop.

    Args:
        captioner: The model; it is trained in place.
        config: Options of the training.

    Attributes:
        steps_per_epoch: Optimizer steps per epoch; `fit` sets it. Set it in your own loop, or the
            learning rate stays constant.
        meter: Sums over the steps since the epoch began.
        average: The average of the trained weights, with `ema_decay`; None without.
        metrics: Metrics that validation computes, as `CaptionScorer` takes them, instead of
            `config.metrics`; `monitor` may name any of their scores.
        parallel: Wraps the trained module for several processes; by default it is
            DistributedDataParallel.
        ranks: The processes that train together.
    """

    config_class: type[TrainConfig] = TrainConfig

    def __init__(self, captioner: Captioner, config: TrainConfig, objective: Objective) -> None:
        require_unknown_word(config, captioner.tokenizer)
        self.config = config
        self.captioner = captioner
        self.objective = objective
        self.loss_options: dict[str, str] = {}  # of each loss, as it was given
        self.start_weights: str | None = None  # digest, where another run must have made them
        self.optimizer: torch.optim.Optimizer | None = None
        self.average: WeightAverage | None = None
        self.schedule: Scheduler
        self._steps_per_epoch: int | None = None
        self._first_step = True  # of the optimizer: what is not trained is reported then
        self.ranks, self._execution = Ranks(), Execution()
        self.parallel: Parallel | None = None
        self._wrapped: nn.Module | None = None  # the objective, as the ranks train it
        self.spare: Batch | None = None  # a batch to run where a rank has none
        self.epoch = self.step_count = 0
        self.meter, self.guard = EpochMeter(), StepGuard()
        self.metrics: Metrics | None = None
        self._scorer = PreparedScorer()
        self.scaler = self._made_scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.place()

    def place(self) -> None:
        """Choose device and precision by the configuration, and move models and losses there."""
        self.device = pick_device(self.config.device)
        self.precision = pick_precision(self.device, self.config.precision)
        if self.scaler is self._made_scaler:  # one that a user assigned stays
            scaled = self.precision == "fp16"
            self.scaler = self._made_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        move_models(self.models, self.device)
        move(self.objective, self.device, self.captioner)
        self._execution.apply(self.models, self.config)
        quantize, compiled = self.config.quantize, self.config.compile
        self.objective.quantize(quantize, compiled, self.models[1:])
        self._batch_norms = batch_norms(self.objective)

    @property
    def models(self) -> list[nn.Module]:
        """The models that read a batch."""
        return [self.captioner]

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch, which the schedule follows; None if unknown."""
        return self._steps_per_epoch

    @steps_per_epoch.setter
    def steps_per_epoch(self, steps: int | None) -> None:
        self._steps_per_epoch = steps
        if self.optimizer is not None:
            done = self.schedule.last_epoch
            self.schedule = make_schedule(self.optimizer, self.config, steps, done)

    @property
    def progress(self) -> float:
        """Share of the run's steps that is done, 0 to 1; 0 if their number is unknown."""
        if self.steps_per_epoch is None:
            return 0.0
        return min(self.step_count / max(self.config.epochs * self.steps_per_epoch, 1), 1.0)

    # -- what a subclass or a user may replace ------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        """Build what must exist before the optimizer and needs a batch; here there is nothing."""

    def prepare_data(self, train: Any) -> None:
        """Take what the run needs of the training data besides batches; here there is nothing.

        `fit` and `check` call it with the data as they were given, before anything is read.
        """

    def prepare_batch(self, batch: Batch) -> Batch:
        """The micro-batch to train on. Called once per micro-batch, before anything is counted.

        Override it to replace captions or images (on-policy captions, mixed sequences): targets
        and counts are those of the batch that it returns.
        """
        return batch

    def teacher_output(self, batch: Batch) -> CaptionerOutput | None:
        """The teacher's output for a batch on the device; a plain trainer has no teacher."""
        return None

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """AdamW. Override it, or assign a function, for another optimizer.

        Args:
            groups: Parameter groups, each with its learning rate and weight decay.
        """
        return torch.optim.AdamW(groups)

    # -- one step -----------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The terms of a batch: forward only, with gradients, for your own loop.

        Args:
            batch: On any device.
        """
        require_batches("terms", [batch])
        self.prepare(batch)
        if self.objective.training:
            batch = self.prepare_batch(batch)
        counts = self.objective.counts(batch)
        return {
            name: LossTerm(value, counts[name], self.objective.weight(name, self.progress))
            for name, value in self._forward(batch).items()
        }

    def step(self, *micro_batches: Batch | None) -> Row:
        """One optimizer step over all the given batches, of all ranks, as if they were one.

        Each term is divided once, by its count over all of them. All ranks call it together; None
        stands for a batch that a rank does not have.

        Returns:
            A row with loss, terms (raw and weighted), learning rates, gradient norm and speed. It
            is empty if no rank has a batch: nothing was done.

        Raises:
            NotFiniteLoss: a term or the gradient is NaN or infinite; nothing was updated.
            LossSpike: the loss jumped, see `on_spike`; nothing was updated.
        """
        began = time.perf_counter()
        given = [batch for batch in micro_batches if batch is not None]
        if given or not micro_batches or self.optimizer is None:
            require_batches("step", given or micro_batches)
        optimizer = self.optimizer or self.make_ready(given[0] if given else None)
        if not (self.objective.training and self.captioner.training):
            self.objective.train()
        self.ranks.reseed(self.config.seed, self.step_count)

        # Counts come first: each term is divided once, by its count over the whole step.
        batches = [batch and self.prepare_batch(batch) for batch in micro_batches]
        counts, images, captions = self._count(batches)
        if not images:
            return {}
        first, self._first_step = self._first_step, False
        if first and self.steps_per_epoch is None:
            warn_of_constant_rate(self.config)
        scale = self.scaler.get_scale()
        weights = self.objective.start_step(self.progress, self.step_count, self.epoch, scale)
        settings = self.objective.settings(self.progress)

        # Forward and backward, one micro-batch after the other.
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        ranks, turns = self.ranks, [b for b in batches if b is not None or self.ranks.several]
        for number, batch in enumerate(turns, 1):
            with ranks.syncing(self.module, last=number == len(turns)):
                raw = self._forward_spare() if batch is None else self._forward(batch, self.module)
                loss = self.objective.total(raw, counts, len(turns) * ranks.world_size)
                # What backward averages over the ranks is a sum.
                self.scaler.scale(loss * ranks.world_size).backward()  # type: ignore[no-untyped-call]
            for name, value in raw.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        ranks.finish_gradients(self.objective.weighting)
        if first and ranks.main:
            warn_of_untrained(self.objective)

        # Clip, then read all numbers in one transfer: the only point where we wait for the device.
        self.scaler.unscale_(optimizer)
        clipped = [group for group in optimizer.param_groups if group["name"] != WEIGHTING]
        parameters = [p for group in clipped for p in group["params"]]
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        *values, norm_value = ranks.numbers([*sums.values()], norm)
        totals = dict(zip(sums, values, strict=True))
        verdict = self._judge(given, totals, norm_value, weights, counts)

        # Update; loss scaling itself skips a step whose gradient overflowed.
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        if verdict != "spike":
            self.scaler.step(optimizer)
        self.scaler.update()
        in_force = self.objective.end_step(weights, totals, counts, ranks.highest)
        if verdict == "good":
            self.schedule.step()
            for average in self.averages.values():
                average.update()
        optimizer.zero_grad(set_to_none=True)
        self.step_count += 1

        self.meter.add(totals, in_force, counts)
        self.meter.count(images, verdict)
        step = LossMeter()
        step.add(totals, in_force, counts)
        seconds = time.perf_counter() - began
        return {
            "kind": "step",
            "step": self.step_count,
            "epoch": self.epoch,
            **step.summary(),
            "weights": in_force,
            "settings": settings,
            "counts": counts,
            "learning_rates": rates,
            "gradient_norm": norm_value,
            "skipped_steps": self.guard.skipped_steps,
            "spike": verdict == "spike",
            "images": images,
            "captions": captions,
            "seconds": seconds,
            "images_per_second": images / seconds,
        }

    def _count(self, batches: Sequence[Batch | None]) -> tuple[dict[str, float], int, int]:
        """The counts of the terms, images and captions, over all batches of all ranks."""
        own = [batch for batch in batches if batch is not None]
        counts = self.objective.counts(*own)
        sizes = sum(b.num_images for b in own), sum(len(b.captions) for b in own)
        *totals, images, captions = self.ranks.total([*counts.values(), *sizes])
        return dict(zip(counts, totals, strict=True)), int(images), int(captions)

    @property
    def module(self) -> nn.Module:
        """The objective as it is trained: several ranks wrap it when the optimizer is made."""
        return self.objective if self._wrapped is None else self._wrapped

    def make_ready(self, batch: Batch | None = None) -> torch.optim.Optimizer:
        """Make optimizer and schedule: after the losses' projectors, before the first step.

        Args:
            batch: A batch of the run; losses that wait for one are built from it.
        """
        if batch is not None:
            self.prepare(batch)
        move(self.objective, self.device, self.captioner)
        self._join(batch)
        groups = parameter_groups(self.objective, self.captioner, self.config)
        self.optimizer = self.make_optimizer(groups)
        self._first_step = True
        self.schedule = make_schedule(self.optimizer, self.config, self.steps_per_epoch)
        decay = self.config.ema_decay
        self.average = None if decay is None else WeightAverage(self.objective, decay)
        return self.optimizer

    def _join(self, batch: Batch | None) -> None:
        """Give all ranks the weights of the main one, and wrap what they train."""
        ranks, objective = self.ranks, self.objective
        ranks.join(self.device)
        self.spare = batch and part(batch, 0, 2)
        ranks.share(tensors_of(objective))
        ranks.share(value for each in self.averages.values() for value in each.average)
        if self.parallel is not None:
            self._wrapped = self._wrapped or wrap(objective, self.parallel)
            require_shardable(objective, self.needs_whole_weights())
        elif ranks.several:
            missed = batch is None or misses_some(objective, partial(self._forward, batch))
            self._wrapped = wrap(objective, unused=ranks.any(missed))

    @property
    def averages(self) -> dict[str, WeightAverage]:
        """Averages of weights that every step updates and that are part of the state."""
        return {} if self.average is None else {"ema": self.average}

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block, the models hold the averaged weights if there is an average."""
        return nullcontext() if self.average is None else self.average.applied()

    def needs_whole_weights(self) -> dict[str, object]:
        """What cannot be combined with weights that are sharded over the ranks, if it is used."""
        learned = [name for name in self.objective.state_dict() if name.startswith("weighting.")]
        own = {"ema_decay": self.config.ema_decay, "quantize": self.config.quantize}
        return {**own, "weights of terms that adapt": learned}

    def _forward_spare(self) -> dict[str, Tensor]:
        """Zeros, by a pass over another batch: a rank without one computes what the others do."""
        if self.spare is None:
            raise ConfigError("step: a rank has no batch in its first step. Give each rank one.")
        with standing_in(self.objective):
            sums = self._forward(self.spare, self.module)
        return {name: 0 * value for name, value in sums.items()}

    def _forward(self, batch: Batch, module: nn.Module | None = None) -> dict[str, Tensor]:
        """The sums of the terms; a single image that batch norm refuses uses running statistics."""
        input_fn, module = None, self.objective if module is None else module
        if self.objective.training and (self.config.word_dropout or self.config.scheduled_sampling):
            input_fn = noisy_inputs(self.captioner, batch, self.config, self.epoch, self.progress)
        batch, progress = batch.to(self.device), self.progress
        alone = [n for n in self._batch_norms if n.training and batch.num_images == 1]
        before = [(buffer, buffer.clone()) for norm in alone for buffer in norm.buffers()]
        with autocast(self.device, self.precision):
            teacher = self.teacher_output(batch)
            try:
                return module(batch, teacher, input_fn, progress)  # type: ignore[no-any-return]
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
            self.meter.running_statistics += 1
            for buffer, value in before:  # some norms have taken part before one refused
                buffer.copy_(value)
            with batch_norms_in_eval(self.objective):
                return module(batch, teacher, input_fn, progress)  # type: ignore[no-any-return]

    def _judge(
        self,
        batches: Sequence[Batch],
        totals: Mapping[str, float],
        norm: float,
        weights: Mapping[str, float | Tensor],
        counts: Mapping[str, float],
    ) -> Verdict:
        """Whether the step may change the weights; if it ends the run, gradients are removed."""
        bad = {name: total for name, total in totals.items() if not math.isfinite(total)}
        scaled, on_spike = self.scaler.is_enabled(), self.config.on_spike
        loss = sum(float(weights[n]) * totals[n] / (counts[n] or 1.0) for n in totals if on_spike)
        where = f"Step {self.step_count + 1} (epoch {self.epoch + 1})"
        images = [image_id for batch in batches for image_id in batch.image_ids]
        try:
            return self.guard.judge(bad, norm, loss, scaled, on_spike, where, images)
        except (NotFiniteLoss, LossSpike):
            self.scaler.update()  # forgets the gradients it looked at
            self.objective.zero_grad(set_to_none=True)
            raise

    # -- validation -----------------------------------------------------------------------------

    def make_monitor(self) -> Monitor:
        """The choice of the best epoch, by the configured score; its metric is measured too."""
        config = self.config
        return make_monitor(config.monitor, config.patience, self._metrics)

    def validate(self, source: Source) -> tuple[dict[str, Any], dict[str, float]]:
        """Terms and scores over a source whose batches have references, in evaluation mode.

        Images without any reference count in the terms alone.

        With `ema_decay`, they are those of the averaged weights.

        Returns:
            `{"loss": ..., "terms": ..., "images": ..., "skipped": ...}`, and the scores of the
            captions by name.

        Raises:
            ConfigError: a batch without references.
            DataError: an image id that occurs twice.
        """
        return run_validation(self, source)

    @property
    def _metrics(self) -> Sequence[str | Metric]:
        own = listed_metrics(self.metrics)
        return self.config.metrics if own is None else own

    def score(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> dict[str, float]:
        """Scores of validation captions by name, if there are any; references are prepared once."""
        return self._scorer(references, captions, measured(self.config.monitor, self._metrics))
