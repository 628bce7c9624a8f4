"""One pass of a model over data: captions, references, and what is kept for timing and reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from capdistill.compatibility import size_of
from capdistill.errors import ConfigError, DataError
from capdistill.gallery import Gallery
from capdistill.generation.config import GenerationConfig
from capdistill.measure import generates
from capdistill.outputs import Batch, part

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


def open_source(captioner: Any, data: Any, batch_size: int, workers: int) -> Any:
    """Epochs of batches, or the one-shot iterator itself: one pass is all that is needed."""
    from capdistill.data.loader import make_source

    if not hasattr(captioner, "generate"):
        raise ConfigError(
            f"evaluate: {type(captioner).__name__} has no generate(batch). Give a "
            "capdistill.Captioner, or an object whose generate gives one Hypothesis an image."
        )
    if isinstance(data, Iterator):
        return data
    size = size_of(captioner)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "errors": "skip"}
    return make_source(data, captioner.tokenizer, image_size=size, **options)
