"""Caption a data set, score the captions, measure the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from capdistill.compatibility import image_size
from capdistill.errors import CapdistillError, ConfigError, DataError
from capdistill.evaluation.measure import (
    Latency,
    Memory,
    cpu_memory,
    cuda_memory,
    disk_bytes,
    generates,
    time_captions,
    time_each,
)
from capdistill.evaluation.report import Gallery
from capdistill.generation.config import GenerationConfig, resolve
from capdistill.metrics import CaptionScorer, Diversity, Metric, Scores, diversity
from capdistill.outputs import Batch, part
from capdistill.runtime import autocast, on_device, pick_device, pick_precision

SCHEMA = "capdistill.evaluation/1"


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
        generation: How it captioned; None is the model's own default.
        health: How varied the captions are, and how many are empty, repetitive or cut off.
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
    timed: tuple[Batch, ...] = field(default=(), repr=False, compare=False)
    generation: GenerationConfig | None = None
    health: Diversity | None = None

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
            "health": self.health and self.health.to_json(),
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
            "generation": self.generation and self.generation.model_dump(mode="json"),
            "notes": list(self.notes),
            "captions": dict(self.captions),
            "references": {image: list(texts) for image, texts in self.references.items()},
            "per_image": {name: dict(each) for name, each in self.scores.per_image.items()},
        }

    def __str__(self) -> str:
        from capdistill.evaluation.table import plain_table

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
    num_workers: int = 0,
    measure: bool = True,
    progress: bool = False,
    name: str | None = None,
    generation: GenerationConfig | Mapping[str, Any] | None = None,
    training_captions: Iterable[str] | None = None,
    **options: Any,
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
        num_workers: Processes that read images.
        measure: Also measure bytes on disk, time and memory (the last in a process of its own).
        progress: Show a bar.
        name: What tables call the model; its own name unless given.
        generation: How to caption, a `GenerationConfig` or its options; greedy unless given.
        training_captions: What the model was trained on; captions that are not among them are
            novel.
        options: Fields of `GenerationConfig`, over those of `generation`: `beam_size=3`, ...

    Raises:
        DataError: no image, or batches without references.
        ConfigError: a captioner that cannot generate, or data of another kind.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"evaluate: limit={limit} was given; use None or a number of images.")
    where = pick_device(device)
    precise = pick_precision(where, precision)
    how = None if generation is None and not options else resolve(generation, options)
    source = open_source(captioner, data, batch_size, num_workers)
    run = Pass(captioner, source, limit, progress, how)
    with on_device([captioner], where):
        with autocast(where, precise):
            run.caption(where)
        costs = _costs(captioner, data, run.timed, where, precise, how) if measure else {}
    scores = CaptionScorer(run.references, metrics=metrics)(run.captions)
    ended = {image: image not in run.unfinished for image in run.captions}
    notes = (*scores.notes, *costs.pop("notes", ()))
    return Evaluation(
        name=name or str(getattr(captioner, "name", "captioner")),
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
        timed=tuple(run.timed),
        generation=how,
        health=diversity(run.captions, training_captions, ended),
        **costs,
    )


def _costs(
    captioner: Any,
    data: Any,
    timed: Sequence[Batch],
    device: torch.device,
    precision: str,
    how: GenerationConfig | None,
) -> dict[str, Any]:
    """The measured fields of `Evaluation`; what cannot be measured becomes a note."""
    found: dict[str, Any] = {"notes": ()}
    if timed:
        found["latency_ms"] = time_captions([captioner], [timed], device, precision, how)[0]
    else:
        found["notes"] += ("Time was not measured: the batches hold no pixels.",)
    found["preprocessing_ms"] = _preprocessing(captioner, data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            captioner.save(folder)
            found["disk_bytes"] = disk_bytes(folder)
            if device.type == "cpu":
                found["memory"] = cpu_memory(folder, precision=precision, generation=how)
        except (CapdistillError, AttributeError) as error:
            found["notes"] += (f"Size on disk and memory are not complete: {error}",)
    if device.type == "cuda" and timed:
        with autocast(device, precision):
            found["memory"] = cuda_memory(captioner, timed, device, how)
    return found


def _preprocessing(captioner: Any, data: Any) -> Latency | None:
    """Time an image from file to pixels, where the data name files."""
    from capdistill.data.images import centre_square, read_image

    size = image_size(captioner)
    paths = [example.path for example in getattr(data, "examples", ())[:TIMED]]
    readable = [path for path in paths if _readable(path)]
    if not readable:
        return None
    return time_each(lambda path: centre_square(read_image(path), size), readable)


def _readable(path: Path) -> bool:
    from capdistill.data.images import read_image

    try:
        read_image(path)
    except DataError:
        return False
    return True


TIMED = 20  # images


class Pass:
    """One pass of a model over the data, and what it leaves behind."""

    def __init__(
        self,
        captioner: Any,
        source: Any,
        limit: int | None,
        progress: bool,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.source, self.limit, self.progress = source, limit, progress
        self.generate = generates(captioner, generation)
        self.captions: dict[str, str] = {}
        self.references: dict[str, tuple[str, ...]] = {}
        self.unfinished: list[str] = []
        self.timed: list[Batch] = []
        self.gallery = Gallery()

    def caption(self, device: torch.device) -> None:
        """Caption every image, keeping captions and references.

        Raises:
            DataError: no image, a batch without references, or an id that comes twice.
        """
        for batch in self._batches():
            if batch.references is None:
                raise DataError(_NO_REFERENCES)
            hypotheses = self.generate(batch.to(device))
            for i, (hypothesis, texts) in enumerate(zip(hypotheses, batch.references, strict=True)):
                self._note(batch, i, hypothesis, texts)
        if not self.captions:
            raise DataError("There is no image to evaluate: the data, or the limit, are empty.")

    def skipped(self) -> Iterable[Any]:
        """The images that the source left out, each with its reason."""
        report = getattr(self.source, "skipped", ())
        return getattr(report, "problems", report)

    def _batches(self) -> Iterator[Batch]:
        from tqdm import tqdm

        left = self.limit
        epoch = self.source.epoch(0) if hasattr(self.source, "epoch") else iter(self.source)
        for batch in tqdm(epoch, desc="captioning", unit="batch", disable=not self.progress):
            if left is None:
                yield batch
                continue
            yield batch if left >= batch.num_images else part(batch, 0, left)
            left -= batch.num_images
            if left <= 0:
                return

    def _note(self, batch: Batch, i: int, hypothesis: Any, references: tuple[str, ...]) -> None:
        image = batch.image_ids[i]
        if image in self.captions:
            raise DataError(f"The image id '{image}' comes twice in the data; ids must differ.")
        self.captions[image] = hypothesis.text
        self.references[image] = references
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


def open_source(captioner: Any, data: Any, batch_size: int, num_workers: int) -> Any:
    """Epochs of batches, or the one-shot iterator itself: one pass is all that is needed."""
    from capdistill.data.loader import make_source

    if not hasattr(captioner, "generate"):
        raise ConfigError(
            f"evaluate: {type(captioner).__name__} has no generate(batch). Give a "
            "capdistill.Captioner, or an object whose generate gives one Hypothesis an image."
        )
    if isinstance(data, Iterator):
        return data
    size = image_size(captioner)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "errors": "skip",
    }
    return make_source(data, captioner.tokenizer, image_size=size, **options)
