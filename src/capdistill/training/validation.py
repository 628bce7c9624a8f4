"""Validation after an epoch: the terms of the loss, and scores of captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from capdistill.captioner import Captioner
from capdistill.data.loader import Source
from capdistill.errors import ConfigError
from capdistill.metrics import CaptionScorer, Metric
from capdistill.outputs import Batch
from capdistill.runtime import autocast, evaluating
from capdistill.training.tally import Tally

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

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
