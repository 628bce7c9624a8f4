"""One optimizer step: `Stepper`, the part of `Trainer` below its run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.data.loader import Source
from capdistill.errors import ConfigError, DataError, NotFiniteLoss
from capdistill.losses.base import DistillationLoss
from capdistill.metrics import CaptionScorer, Metric
from capdistill.outputs import Batch, CaptionerOutput, LossTerm
from capdistill.runtime import autocast, evaluating, pick_device, pick_precision
from capdistill.training.config import TrainConfig, parse
from capdistill.training.decoder_inputs import AlteredInputs, altered_inputs, require_unknown_word
from capdistill.training.history import Row, Tally
from capdistill.training.objective import Objective, Weight
from capdistill.training.optim import Scheduler, make_schedule, parameter_groups

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


class Stepper:
    """The terms of a batch and the step over one or more: what a loop of one's own needs.

    Args:
        captioner: The model; it is trained in place.
        options: Fields of `config_class`.
    """

    config_class: type[TrainConfig] = TrainConfig

    def __init__(self, captioner: Captioner, **options: Any) -> None:
        self.config = parse(self.config_class, options, type(self).__name__)
        self.captioner = captioner
        require_unknown_word(self.config, captioner.tokenizer)
        self.objective = self._make_objective({}, {"ce": 1.0})
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: Scheduler
        self.steps_per_epoch = 1
        self.step_count = 0
        self.epoch = 0

    def _make_objective(
        self, losses: Mapping[str, DistillationLoss], weights: Mapping[str, Weight]
    ) -> Objective:
        return Objective(self.captioner, losses, weights, self.config.label_smoothing)

    @property
    def models(self) -> list[nn.Module]:
        """The models that read a batch."""
        return [self.captioner]

    @property
    def progress(self) -> float:
        """The share of the run's steps that is done, 0 to 1."""
        return min(self.step_count / max(self.config.epochs * self.steps_per_epoch, 1), 1.0)

    # -- forward ----------------------------------------------------------------------------

    def terms(self, batch: Batch, counts: Mapping[str, float] | None = None) -> dict[str, LossTerm]:
        """The terms of a batch: forward only, with gradients, for a loop of one's own.

        Args:
            batch: On any device.
            counts: What each sum is divided by; the batch's own unless given.
        """
        self._prepare(batch)
        counts = self.objective.counts(batch) if counts is None else counts
        read = self._altered_inputs(batch)
        batch = batch.to(self.device)
        with autocast(self.device, self.precision):
            sums = self.objective(batch, self.teach(batch), read)
        return {
            name: LossTerm(value, counts[name], self.objective.weight(name, self.progress))
            for name, value in sums.items()
        }

    def teach(self, batch: Batch) -> CaptionerOutput | None:
        """What the teacher says of a batch; a plain trainer has none."""
        return None

    def _altered_inputs(self, batch: Batch) -> AlteredInputs | None:
        """What the student reads in place of the references; nothing else in evaluation mode."""
        if not self.objective.training:
            return None
        return altered_inputs(self.captioner, batch, self.config, self.epoch, self.progress)

    # -- one step ---------------------------------------------------------------------------

    def step(self, *micro_batches: Batch) -> Row:
        """One optimizer step over all the given batches, as if they were one.

        Each term is divided once by its count over all of them.

        Returns:
            A row with loss, terms (raw and weighted), learning rates, gradient norm and speed.

        Raises:
            NotFiniteLoss: a term or the gradient is NaN or infinite; nothing was updated.
        """
        began = time.perf_counter()
        optimizer = self._ready(micro_batches)
        self.objective.train()
        optimizer.zero_grad(set_to_none=True)
        counts = total_counts(self.objective, micro_batches)
        tally = Tally()
        for batch in micro_batches:
            terms = self.terms(batch, counts)
            self.scaler.scale(total(terms)).backward()  # type: ignore[no-untyped-call]
            tally.add(terms, dict.fromkeys(counts, 0.0))
        tally.counts = counts
        norm = self._clip(optimizer)
        [norm_read] = tally.read(norm)  # the one point where we wait for the device
        self._require_finite(tally, norm_read)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self._update(optimizer, overflow=not math.isfinite(norm_read))
        seen = {
            "images": sum(batch.num_images for batch in micro_batches),
            "captions": sum(len(batch.captions) for batch in micro_batches),
        }
        row = {"learning_rates": rates, "gradient_norm": norm_read, **seen}
        return self._step_row(tally, row, time.perf_counter() - began)

    def make_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """AdamW; override it, or assign a function, for another optimizer.

        Args:
            groups: Of `parameter_groups`, each with its learning rate and weight decay.
        """
        return torch.optim.AdamW(groups)

    def _ready(self, micro_batches: tuple[Batch, ...]) -> torch.optim.Optimizer:
        """Optimizer and schedule, made when first needed: after the losses' projectors."""
        if not micro_batches:
            raise ConfigError("step() was given no batch. Give at least one.")
        self._prepare(micro_batches[0])
        return self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if not hasattr(self, "device"):
                self._place()
            groups = parameter_groups(self.objective, self.captioner, self.config)
            self.optimizer = self.make_optimizer(groups)
            self.schedule = make_schedule(self.optimizer, self.config, self.steps_per_epoch)
            self._untouched_unsaid = True
        return self.optimizer

    def _clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip the gradients; their norm before that."""
        if self._untouched_unsaid:
            self._untouched_unsaid = False
            warn_of_untouched(self.objective)
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        return nn.utils.clip_grad_norm_(parameters, limit)

    def _update(self, optimizer: torch.optim.Optimizer, overflow: bool) -> None:
        self.scaler.step(optimizer)  # skips a step that overflowed in fp16
        self.scaler.update()
        if not overflow:
            self.schedule.step()
        optimizer.zero_grad(set_to_none=True)
        self.step_count += 1

    def _require_finite(self, tally: Tally, norm: float) -> None:
        bad = [name for name, value in tally.sums.items() if not math.isfinite(value)]
        bad += [] if math.isfinite(norm) or self.scaler.is_enabled() or bad else ["the gradient"]
        if not bad:
            return
        self.scaler.update()  # forgets the gradients it looked at
        self.objective.zero_grad(set_to_none=True)
        values = ", ".join(f"{name} is {float(tally.sums.get(name, norm))}" for name in bad)
        raise NotFiniteLoss(
            f"Step {self.step_count + 1} (epoch {self.epoch}): {values}. The weights were not "
            "changed by this step and the last checkpoint is intact. Try a smaller learning_rate, "
            "max_grad_norm=, or precision='fp32'."
        )

    def _step_row(self, tally: Tally, measured: Row, seconds: float) -> Row:
        return {
            "kind": "step",
            "step": self.step_count,
            "epoch": self.epoch,
            **tally.summary(),
            "counts": tally.counts,
            **measured,
            "seconds": seconds,
            "images_per_second": measured["images"] / seconds,
        }

    # -- getting ready ----------------------------------------------------------------------

    def _prepare(self, batch: Batch | None) -> None:
        """What must be there before the optimizer, given the first batch."""
        if batch is None:
            raise DataError("No usable training image: the data are empty.")
        if not hasattr(self, "device"):
            self._place()

    def _place(self) -> None:
        """Choose device and precision, and move there what is trained."""
        self.device = pick_device(self.config.device)
        self.precision = pick_precision(self.device, self.config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.objective.to(self.device)


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


def warn_of_untouched(objective: nn.Module) -> None:
    """Name the parameters that require a gradient and got none, after a backward pass."""
    trained = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    left = [name for name, parameter in trained if parameter.grad is None]
    if left:
        warnings.warn(
            f"{len(left)} of {len(trained)} trainable tensors get no gradient and will stay as "
            f"they are: {', '.join(left[:10])}{' ...' if len(left) > 10 else ''}. Use them in "
            "forward, remove them, or freeze them with requires_grad_(False).",
            stacklevel=4,
        )


References = dict[str, tuple[str, ...]]


def validate(trainer: Trainer, source: Source) -> tuple[dict[str, Any], dict[str, float]]:
    """Terms and scores of a trainer's captioner over a source, in evaluation mode."""
    tally, said, references = Tally(), dict[str, str](), References()
    with evaluating(trainer.objective), torch.no_grad():
        for batch in source.epoch(0):
            references |= require_references(batch)
            counts = trainer.objective.counts(batch)
            batch = batch.to(trainer.device)
            with autocast(trainer.device, trainer.precision):
                batch = with_trunk_tokens(trainer.captioner, batch)
                said |= _captions(trainer, batch)
            tally.add(trainer.terms(batch, counts), counts)
    found = {**tally.summary(), "images": len(said), "skipped": len(source.skipped)}
    return found, trainer.score(references, said)


def with_trunk_tokens(captioner: Captioner, batch: Batch) -> Batch:
    """The batch with the trunk's tokens, so that loss and captions share one pass of the trunk."""
    encoder = captioner.encoder
    key = encoder.fingerprint()
    if key is None or key in batch.cached:
        return batch
    return replace(batch, cached={**batch.cached, key: encoder.trunk(batch.images)})


def require_references(batch: Batch) -> References:
    """The references of a validation batch by image.

    Raises:
        ConfigError: there are none.
    """
    if batch.references is None:
        raise ConfigError(
            "A validation batch has no references. Scores against truncated or unknown-word ids "
            "would mislead: give Batch(references=...) with the raw captions of every image."
        )
    return dict(zip(batch.image_ids, batch.references, strict=True))


def _captions(trainer: Trainer, batch: Batch) -> dict[str, str]:
    how = trainer.config.generation
    options: dict[str, Any] = {} if how is None else {"generation": how}
    texts = (hypothesis.text for hypothesis in trainer.captioner.generate(batch, **options))
    return dict(zip(batch.image_ids, texts, strict=True))


def directions(metrics: Sequence[str | Metric]) -> dict[str, bool]:
    """Every score that the metrics give -> whether higher is better.

    Example:
        >>> directions(["bleu_4"])
        {'bleu_4': True}
    """
    found = CaptionScorer([["a dog"]], metrics=metrics).directions
    return {name: direction == "higher" for name, direction in found.items()}


class Scoring:
    """Scores captions against references, which are prepared once as long as they are the same."""

    def __init__(self) -> None:
        self._prepared: tuple[object, CaptionScorer] | None = None

    def __call__(
        self,
        references: Mapping[str, Sequence[str]],
        captions: Mapping[str, str],
        metrics: Sequence[str | Metric],
    ) -> dict[str, float]:
        """Corpus scores by name."""
        asked = (dict(references), tuple(metrics))
        if self._prepared is None or self._prepared[0] != asked:
            self._prepared = asked, CaptionScorer(references, metrics=metrics)
        return {name: float(value) for name, value in self._prepared[1](captions).items()}
