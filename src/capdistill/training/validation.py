"""What validation needs: references by image, the metrics to compute, one pass of the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError
from capdistill.metrics import DIRECTIONS, CaptionScorer, Metric
from capdistill.outputs import Batch, require_unique_ids
from capdistill.training.monitor import MEANINGFUL, Monitor, monitor_key, resolve_monitor

References = dict[str, tuple[str, ...]]


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
