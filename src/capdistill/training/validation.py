"""What validation needs: references by image, the metrics to compute, one pass of the trunk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from capdistill.captioner import Captioner
from capdistill.data.source import Source, numbered_batches, part_of, require_unique_ids
from capdistill.errors import ConfigError, NotFiniteLogits
from capdistill.metrics import DIRECTIONS, CaptionScorer, Metric
from capdistill.outputs import Batch, LossTerm, part
from capdistill.ranks import Ranks
from capdistill.runtime import autocast, evaluating
from capdistill.training.config import TrainConfig
from capdistill.training.distributed import tensors_of
from capdistill.training.history import LossMeter
from capdistill.training.monitor import MEANINGFUL, Monitor, monitor_key, resolve_monitor
from capdistill.training.objective import Objective
from capdistill.training.sharding import any_sharded, unsharded

References = dict[str, tuple[str, ...]]


class Validated(Protocol):
    """What validation uses of a trainer."""

    captioner: Captioner
    config: TrainConfig
    objective: Objective
    device: torch.device
    precision: str
    ranks: Ranks
    spare: Batch | None

    @property
    def models(self) -> list[nn.Module]:
        """The models that read a batch."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block, the captioner holds the averaged weights if there is an average."""

    def terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The terms of a batch."""

    def score(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> dict[str, float]:
        """Scores of captions by name."""


def run_validation(trainer: Validated, source: Source) -> tuple[dict[str, Any], dict[str, float]]:
    """Terms and scores over a source, which the ranks share; see `Stepper.validate`."""
    if not callable(getattr(source, "epoch", None)):
        kind = type(source).__name__
        raise ConfigError(f"validate: {kind} was given; expected a Loader or epoch(n, start).")
    captioner, ranks = trainer.captioner, trainer.ranks
    source = part_of(source, ranks.rank, ranks.world_size)
    meter, generated, references = LossMeter(), dict[str, str](), References()
    silent: list[str] = []  # why an image has no caption
    together = any_sharded(trainer.objective, *trainer.models)  # a pass of one needs all ranks
    with trainer.averaged(), evaluating(trainer.objective), torch.no_grad():
        ranks.share(tensors_of(trainer.objective, buffers_only=True))  # batch norms differ
        for given in numbered_batches(source, 0):
            batch = given or (trainer.spare if together else None)
            if batch is None:
                continue
            if given is not None:
                add_references(references, given)
            texts: list[str] = []
            batch = batch.to(trainer.device)
            with unsharded(trainer.objective):
                with autocast(trainer.device, trainer.precision):
                    batch = with_trunk_tokens(captioner, batch)
                    if together or any(batch.references or ()):
                        how: Any = trainer.config.generation
                        texts = _captions(captioner, batch, how, silent, whole=together)
                terms = trainer.terms(batch)
            if given is None:
                continue
            generated |= zip(batch.image_ids, texts, strict=bool(texts))
            values = torch.stack([term.sum.float() for term in terms.values()]).tolist()
            weights = {name: term.weight for name, term in terms.items()}
            counts = {name: term.count for name, term in terms.items()}
            meter.add(dict(zip(terms, values, strict=True)), weights, counts)
    if silent:
        others = f" and {len(silent) - 1} more like it" * (len(silent) > 1)
        warnings.warn(f"validation scores an empty caption{others}. {silent[0]}", stacklevel=2)
    skipped = ranks.gather_problems(source)
    meter, generated, references = merge_parts(ranks.gather((meter, generated, references)))
    found = {**meter.summary(), "images": len(references), "skipped": skipped}
    scored = {image: texts for image, texts in references.items() if texts}
    captions = {image: generated[image] for image in scored}
    return found, ranks.on_main(trainer.score, scored, captions)


def _captions(
    captioner: Captioner, batch: Batch, how: Any, silent: list[str], whole: bool
) -> list[str]:
    """The captions of a batch; an image whose logits are NaN gets an empty one.

    Args:
        silent: Takes the reason of each such image.
        whole: All images of such a batch get one: other ranks wait for the batch as a whole.
    """
    try:
        return [found.text for found in captioner.generate(batch, how)]
    except NotFiniteLogits as error:
        if whole or batch.num_images == 1:
            silent.append(str(error))
            return [""] * batch.num_images
    alone = (part(batch, i, i + 1) for i in range(batch.num_images))
    return [text for each in alone for text in _captions(captioner, each, how, silent, whole)]


class PreparedScorer:
    """Scores of captions; the references are prepared once."""

    def __init__(self) -> None:
        self._made: tuple[object, CaptionScorer] | None = None

    def __call__(  # noqa: D102
        self,
        references: Mapping[str, Sequence[str]],
        captions: Mapping[str, str],
        metrics: Sequence[str | Metric],
    ) -> dict[str, float]:
        if not references:
            return {}
        asked = (dict(references), tuple(metrics))
        if self._made is None or self._made[0] != asked:
            self._made = asked, CaptionScorer(asked[0], metrics=asked[1])
        return {name: float(value) for name, value in self._made[1](captions).items()}


Part = tuple[LossMeter, dict[str, str], References]


def merge_parts(parts: Iterable[Part]) -> Part:
    """What the ranks found, each on other images, as one.

    Raises:
        DataError: an image id that occurs on two ranks.
    """
    (meter, generated, references), *others = parts
    for other, texts, more in others:
        require_unique_ids(more, "the validation data", set(references))
        references |= more
        generated |= texts
        meter.merge(other)
    return meter, generated, references


def make_monitor(monitor: str, patience: int | None, metrics: Sequence[str | Metric]) -> Monitor:
    """The choice of the best epoch by the monitored score.

    Args:
        monitor: The name of the score.
        patience: Epochs without improvement after which training stops, or None.
        metrics: What validation computes besides.

    Raises:
        UnknownName: the score is none that validation computes.
    """
    name, higher = resolve_monitor(monitor, directions(measured(monitor, metrics)))
    return Monitor(name, higher=higher, patience=patience, meaningful=MEANINGFUL.get(name, 0.0))


def measured(monitor: str, metrics: Sequence[str | Metric]) -> tuple[str | Metric, ...]:
    """What validation computes: the chosen metrics, and the monitored one.

    Example:
        >>> measured("cider", ["bleu"]), measured("bleu_4", ["bleu"])
        (('bleu', 'cider_d'), ('bleu',))
    """
    chosen, key = tuple(metrics), monitor_key(monitor)
    if key in DIRECTIONS and key not in directions(chosen):
        return (*chosen, key)
    return chosen


def add_references(references: References, batch: Batch) -> None:
    """Add the references of a validation batch, by image.

    Raises:
        ConfigError: the batch has none.
        DataError: an image id that was there already.
    """
    if batch.references is None:
        raise ConfigError(
            "A validation batch has no references. Scores against truncated or unknown-word ids "
            "would mislead: give Batch(references=...) with the raw captions of every image."
        )
    require_unique_ids(batch.image_ids, "the validation data", set(references))
    references |= zip(batch.image_ids, batch.references, strict=True)


def with_trunk_tokens(captioner: Captioner, batch: Batch) -> Batch:
    """The batch with the trunk's tokens, so that loss and captions share one pass of the trunk."""
    encoder = captioner.encoder
    tokens = encoder.tokens_from(batch.cached) if batch.cached else None
    if tokens is None and not batch.images.numel():
        return batch  # `encode` reports what is missing
    if tokens is None:
        tokens = encoder.trunk(batch.images)
    return replace(batch, cached={**batch.cached, encoder.live_key: tokens})


def directions(metrics: Sequence[str | Metric]) -> dict[str, bool]:
    """Every score that the metrics give -> whether higher is better.

    Example:
        >>> directions(["bleu_4"])
        {'bleu_4': True}
    """
    found = CaptionScorer([["a dog"]], metrics=metrics).directions
    return {name: direction == "higher" for name, direction in found.items()}
