"""What `bench` found: a table, and plain values for JSON. Nothing here loads torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capdistill.evaluation.resources import Latency
from capdistill.evaluation.table import format_value, terminal_width
from capdistill.metrics.bootstrap import text_columns

SCHEMA = "capdistill.bench/1"


@dataclass(frozen=True)
class Ratio:
    """How many times a figure is that of the reference, in each round.

    Example:
        >>> print(Ratio.of([2.0, 4.0, 3.0]))
        3.0 x (2.0-4.0)

    Args:
        median: Of the rounds.
        low, high: The least and the greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """From the ratio of each round."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} x ({_short(self.low)}-{_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 10 and value != round(value, 1) else f"{value:.1f}"


@dataclass(frozen=True)
class Measured:
    """What one captioner costs.

    Args:
        kind: As in `Request`.
        parameters: Its numbers; of graphs, the constants they hold. None if they were not counted.
        disk_bytes: All its files; None of a model on the hub.
        memory_bytes: Highest resident memory of its process, one image after another.
        batch_memory_bytes: The same after whole batches.
        start_seconds: From the start of its process to the first caption.
        start_processor_seconds: Of which the processor worked so long.
        latency_ms: One image, from its file to the caption.
        reading_ms, encoding_ms, decoding_ms: Its parts.
        processor_ms: Time of the processor for one image, in all threads.
        captions_per_second: Of whole batches, from files to captions.
        caption: Of the first image.
    """

    kind: str
    parameters: int | None
    disk_bytes: int | None
    memory_bytes: int
    batch_memory_bytes: int | None
    start_seconds: float
    start_processor_seconds: float
    latency_ms: Latency
    reading_ms: Latency
    encoding_ms: Latency
    decoding_ms: Latency
    processor_ms: Latency
    captions_per_second: float | None
    caption: str


@dataclass(frozen=True)
class Bench:
    """Captioners side by side.

    Args:
        models: Name -> what it costs.
        ratios: Name -> "latency" and "processor" -> the ratio to the reference.
        reference: The name of the model that the others are compared with.
        settings: How it was measured.
        failed: Name -> why it has no figures, for a model that failed.
    """

    models: Mapping[str, Measured]
    ratios: Mapping[str, Mapping[str, Ratio]]
    reference: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            **self.settings,
            "reference": self.reference,
            "models": {name: asdict(each) for name, each in self.models.items()},
            "ratios": {
                name: {key: asdict(ratio) for key, ratio in each.items()}
                for name, each in self.ratios.items()
            },
            "failed": dict(self.failed),
        }

    def __str__(self) -> str:
        rows = [[label, *cells] for label, cells in _rows(self)]
        table = text_columns(
            [["", *self.models], *rows], right=range(1, len(rows[0])), width=terminal_width()
        )
        reasons = (f"{name} failed: {reason}" for name, reason in self.failed.items())
        return "\n".join([table, _how(self.settings), *reasons])


def _rows(found: Bench) -> Iterator[tuple[str, list[str]]]:
    models = list(found.models.values())

    def cells(unit: str, values: Iterable[float | None]) -> list[str]:
        return [format_value(value, unit) for value in values]

    yield "Kind", [each.kind for each in models]
    yield "Parameters", cells("count", (each.parameters for each in models))
    yield "Size on disk", cells("bytes", (each.disk_bytes for each in models))
    yield "Peak memory", cells("bytes", (each.memory_bytes for each in models))
    yield "Peak memory, batches", cells("bytes", (each.batch_memory_bytes for each in models))
    yield "Start to first caption", cells("ms", (1000 * each.start_seconds for each in models))
    yield "One image, median", cells("ms", (each.latency_ms.median for each in models))
    yield "One image, 95 %", cells("ms", (each.latency_ms.p95 for each in models))
    yield "  reading", cells("ms", (each.reading_ms.median for each in models))
    yield "  encoding", cells("ms", (each.encoding_ms.median for each in models))
    yield "  decoding", cells("ms", (each.decoding_ms.median for each in models))
    yield "  of the processor", cells("ms", (each.processor_ms.median for each in models))
    speeds = (each.captions_per_second for each in models)
    yield "Captions a second, batched", ["—" if s is None else f"{s:.2f}" for s in speeds]
    for key, label in (("latency", "Time"), ("processor", "Processor's time")):
        yield (
            f"{label} of {found.reference}",
            ["1" if n == found.reference else str(found.ratios[n][key]) for n in found.models],
        )


def _how(settings: Mapping[str, Any]) -> str:
    words = settings["words"]
    length = "as long as the models make them" if words is None else f"of {words} tokens"
    batches = f"batches of {settings['batch_size']}" if settings["batch_size"] else "no batches"
    return (
        f"{settings['threads']} thread(s); {settings['rounds']} rounds in which the models take "
        f"turns, {settings['images_per_round']} images each; captions {length}; {batches}. Memory "
        "is all of a process of its own. A ratio is the median of the rounds, with the least and "
        "the greatest."
    )
