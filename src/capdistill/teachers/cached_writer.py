"""Writing the targets of a teacher: what is missing, a batch of images at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.collate import BatchIndex
from capdistill.data.dataset import CaptionData
from capdistill.data.loader import Loader
from capdistill.errors import ConfigError, DataError
from capdistill.feature_files import CacheType
from capdistill.files import write_atomically
from capdistill.losses.divergence import full
from capdistill.outputs import Batch, select_images
from capdistill.progress import progress as report_progress
from capdistill.ranks import Ranks
from capdistill.runtime import autocast, on_device, stable_hash
from capdistill.saving import IDENTITY, TOKENIZER, describe_tokenizer, hash_weights, is_saved
from capdistill.teachers.cached import OUTPUT, CachedTeacher, kept_mass
from capdistill.teachers.cached_index import Block, Column, Line
from capdistill.teachers.cached_store import Store, locked, start
from capdistill.teachers.captions import cache_key, trunk_caches
from capdistill.teachers.directory import write_list
from capdistill.teachers.ensemble import Ensemble, leaves
from capdistill.tokenizer import pad_batch
from capdistill.weights import StateOf


class Words(NamedTuple):
    """Which words are kept of each target, instead of the last hidden vector.

    Args:
        k: How many, the most probable ones.
        temperatures: Those at which the probability of the others is kept.
        min_mass: The least probability that they must have.
    """

    k: int
    temperatures: tuple[float, ...]
    min_mass: float

    def columns(self, vocabulary: int) -> list[Column]:
        """Their arrays."""
        ids = Column("ids", "uint16" if vocabulary <= 2**16 else "int32", self.k)
        rest = Column("rest", "float32", len(self.temperatures))
        return [ids, Column("logits", "float16", self.k), rest]

    def of(self, logits: Tensor) -> dict[str, Tensor]:
        """(n, V) logits to the words, their logits and the log-sum-exp of the rest."""
        logits = full(logits)
        top, ids = logits.topk(self.k)
        others = logits.scatter(-1, ids, -torch.inf) - top[:, :1]
        rest = [(others / each).logsumexp(-1) for each in self.temperatures]
        return {
            "ids": ids,
            "logits": (top - top[:, :1]).clamp(min=-6e4),
            "rest": torch.stack(rest, -1),
        }

    def require_mass(self, found: dict[str, Tensor], name: str) -> None:
        """Refuse words that have too small a probability on average.

        Raises:
            ConfigError: with the figure at each temperature.
        """
        masses = kept_mass(found["logits"], found["rest"], self.temperatures)
        if min(masses.values()) < self.min_mass:
            shown = ", ".join(f"{mass:.0%} at T = {t:g}" for t, mass in masses.items())
            raise ConfigError(
                f"cache: the {self.k} most probable words of '{name}' have a probability of "
                f"{shown}; at least {self.min_mass:.0%} is asked for. Leave top_k out, which keeps "
                "all words by the hidden vector; or give a larger top_k, a lower temperature, or a "
                "lower min_mass."
            )


@dataclass(frozen=True)
class Writer:
    """How targets are made; for the fields see `cache`.

    Args:
        own_sizes: Each member of an ensemble reads images at its own size instead.
        kept: Outputs beside the last hidden vector.
        words: The words to keep instead of it.
        trunks: Directory of cached features; None runs the trunks.
        ranks: The processes that share the work; all of them call it.
    """

    image_size: int
    own_sizes: bool
    flip: bool
    kept: frozenset[str]
    words: Words | None
    batch_size: int
    num_workers: int | None
    device: torch.device
    precision: str
    trunks: Path | None
    dtype: CacheType
    overwrite: bool
    progress: bool
    ranks: Ranks

    def run(
        self, teacher: Any, parts: Sequence[tuple[CaptionData, int]], directory: Path
    ) -> CachedTeacher | Ensemble:
        """The cached teacher, once all targets are there.

        Args:
            teacher: A captioner, or an ensemble of them.
            parts: Data sets, each with its number of views.
            directory: Where the files go.
        """
        if not isinstance(teacher, Ensemble) or self.words is not None:
            self.write(teacher, parts, directory)
            return CachedTeacher(directory, teacher.tokenizer)
        places = {
            name: f"{number}-{re.sub('[^A-Za-z0-9_.-]+', '-', name)[:60]}"
            for number, name in enumerate(teacher.members, 1)
        }
        made: dict[str, CachedTeacher | Ensemble] = {
            name: self._for(member).run(member, parts, directory / places[name])
            for name, member in teacher.members.items()
        }
        weights = list(teacher.weights.values())
        about = {"name": teacher.name, "mixing": teacher.mixing, "weights": weights}
        write_list(directory, about, places)
        return Ensemble(made, weights, teacher.mixing, name=teacher.name)

    def _for(self, member: Any) -> Writer:
        return replace(self, image_size=image_size(member)) if self.own_sizes else self

    def write(
        self, teacher: Any, parts: Sequence[tuple[CaptionData, int]], directory: Path
    ) -> None:
        """Add the targets of a teacher that are missing: the ranks compute them, rank 0 writes."""
        ranks, content = self.ranks, self._content(teacher)
        if ranks.several:
            texts = [(e.image_id, e.captions) for data, _ in parts for e in data.examples]
            ranks.require_equal({**content["about"], "data": stable_hash(f"{texts}")})
        made: list[Store] = []
        with locked(directory) if ranks.main else nullcontext():
            ranks.on_main(lambda: made.append(self._start(teacher, content, directory)))
            store = made[0] if made else None
            with on_device([teacher], self.device):
                for each, views in parts:
                    missing = ranks.on_main(self._missing, store, each, views)
                    if missing:
                        caches = self._trunks(teacher, each, views)
                        self.complete(store, teacher, each, missing, views, caches)
        if not ranks.main:  # nothing is left to do where all see the same files
            replace(self, ranks=Ranks(), overwrite=False).write(teacher, parts, directory)
        ranks.wait()

    def _start(self, teacher: Any, content: dict[str, Any], directory: Path) -> Store:
        files = {} if self.words else {OUTPUT: lambda path: _write_output(teacher, path)}
        if is_saved(teacher.tokenizer):
            files[TOKENIZER] = teacher.tokenizer.save
        return start(directory, content, self.overwrite, files)

    def _content(self, teacher: Any) -> dict[str, Any]:
        """What targets.json says; "about" is all that the targets depend on."""
        mixtures = [m for m in teacher.modules() if isinstance(m, Ensemble)]
        about = {
            "teacher": teacher.name,
            "weights of the teacher": hash_weights(StateOf(teacher)),
            "mixture": [f"{each.mixing} {each.weights}" for each in mixtures],
            "vocabulary": describe_tokenizer(teacher.tokenizer)["vocabulary"],
            "longest caption": getattr(teacher.tokenizer, "max_length", None),
            "image_size": self.image_size,
            "flip": self.flip,
            "keep": sorted(self.kept),
            "top_k": self.words and self.words.k,
            "temperatures": list(self.words.temperatures) if self.words else [],
            "precision": self.precision,
        }
        columns = self.words.columns(len(teacher.tokenizer.vocabulary)) if self.words else []
        return {
            "about": about,
            "name": teacher.name,
            "tokenizer": describe_tokenizer(teacher.tokenizer),
            "spec": _spec(teacher, self.kept),
            "columns": [list(c) for c in (*columns, *_columns(teacher, self.kept, not columns))],
        }

    def complete(
        self,
        store: Store | None,
        teacher: Any,
        data: CaptionData,
        missing: Sequence[Line],
        views: int,
        caches: Sequence[dict[str, Any]],
    ) -> None:
        """Add missing targets: each rank takes every N-th batch, rank 0 writes them in order."""
        ranks, size = self.ranks, self.batch_size
        wanted = {line.image_id: line for line in missing}
        chosen = data.subset(n for n, image_id in enumerate(data.image_ids) if image_id in wanted)
        loaders = list(self._loaders(teacher, chosen, views, caches))
        begins = range(0, len(missing), size)
        batches = [(0, tuple(range(i, min(i + size, len(missing))))) for i in begins]
        mine = self._blocks(teacher, wanted, loaders, batches)
        shown = report_progress(
            range(0, len(batches), ranks.world_size),
            len(batches),
            f"Targets of {teacher.name}",
            unit="batch",
            show=self.progress and ranks.main,
            size=lambda first: min(ranks.world_size, len(batches) - first),
        )
        for _ in shown:
            for block in ranks.gather_on_main(next(mine, None)):
                if store is not None and block is not None:
                    store.add(block)
        for loader in loaders:
            ranks.gather_problems(loader)
        if store is not None:
            _add_unreadable(store, chosen, loaders)

    def _blocks(
        self,
        teacher: Any,
        wanted: Mapping[str, Line],
        loaders: Sequence[Loader],
        batches: Sequence[BatchIndex],
    ) -> Iterator[Block | None]:
        """The targets of the batches of this rank; None for one without a readable image."""
        checked = not self.ranks.main  # as a single process does
        mine = [*batches[self.ranks.rank :: self.ranks.world_size]]
        for results in zip(*(loader.read(mine) for loader in loaders), strict=True):
            group = _in_all_views([each.batch for each in results])
            if not group:
                yield None
                continue
            lines = [wanted[image_id] for image_id in group[0].image_ids]
            texts = [line.captions for line in lines]
            shown = [_captioned(batch, texts, teacher) for batch in group]
            made = [self._targets(teacher, batch, not checked) for batch in shown]
            checked = True
            lengths = shown[0].target_mask.sum(1).view(len(lines), -1)  # (I, k)
            arrays = {name: np.concatenate([each[name] for each in made]) for name in made[0]}
            yield Block(lines, lengths.tolist(), len(group), arrays)

    def _missing(self, store: Store | None, data: CaptionData, views: int) -> list[Line]:
        """A line of each image of a data set that lacks targets, with the captions that do.

        Raises:
            DataError: the file of an image is another one than before.
        """
        assert store is not None  # this is rank 0
        contents = store.require_unchanged(data, self.progress)
        found = []
        for example in data.examples:
            has = partial(store.index.has, example.image_id, views=views)
            lacking = [c for c in dict.fromkeys(example.captions) if not has([c])]
            if lacking or not has([]):
                found.append(Line(example.image_id, contents.get(example.image_id, ""), lacking))
        return found

    def _trunks(self, teacher: Any, data: CaptionData, views: int) -> list[dict[str, Any]]:
        """The cached features of each view; none if trunks are to run."""
        if self.trunks is None:
            return []
        how: dict[str, Any] = {"size": self.image_size, "flip": self.flip, "dtype": self.dtype}
        how |= {"progress": self.progress, "ranks": self.ranks, "views": views}
        return trunk_caches(teacher, data, self.trunks, self.precision, **how)

    def _loaders(
        self, teacher: Any, data: CaptionData, views: int, caches: Sequence[dict[str, Any]]
    ) -> Iterator[Loader]:
        """A loader of each view of the images, in one order."""
        keys = [cache_key(leaf) for leaf in leaves(teacher)] if caches else [None]
        for view in range(views):
            cached = caches[view] if caches else {}
            yield Loader(
                data,
                teacher.tokenizer,
                image_size=self.image_size,
                batch_size=self.batch_size,
                captions_per_image=1,
                num_workers=self.num_workers,
                caches=cached,
                with_images=not all(key in cached for key in keys),
                view=view,
                flip=self.flip,
            )

    def _targets(self, teacher: Any, batch: Batch, first: bool) -> dict[str, np.ndarray[Any, Any]]:
        """(n, W) values of the valid tokens, and (I, N * D) features."""
        valid = batch.target_mask.to(self.device)  # (B, T - 1)
        need = frozenset({"logits", *self.kept, *(() if self.words else ("hidden",))})
        with torch.no_grad(), autocast(self.device, self.precision):
            output = teacher(batch.to(self.device), need=need)
        logits = output.logits[valid] if self.words or first else output.logits
        found = self.words.of(logits) if self.words else {"hidden": output.hidden[-1][valid]}
        if "attention" in self.kept:
            found["attention"] = output.attention[valid]
        if "features" in self.kept:
            found["features"] = output.features.flatten(1)
        halves = {n: v if n in ("ids", "rest") else v.half() for n, v in found.items()}
        for name in halves.keys() - {"rest"}:
            if not halves[name].isfinite().all():
                raise ConfigError(
                    f"cache keeps {name} as float16, but '{teacher.name}' has values that are NaN "
                    "or larger than 65504. Train with the teacher itself."
                )
        if first and self.words:
            self.words.require_mass(found, teacher.name)
        elif first:
            _require_output_layer(teacher, logits, halves["hidden"])
        return {name: value.cpu().numpy() for name, value in halves.items()}


def _columns(teacher: Any, kept: frozenset[str], hidden: bool) -> list[Column]:
    columns = []
    if hidden:
        columns.append(Column("hidden", "float16", teacher.decoder.hidden_dims[-1]))
    if "attention" in kept:
        columns.append(Column("attention", "float16", teacher.encoder.tokens))
    if "features" in kept:
        width = teacher.encoder.tokens * teacher.encoder.dim
        columns.append(Column("features", "float16", width, "image"))
    return columns


def _spec(teacher: Any, kept: frozenset[str]) -> dict[str, Any]:
    if not kept:
        return {"feature_dim": None, "tokens": None, "prefix_tokens": 0, "grid": None}
    spec = teacher.spec()
    return {
        "feature_dim": spec.feature_dim if "features" in kept else None,
        "tokens": spec.tokens,
        "prefix_tokens": spec.prefix_tokens,
        "grid": spec.grid,
    }


def _write_output(teacher: Captioner, path: Path) -> None:
    weight, bias = teacher.decoder.output_layer()
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    data = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    content = to_safetensors(data, {IDENTITY: hash_weights(data)})
    write_atomically(path, lambda new: new.write_bytes(content))


def _in_all_views(batches: Sequence[Batch | None]) -> list[Batch]:
    """Batches of the views of the same images, without those that a view lacks."""
    given = [batch for batch in batches if batch is not None]
    common = set.intersection(*({*b.image_ids} for b in given)) if given else set[str]()
    if not common or len(given) < len(batches):
        return []
    if all(batch.num_images == len(common) for batch in given):
        return given
    places = [[n for n, i in enumerate(b.image_ids) if i in common] for b in given]
    return [select_images(batch, chosen) for batch, chosen in zip(given, places, strict=True)]


def _add_unreadable(store: Store, data: CaptionData, loaders: Sequence[Loader]) -> None:
    """List the images that could not be read.

    Raises:
        DataError: none of them, and no other, could be read.
    """
    told = {each.file: each.detail for loader in loaders for each in loader.skipped}
    errors = store.index.errors
    broken = [(e.image_id, told[str(e.path)]) for e in data.examples if str(e.path) in told]
    if not store.index.entries:
        none = f"None of the {len(data)} images can be used."
        raise DataError(f"{none}\n{loaders[0].skipped}")
    store.append([Line(i, error=why) for i, why in broken if errors.get(i) != why], {})


def _captioned(batch: Batch, captions: Sequence[Sequence[str]], teacher: Any) -> Batch:
    """The batch with all captions of its images; those with fewer get rows without targets."""
    k = max(1, *(len(texts) for texts in captions)) if captions else 1
    texts = [text for each in captions for text in (*each, *[""] * (k - len(each)))]
    tokenizer = teacher.tokenizer
    ids, mask = pad_batch([tokenizer.encode(text) for text in texts], tokenizer.pad_id)
    real = torch.tensor([row % k < len(captions[row // k]) for row in range(len(texts))])
    mask[:, 1:] &= real[:, None]
    changed: dict[str, Any] = {"captions": tuple(texts), "caption_weights": None}
    return replace(batch, input_ids=ids, mask=mask, references=None, **changed)


@torch.no_grad()
def _require_output_layer(teacher: Captioner, logits: Tensor, hidden: Tensor) -> None:
    """Check that the output matrix makes the teacher's logits of its last hidden vectors.

    Raises:
        ConfigError: it does not.
    """
    weight, bias = teacher.decoder.output_layer()
    made = F.linear(hidden.to(weight), weight, bias)
    gap, scale = float((made - logits).abs().max()), float(logits.abs().max())
    if not gap <= _TOLERANCE * max(scale, 1.0):
        raise ConfigError(
            f"cache: '{teacher.name}' gives logits that differ by {gap:.3g} from its last hidden "
            f"vector times {type(teacher.decoder).__name__}.output_layer(). Let output_layer() and "
            "hidden[-1] be what the logits are made of."
        )


_TOLERANCE = 0.05  # of the largest logit: half precision passes, another matrix does not
