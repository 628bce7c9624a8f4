"""Caption a data set, score the captions, measure the model: `evaluate`; `compare` does it twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from capdistill.errors import CapdistillError, ConfigError, DataError
from capdistill.gallery import Gallery
from capdistill.measure import (
    Latency,
    Memory,
    cpu_memory,
    cuda_memory,
    disk_bytes,
    time_captions,
    time_each,
)
from capdistill.metrics import CaptionScorer, Metric, Scores
from capdistill.outputs import Batch
from capdistill.training.runtime import autocast, pick_device, pick_precision

SCHEMA = "capdistill.evaluation/1"
TIMED = 20  # images


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `print` shows it as a table.

    Args:
        name: What the model is called.
        scores: Corpus scores by name, with `.per_image` and `.notes`.
        captions: Image id -> the model's caption.
        references: Image id -> the reference captions it was scored against.
        unfinished: Images whose caption was cut at the length limit.
        skipped: Images that could not be used, each with the reason.
        parameters: Number of parameters.
        device: Where it ran.
        precision: "fp32", "bf16" or "fp16".
        disk_bytes: Size of the saved model; None where it was not measured.
        latency_ms: Time an image at batch size 1: pixels to caption.
        preprocessing_ms: Time an image from file to pixels, apart.
        memory: Peak memory, see `Memory`.
        notes: What a reader of the figures must know.
    """

    name: str
    scores: Scores
    captions: Mapping[str, str]
    references: Mapping[str, tuple[str, ...]]
    unfinished: tuple[str, ...]
    skipped: tuple[str, ...]
    parameters: int
    device: str
    precision: str
    disk_bytes: int | None = None
    latency_ms: Latency | None = None
    preprocessing_ms: Latency | None = None
    memory: Memory | None = None
    notes: tuple[str, ...] = ()
    gallery: Gallery = field(default_factory=Gallery, repr=False, compare=False)

    @property
    def covered(self) -> tuple[str, ...]:
        """The images that were captioned and scored."""
        return tuple(self.captions)

    @property
    def success_rate(self) -> float:
        """Share of the images with a caption that is not empty and ended by itself."""
        cut = set(self.unfinished)
        good = sum(bool(text.strip()) and i not in cut for i, text in self.captions.items())
        return good / len(self.captions)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory in bytes, or None where it was not measured."""
        return None if self.memory is None else self.memory.peak

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts and lists, for `json.dump`; "schema" names the form."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "scores": dict(self.scores),
            "success_rate": self.success_rate,
            "images": len(self.captions),
            "skipped": list(self.skipped),
            "unfinished": list(self.unfinished),
            "parameters": self.parameters,
            "disk_bytes": self.disk_bytes,
            "latency_ms": self.latency_ms and asdict(self.latency_ms),
            "preprocessing_ms": self.preprocessing_ms and asdict(self.preprocessing_ms),
            "memory_bytes": self.memory and asdict(self.memory),
            "device": self.device,
            "precision": self.precision,
            "notes": list(self.notes),
            "captions": dict(self.captions),
            "references": {image: list(texts) for image, texts in self.references.items()},
            "per_image": {name: dict(each) for name, each in self.scores.per_image.items()},
        }

    def __str__(self) -> str:
        from capdistill.report import plain_table

        return plain_table({self.name: self})


def evaluate(
    captioner: Any,
    data: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
    metrics: Sequence[str | Metric] | None = None,
    limit: int | None = None,
    workers: int = 0,
    measure: bool = True,
    progress: bool = False,
    name: str | None = None,
) -> Evaluation:
    """Caption every image of `data`, score the captions, measure size, time and memory.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> found = evaluate(student, data.val, limit=4, metrics=["bleu"], measure=False)
        >>> len(found.captions), sorted(found.scores)
        (4, ['bleu_1', 'bleu_2', 'bleu_3', 'bleu_4'])

    Args:
        captioner: A `Captioner`, or anything with its `generate`. Its device and its training
            flags are afterwards as they were.
        data: A `capdistill.data` split, a torch data set of (image, captions), or an iterable of
            `Batch` with references.
        batch_size: Images a batch while captioning; time is measured one by one.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "bf16", "fp16" or "fp32".
        metrics: As in `CaptionScorer`; None is all.
        limit: Only the first so many images.
        workers: Processes that read images.
        measure: Also measure bytes on disk, time and memory (the last in a process of its own).
        progress: Show a bar.
        name: What tables call the model; its own name unless given.

    Raises:
        DataError: no image, or batches without references.
        ConfigError: a captioner that can not generate, or data of another kind.
    """
    where = pick_device(device)
    precise = pick_precision(where, precision)
    run = _Run(captioner, _source(captioner, data, batch_size, workers), limit, progress)
    with _moved(captioner, where):
        with autocast(where, precise):
            run.caption(where)
        costs = _costs(captioner, data, run.timed, where, precise) if measure else {}
    scores = CaptionScorer(run.references, metrics=metrics)(run.captions)
    notes = (*scores.notes, *costs.pop("notes", ()))
    return Evaluation(
        name=name or getattr(captioner, "name", "captioner"),
        scores=scores,
        captions=run.captions,
        references=run.references,
        unfinished=tuple(run.unfinished),
        skipped=tuple(str(problem) for problem in run.skipped()),
        parameters=captioner.num_parameters(),
        device=str(where),
        precision=precise,
        notes=notes,
        gallery=run.gallery,
        **costs,
    )


class _Run:
    """One pass of a model over the data, and what it leaves behind."""

    def __init__(self, captioner: Any, source: Any, limit: int | None, progress: bool) -> None:
        self.captioner, self.source, self.limit, self.progress = captioner, source, limit, progress
        self.captions: dict[str, str] = {}
        self.references: dict[str, tuple[str, ...]] = {}
        self.unfinished: list[str] = []
        self.timed: list[Batch] = []
        self.gallery = Gallery()

    def caption(self, device: torch.device) -> None:
        for batch in self._batches():
            hypotheses = self.captioner.generate(batch.to(device))
            for i, hypothesis in enumerate(hypotheses):
                self._note(batch, i, hypothesis)
        if not self.captions:
            raise DataError("There is no image to evaluate: the data, or the limit, are empty.")

    def skipped(self) -> Iterable[Any]:
        report = getattr(self.source, "skipped", ())
        return getattr(report, "problems", report)

    def _batches(self) -> Iterator[Batch]:
        from tqdm import tqdm

        left = self.limit
        epoch = self.source.epoch(0) if hasattr(self.source, "epoch") else iter(self.source)
        for batch in tqdm(epoch, desc="captioning", unit="batch", disable=not self.progress):
            if left is not None and left <= 0:
                return
            yield batch if left is None or left >= batch.num_images else part(batch, 0, left)
            left = None if left is None else left - batch.num_images

    def _note(self, batch: Batch, i: int, hypothesis: Any) -> None:
        image = batch.image_ids[i]
        if batch.references is None:
            raise DataError(_NO_REFERENCES)
        if image in self.captions:
            raise DataError(f"The image id '{image}' comes twice in the data; ids must differ.")
        self.captions[image] = hypothesis.text
        self.references[image] = batch.references[i]
        if not hypothesis.finished:
            self.unfinished.append(image)
        if batch.images.numel():
            self.gallery.offer(image, batch.images[i])
            if len(self.timed) < TIMED:
                self.timed.append(replace(part(batch, i, i + 1), cached={}))


_NO_REFERENCES = (
    "The batches have no references. Captions are scored against the raw reference texts, because "
    "ids are cut and know too few words. Give Batch(references=...), one tuple of texts an image, "
    "or a capdistill data set, whose evaluation batches have them."
)


def part(batch: Batch, first: int, last: int) -> Batch:
    """Images `first` to `last` (not included) of a batch.

    Example:
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> batch = Batch(torch.zeros(2, 3, 1, 1), ids, ids > 0, ("a", "b"), ("1", "2"))
        >>> part(batch, 1, 2).captions
        ('b',)
    """
    k = batch.captions_per_image
    rows = slice(first * k, last * k)
    return Batch(
        images=batch.images[first:last],
        input_ids=batch.input_ids[rows],
        mask=batch.mask[rows],
        captions=batch.captions[rows],
        image_ids=batch.image_ids[first:last],
        references=batch.references and batch.references[first:last],
        cached={key: tokens[first:last] for key, tokens in batch.cached.items()},
    )
