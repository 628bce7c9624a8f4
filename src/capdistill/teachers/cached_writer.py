"""Writing the targets of a teacher: what is missing, a batch of images at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.data.dataset import CaptionData, Example
from capdistill.data.loader import Loader
from capdistill.errors import ConfigError, DataError
from capdistill.files import write_atomically
from capdistill.outputs import Batch
from capdistill.progress import progress as report_progress
from capdistill.runtime import autocast, on_device
from capdistill.saving import TOKENIZER, describe_tokenizer, hash_weights
from capdistill.teachers.cached import OUTPUT, CachedTeacher
from capdistill.teachers.cached_store import Column, Line, Store, locked, start
from capdistill.teachers.captions import cache_key, trunk_caches
from capdistill.teachers.directory import write_list
from capdistill.teachers.ensemble import Ensemble
from capdistill.tokenizer import WordTokenizer, pad_batch


@dataclass(frozen=True)
class Writer:
    """How targets are made; for the fields see `cache`.

    Args:
        kept: Outputs beside the last hidden vector.
        trunks: Directory of cached features; None runs the trunks.
    """

    image_size: int
    flip: bool
    kept: frozenset[str]
    batch_size: int
    num_workers: int
    device: torch.device
    precision: str
    trunks: Path | None
    overwrite: bool
    progress: bool

    def run(
        self, teacher: Any, parts: Sequence[tuple[CaptionData, int]], directory: Path
    ) -> CachedTeacher | Ensemble:
        """The cached teacher, once all targets are there.

        Args:
            teacher: A captioner, or an ensemble of them.
            parts: Data sets, each with its number of views.
            directory: Where the files go.
        """
        if not isinstance(teacher, Ensemble):
            self.write(teacher, parts, directory)
            return CachedTeacher(directory, teacher.tokenizer)
        places = {
            name: f"{number}-{re.sub('[^A-Za-z0-9_.-]+', '-', name)[:60]}"
            for number, name in enumerate(teacher.members, 1)
        }
        made: dict[str, CachedTeacher | Ensemble] = {
            name: self.run(member, parts, directory / places[name])
            for name, member in teacher.members.items()
        }
        weights = list(teacher.weights.values())
        about = {"name": teacher.name, "mixing": teacher.mixing, "weights": weights}
        write_list(directory, about, places)
        return Ensemble(made, weights, teacher.mixing, name=teacher.name)

    def write(
        self, teacher: Captioner, parts: Sequence[tuple[CaptionData, int]], directory: Path
    ) -> None:
        """Add the targets of a captioner that are missing."""
        about = {
            "teacher": teacher.name,
            "weights of the teacher": hash_weights(teacher.state_dict()),
            "vocabulary": describe_tokenizer(teacher.tokenizer)["vocabulary"],
            "longest caption": getattr(teacher.tokenizer, "max_length", None),
            "image_size": self.image_size,
            "flip": self.flip,
            "keep": sorted(self.kept),
            "precision": self.precision,
        }
        columns = _columns(teacher, self.kept)
        content = {
            "about": about,
            "name": teacher.name,
            "tokenizer": describe_tokenizer(teacher.tokenizer),
            "spec": _spec(teacher, self.kept),
            "columns": [list(column) for column in columns],
        }
        files = {OUTPUT: lambda path: _write_output(teacher, path)}
        if type(teacher.tokenizer) is WordTokenizer:
            files[TOKENIZER] = teacher.tokenizer.save
        with locked(directory):
            store = start(directory, content, self.overwrite, files)
            for data, views in parts:
                self.complete(store, teacher, data, views)

    def complete(self, store: Store, teacher: Captioner, data: CaptionData, views: int) -> None:
        """Add the targets of a data set that are missing."""
        missing = list(_missing(store, data, views))
        if not missing:
            return
        wanted = {data.image_ids[place]: captions for place, captions in missing}
        chosen = data.subset(place for place, _ in missing)
        examples = {example.image_id: example for example in chosen.examples}
        with on_device([teacher], self.device):
            loaders = self._loaders(teacher, data, chosen, views)
            batches = zip(*(loader.epoch(0) for loader in loaders), strict=True)
            what = f"Targets of {teacher.name}"
            shown = report_progress(
                _readable(batches, loaders[0], store),
                len(loaders[0]),
                what,
                unit="batch",
                show=self.progress,
            )
            for number, group in enumerate(shown):
                captions = [wanted[image_id] for image_id in group[0].image_ids]
                views_of = [_captioned(batch, captions, teacher) for batch in group]
                made = [self._targets(teacher, batch, not number) for batch in views_of]
                images = [examples[image_id] for image_id in group[0].image_ids]
                lines = _lines(store, images, captions, views_of)
                names = made[0].keys()
                store.append(lines, {n: np.concatenate([each[n] for each in made]) for n in names})
        skipped = {problem.file: problem.detail for problem in loaders[0].skipped}
        broken = [e for e in chosen.examples if str(e.path) in skipped]
        store.append([Line(e.image_id, 0, error=skipped[str(e.path)]) for e in broken], {})

    def _loaders(
        self, teacher: Captioner, data: CaptionData, chosen: CaptionData, views: int
    ) -> list[Loader]:
        """A loader of the chosen images for each view, in one order."""
        key = cache_key(teacher) if self.trunks is not None else None
        made = []
        for view in range(views):
            caches = {}
            if self.trunks is not None:
                caches = trunk_caches(
                    teacher,
                    data,
                    self.trunks,
                    self.precision,
                    progress=self.progress,
                    size=self.image_size,
                    view=view,
                    flip=self.flip,
                )
            loader = Loader(
                chosen,
                teacher.tokenizer,
                image_size=self.image_size,
                batch_size=self.batch_size,
                captions_per_image=1,
                num_workers=self.num_workers,
                caches=caches,
                with_images=key not in caches,
                view=view,
                flip=self.flip,
            )
            made.append(loader)
        return made

    def _targets(
        self, teacher: Captioner, batch: Batch, check: bool
    ) -> dict[str, np.ndarray[Any, Any]]:
        """(n, W) values of the valid tokens, and (I, N * D) features, as float16."""
        valid = batch.target_mask  # (B, T - 1)
        need = frozenset({"logits", "hidden", *self.kept})
        with torch.no_grad(), autocast(self.device, self.precision):
            output = teacher(batch.to(self.device), need=need)
        found: dict[str, Tensor] = {"hidden": output.hidden[-1].cpu()[valid]}
        if "attention" in self.kept:
            found["attention"] = output.attention.cpu()[valid]
        if "features" in self.kept:
            found["features"] = output.features.cpu().flatten(1)
        halves = {name: value.half() for name, value in found.items()}
        for name, value in halves.items():
            if not value.isfinite().all():
                raise ConfigError(
                    f"cache keeps {name} as float16, but '{teacher.name}' has values that are NaN "
                    "or larger than 65504. Train with the teacher itself."
                )
        if check:
            _require_output_layer(teacher, output.logits.cpu()[valid], halves["hidden"])
        return {name: value.numpy() for name, value in halves.items()}


def _columns(teacher: Captioner, kept: frozenset[str]) -> list[Column]:
    encoder = teacher.encoder
    columns = [Column("hidden", "float16", teacher.decoder.hidden_dims[-1])]
    if "attention" in kept:
        columns.append(Column("attention", "float16", encoder.tokens))
    if "features" in kept:
        columns.append(Column("features", "float16", encoder.tokens * encoder.dim, "image"))
    return columns


def _spec(teacher: Captioner, kept: frozenset[str]) -> dict[str, Any]:
    spec = teacher.spec()
    return {
        "feature_dim": spec.feature_dim if "features" in kept else None,
        "tokens": spec.tokens if kept else None,
        "prefix_tokens": spec.prefix_tokens,
        "grid": spec.grid if kept else None,
    }


def _write_output(teacher: Captioner, path: Path) -> None:
    weight, bias = teacher.decoder.output_layer()
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    data = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    content = to_safetensors(data)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _missing(store: Store, data: CaptionData, views: int) -> Iterator[tuple[int, list[str]]]:
    """Places of the images that lack targets, and the captions to add.

    Raises:
        DataError: the file of an image is another one than before.
    """
    index = store.index
    for place, example in enumerate(data.examples):
        captions = list(dict.fromkeys(example.captions))
        before = index.sizes.get(example.image_id)
        if before is not None and before != _size(example):
            raise DataError(
                f"Image '{example.image_id}' ({example.path}) had {before} bytes when the targets "
                f"in {store.directory} were cached and has {_size(example)} now. Cache images "
                "with equal ids in different directories, or use overwrite=True."
            )
        lacking = [c for c in captions if not index.has(example.image_id, [c], views)]
        if lacking or not index.has(example.image_id, [], views):
            yield place, lacking


def _size(example: Example) -> int:
    try:
        return example.path.stat().st_size
    except OSError:
        return 0


def _readable(groups: Iterator[Any], loader: Loader, store: Store) -> Iterator[Any]:
    """The batches; none if no image can be read although others could be."""
    try:
        yield from groups
    except DataError:
        if not store.index.entries or len(loader.skipped) < loader.num_images:
            raise


def _captioned(batch: Batch, captions: Sequence[Sequence[str]], teacher: Captioner) -> Batch:
    """The batch with all captions of its images; those with fewer get rows without targets."""
    k = max(1, *(len(texts) for texts in captions)) if captions else 1
    texts = [text for each in captions for text in (*each, *[""] * (k - len(each)))]
    tokenizer = teacher.tokenizer
    ids, mask = pad_batch([tokenizer.encode(text) for text in texts], tokenizer.pad_id)
    real = torch.tensor([row % k < len(captions[row // k]) for row in range(len(texts))])
    mask[:, 1:] &= real[:, None]
    return replace(batch, input_ids=ids, mask=mask, captions=tuple(texts), references=None)


def _lines(
    store: Store,
    examples: Sequence[Example],
    captions: Sequence[Sequence[str]],
    views: Sequence[Batch],
) -> list[Line]:
    """The lines of a batch of images, whose rows are appended view by view."""
    lengths = views[0].target_mask.sum(1).view(len(examples), -1)  # (I, k)
    per_view = int(lengths.sum())
    token, image = store.index.ends
    lines = []
    for example, texts, counts in zip(examples, captions, lengths.tolist(), strict=True):
        tokens = [token + view * per_view for view in range(len(views))]
        images = [image + view * len(examples) for view in range(len(views))]
        line = Line(
            example.image_id, _size(example), [*texts], counts[: len(texts)], tokens, images
        )
        lines.append(line)
        token, image = token + sum(counts), image + 1
    return lines


@torch.no_grad()
def _require_output_layer(teacher: Captioner, logits: Tensor, hidden: Tensor) -> None:
    """Check that the output matrix makes the teacher's logits of its last hidden vectors.

    Raises:
        ConfigError: it does not.
    """
    weight, bias = teacher.decoder.output_layer()
    made = F.linear(hidden.to(weight), weight, bias).cpu()
    gap, scale = float((made - logits).abs().max()), float(logits.abs().max())
    if not gap <= _TOLERANCE * max(scale, 1.0):
        raise ConfigError(
            f"cache: '{teacher.name}' gives logits that differ by {gap:.3g} from its last hidden "
            f"vector times {type(teacher.decoder).__name__}.output_layer(). Let output_layer() and "
            "hidden[-1] be what the logits are made of."
        )


_TOLERANCE = 0.05  # of the largest logit: half precision passes, another matrix does not
