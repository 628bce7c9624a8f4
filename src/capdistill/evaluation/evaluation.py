"""Caption a data set, score the captions, measure the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset
from typing_extensions import Unpack

from capdistill.compatibility import image_size
from capdistill.data.source import require_unique_ids
from capdistill.errors import (
    ConfigError,
    DataError,
    require_bool,
    require_int,
    require_text,
    shortened,
    suggest,
)
from capdistill.evaluation.measure import (
    TIMED,
    Latency,
    Memory,
    generate_function,
    measure_costs,
)
from capdistill.evaluation.report import Gallery
from capdistill.evaluation.table import Progress, evaluation_table
from capdistill.generation.config import GenerationConfig, GenerationOptions, resolve
from capdistill.metrics import CaptionScorer, Diversity, Scores, diversity
from capdistill.metrics.base import Metrics, listed_metrics
from capdistill.metrics.scorer import resolve_metrics
from capdistill.outputs import Batch, part
from capdistill.runtime import autocast, on_device, pick_device, pick_precision
from capdistill.teachers.ensemble import Ensemble

SCHEMA = "capdistill.evaluation/1"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of `evaluate`. `print` shows it as a table.

    Args:
        name: The model's name in tables.
        scores: Corpus scores by name, with `.per_image` and `.notes`.
        captions: Image id -> the model's caption.
        references: Image id -> the reference captions it was scored against.
        unfinished: Images whose caption was cut at the length limit.
        skipped: Images that could not be used, each with the reason.
        parameters: Number of parameters.
        device: The device it ran on.
        precision: "fp32", "bf16" or "fp16".
        disk_bytes: Size of the saved model; None if it was not measured.
        latency_ms: Time per image at batch size 1, from pixels to caption.
        preprocessing_ms: Time per image from file to pixels.
        memory: Peak memory, see `Memory`.
        notes: Remarks needed to interpret the figures.
        gallery: Images spread over the data, for the report.
        timed: Batches of one image each, on which time was measured.
        generation: Decoding options used; None is the model's default.
        health: Diversity of the captions, and how many are empty, repetitive or cut off.
        time_comparable: Whether its time can be compared with another model's. That of a wrapped
            model cannot: it runs completely again for every word.
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
    time_comparable: bool = True

    @property
    def covered(self) -> tuple[str, ...]:
        """The images that were captioned and scored."""
        return tuple(self.captions)

    @property
    def success_rate(self) -> float:
        """Share of the images whose caption is not empty and reached its end token."""
        cut = set(self.unfinished)
        good = sum(bool(text.strip()) and i not in cut for i, text in self.captions.items())
        return good / len(self.captions)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory in bytes, or None if it was not measured."""
        return None if self.memory is None else self.memory.peak

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts and lists; "schema" names the form. A NaN stays a NaN."""
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
            "time_comparable": self.time_comparable,
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
        return evaluation_table({self.name: self.to_json()})

    def __repr__(self) -> str:
        scores = ", ".join(f"{name}={value:.4f}" for name, value in self.scores.items())
        return f"Evaluation({self.name!r}: {len(self.captions)} images; {scores})"


def evaluate(
    captioner: Any,
    data: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
    metrics: Metrics | None = None,
    limit: int | None = None,
    num_workers: int = 0,
    measure: bool = True,
    progress: bool = True,
    name: str | None = None,
    generation: GenerationConfig | Mapping[str, Any] | None = None,
    training_captions: Iterable[str] | None = None,
    **options: Unpack[GenerationOptions],
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
            flags are restored afterwards.
        data: A `capdistill.data` split, a Hugging Face data set, a torch data set of (image,
            captions), or an iterable of `Batch` with references. Image ids must differ.
        batch_size: Images per batch while captioning; time is measured one by one.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "bf16", "fp16" or "fp32".
        metrics: As in `CaptionScorer`; None is all.
        limit: Use only the first `limit` images.
        num_workers: Processes that read images.
        measure: Also measure bytes on disk, time and memory (the last in a separate process).
        progress: Show a bar on a terminal, and elsewhere a line every 10 seconds, on stderr.
        name: The model's name in tables; `captioner.name` by default.
        generation: Decoding: a `GenerationConfig` or its options; greedy by default.
        training_captions: The captions the model was trained on; generated captions that are not
            among them are novel.
        options: Fields of `GenerationConfig`, which override those of `generation`:
            `beam_size=3`, ...

    Raises:
        DataError: no image, an image id twice, batches without references, or a caption that is
            not text.
        ConfigError: a captioner that cannot generate, data of another kind, an unknown option (the
            message suggests the nearest), or a value out of range.
        UnknownName: an unknown metric; the message suggests the nearest.
    """
    require_known_options("evaluate", options, evaluate)
    require_int("evaluate: batch_size", batch_size, minimum=1)
    require_int("evaluate: num_workers", num_workers, minimum=0)
    if limit is not None:
        require_int("evaluate: limit", limit, minimum=1)
    require_bool("evaluate: measure", measure)
    require_bool("evaluate: progress", progress)
    metrics = listed_metrics(metrics)
    resolve_metrics(metrics)
    known = None if training_captions is None else _texts(training_captions)
    torch_device = pick_device(device)
    precision = pick_precision(torch_device, precision)
    config = None if generation is None and not options else resolve(generation, options)
    source = open_source(captioner, data, batch_size, num_workers)
    called = str(name or getattr(captioner, "name", "captioner"))
    status = Progress(called, show=progress)
    run = CaptioningRun(captioner, source, limit, status, config)
    with on_device([captioner], torch_device):
        with autocast(torch_device, precision):
            run.caption(torch_device)
        costs: dict[str, Any] = {}
        if measure:
            status.say("measuring time, size and memory")
            costs = measure_costs(captioner, data, run.timed, torch_device, precision, config)
    status.say(f"scoring {len(run.captions):,} captions")
    scores = CaptionScorer(run.references, metrics=metrics)(run.captions)
    ended = {image: image not in run.unfinished for image in run.captions}
    return Evaluation(
        name=called,
        scores=scores,
        captions=run.captions,
        references=run.references,
        unfinished=tuple(run.unfinished),
        skipped=tuple(str(problem) for problem in run.skipped()),
        parameters=captioner.num_parameters(),
        device=str(torch_device),
        precision=precision,
        notes=(*scores.notes, *_about(captioner), *costs.pop("notes", ())),
        gallery=run.gallery,
        timed=tuple(run.timed),
        generation=config,
        health=diversity(run.captions, known, ended),
        time_comparable=not getattr(captioner, "rereads_prefix", False),
        **costs,
    )


def _about(captioner: Any) -> tuple[str, ...]:
    """What a reader must know of the model to interpret its costs."""
    if not isinstance(captioner, Ensemble):
        return ()
    members = list(captioner.members)
    return (
        f"'{captioner.name}' is {len(members)} models ({', '.join(members)}) that caption "
        "together: parameters, size, time and memory are those of all of them.",
    )


def require_known_options(caller: str, options: Mapping[str, Any], *functions: Any) -> None:
    """Reject an option that neither these functions nor `GenerationConfig` have.

    Raises:
        ConfigError: there is one; the message suggests the nearest.
    """
    found = [each for f in functions for each in inspect.signature(f).parameters.values()]
    own = [each.name for each in found if each.kind is inspect.Parameter.KEYWORD_ONLY]
    known = [*own, *GenerationConfig.types()]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"{caller}: there is no option '{name}' (given: {shortened(value)}). "
                f"{suggest(name, known)}"
            )


def _texts(captions: Iterable[str]) -> list[str]:
    if isinstance(captions, (str, bytes)) or not isinstance(captions, Iterable):
        raise DataError(
            f"evaluate: training_captions are {shortened(captions)}; expected a list of captions."
        )
    listed = enumerate(captions, 1)
    return [require_text(text, f"evaluate: training caption {n}") for n, text in listed]


class CaptioningRun:
    """One pass of a model over the data, with the captions and references it collects."""

    def __init__(
        self,
        captioner: Any,
        source: Any,
        limit: int | None,
        progress: Progress,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.source, self.limit, self.progress = source, limit, progress
        self.generate = generate_function(captioner, generation)
        self.seen: set[str] = set()
        self.captions: dict[str, str] = {}
        self.references: dict[str, tuple[str, ...]] = {}
        self.unfinished: list[str] = []
        self.timed: list[Batch] = []
        self.gallery = Gallery()

    def caption(self, device: torch.device) -> None:
        """Caption every image, keeping captions and references.

        Raises:
            DataError: no image, a batch without references, or a duplicate id.
            ConfigError: the model does not generate one hypothesis per image.
        """
        total = getattr(self.source, "num_images", None)
        if total is not None and self.limit is not None:
            total = min(total, self.limit)
        for batch in self.progress.over(self._batches(), total):
            if batch.references is None or not all(batch.references):
                raise DataError(_NO_REFERENCES)
            require_unique_ids(batch.image_ids, "evaluate", self.seen)
            hypotheses = self.generate(batch.to(device))
            if len(hypotheses) != batch.num_images:
                raise ConfigError(
                    f"evaluate: generate gave {len(hypotheses)} captions for a batch of "
                    f"{batch.num_images} images; expected one Hypothesis per image."
                )
            for i, (hypothesis, texts) in enumerate(zip(hypotheses, batch.references, strict=True)):
                self._keep(batch, i, hypothesis, texts)
        if not self.captions:
            raise DataError("There is no image to evaluate: the data are empty.")

    def skipped(self) -> Iterable[Any]:
        """The images that the source left out, each with its reason."""
        report = getattr(self.source, "skipped", ())
        return getattr(report, "problems", report)

    def _batches(self) -> Iterator[Batch]:
        left = self.limit
        for batch in self.source.epoch(0) if hasattr(self.source, "epoch") else iter(self.source):
            if left is None:
                yield batch
                continue
            yield batch if left >= batch.num_images else part(batch, 0, left)
            left -= batch.num_images
            if left <= 0:
                return

    def _keep(self, batch: Batch, i: int, hypothesis: Any, references: Sequence[str]) -> None:
        image = batch.image_ids[i]
        self.references[image] = tuple(references)
        if not hasattr(hypothesis, "text") or not hasattr(hypothesis, "finished"):
            raise ConfigError(
                f"evaluate: generate gave {shortened(hypothesis)} ({type(hypothesis).__name__}); "
                "expected a capdistill.generation.Hypothesis, with `text` and `finished`."
            )
        self.captions[image] = require_text(hypothesis.text, f"The caption of image '{image}'")
        if not hypothesis.finished:
            self.unfinished.append(image)
        if batch.images.numel():
            self.gallery.offer(image, batch.images[i])
            if len(self.timed) < TIMED:
                self.timed.append(replace(part(batch, i, i + 1), cached={}))


_NO_REFERENCES = (
    "The batches have no references. Captions are scored against the raw reference texts, because "
    "token ids are cut and lack rare words. Give Batch(references=...), one tuple of texts per "
    "image, or a capdistill data set, whose evaluation batches have them."
)


def require_generate(caller: str, captioner: Any) -> None:
    """Reject a model that cannot be evaluated.

    Raises:
        ConfigError: it has no `generate`, or no `num_parameters`.
    """
    for name in ("generate(batch)", "num_parameters()"):
        if not hasattr(captioner, name.partition("(")[0]):
            raise ConfigError(
                f"{caller}: {type(captioner).__name__} has no {name}. Give a capdistill.Captioner, "
                "or an object with generate, one Hypothesis per image, and num_parameters."
            )


def open_source(captioner: Any, data: Any, batch_size: int, num_workers: int) -> Any:
    """Epochs of batches, or a one-shot iterator as it is: one pass is enough.

    Raises:
        ConfigError: the captioner cannot generate, or data of another kind.
        DataError: no image.
    """
    from capdistill.data.dataset import Splits
    from capdistill.data.loader import make_source

    require_generate("evaluate", captioner)
    if isinstance(data, Iterator):
        return data
    if isinstance(data, Splits):
        raise ConfigError(
            f"evaluate: a whole data set was given ({data.name}); expected one of its splits, such "
            f"as data.{next(iter(data.parts), 'val')}."
        )
    tokenizer: Any = getattr(captioner, "tokenizer", None)
    if isinstance(data, Dataset) and tokenizer is None:
        raise ConfigError(
            f"evaluate: {type(captioner).__name__} has no tokenizer, with which batches are made "
            "of a data set. Give it one, or give ready batches with references."
        )
    size = image_size(captioner)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "errors": "skip",
    }
    return make_source(data, tokenizer, image_size=size, **options)
