"""`CachedTeacher`: what a teacher predicts for each caption of a data set, read from disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from heapq import nlargest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.data.dataset import CaptionData
from capdistill.data.loader import Loader
from capdistill.errors import CheckpointError, ConfigError, DataError, shortened
from capdistill.files import user_path
from capdistill.generation.decode import CaptionGenerator
from capdistill.losses.base import DistillationLoss
from capdistill.losses.hidden import HiddenKD
from capdistill.losses.token import LogitsLoss, words_missing
from capdistill.outputs import OUTPUTS, Batch, CaptionerOutput, ModelSpec, TopWords
from capdistill.saving import TARGETS, find_tokenizer, read_weights
from capdistill.teachers.cached_store import Store
from capdistill.tokenizer import Tokenizer

OUTPUT = "output.safetensors"
WORDS = ("ids", "logits", "rest")
_ANEW = "Call capdistill.teachers.cache(teacher, data, directory) again, which adds what is missing"


class CachedTeacher(CaptionGenerator):
    """A teacher whose targets `capdistill.teachers.cache` wrote to a directory.

    It takes the teacher's place in a `Distiller`, alone or among several, and does not run the
    teacher: it reads the vector before the vocabulary projection at every word (float16) and
    multiplies it by the teacher's output matrix. The logits are those of the teacher up to the
    rounding of that vector, so divergences at any temperature are, too. Batches must show the views
    of the images and the captions that were cached.

    Example:
        >>> import capdistill as cd, tempfile
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> teacher, student = (cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer)
        ...                     for role in ("teacher", "student"))
        >>> train = data.train.subset(4)
        >>> cached = cd.teachers.cache(teacher, train, tempfile.mkdtemp(), progress=False)
        >>> cached
        CachedTeacher 'debug_teacher': hidden, logits of 4 images
        >>> distiller = cd.Distiller(cached, student, losses={"token": "token"}, augment=False,
        ...                          progress=False)
        >>> distiller.fit(train, epochs=1, batch_size=2).epochs[0]["step"]
        2

    Args:
        directory: As given to `cache`.
        tokenizer: The teacher's tokenizer, unless it is in the directory.

    Attributes:
        outputs: What it gives of "logits", "hidden" (the last entry alone), "features" and
            "attention".
        made_up: While it is True, batches need not have targets: they get zeros. Checks of shapes
            use it.

    Raises:
        CheckpointError: no such directory, or damaged files.
    """

    teacher: Tensor  # the hash of its weights, so that the state of a run names it

    def __init__(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.directory = user_path(directory, CheckpointError)
        self.store = Store(self.directory)
        content = self.store.content
        self.tokenizer = find_tokenizer(self.directory, content, tokenizer)
        self.name = str(content["name"])
        self.weight: nn.Parameter | None = None  # (V, H)
        self.bias: nn.Parameter | None = None  # (V,)
        if "hidden" in self.store.columns:
            self._load_output_layer()
        key = bytes.fromhex(content["about"]["weights of the teacher"])
        self.register_buffer("teacher", torch.tensor(list(key), dtype=torch.uint8))
        self.outputs = frozenset({"logits", *OUTPUTS.intersection(self.store.columns)})
        self.temperatures: tuple[float, ...] = tuple(content["about"]["temperatures"])
        self.made_up, self._maps = False, dict[str, np.ndarray[Any, Any]]()
        self.eval()

    def _load_output_layer(self) -> None:
        path = self.directory / OUTPUT
        try:
            weights = read_weights(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Or cache the targets anew.") from error
        words, width = len(self.tokenizer.vocabulary), self.store.columns["hidden"].width
        shapes = {"weight": (words, width), "bias": (words,)}
        if "weight" not in weights or any(
            tuple(value.shape) != shapes.get(name) for name, value in weights.items()
        ):
            raise CheckpointError(
                f"{path} holds {', '.join(f'{n} {tuple(v.shape)}' for n, v in weights.items())}; "
                f"expected weight {shapes['weight']} and perhaps bias {shapes['bias']}."
            )
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def __repr__(self) -> str:
        images = f"{len(self.store.index.entries):,} images"
        if self.top_k is None:
            return f"CachedTeacher '{self.name}': {', '.join(sorted(self.outputs))} of {images}"
        masses = ", ".join(f"{mass:.0%} at T = {t:g}" for t, mass in self.mass().items())
        return f"CachedTeacher '{self.name}': top {self.top_k} words of {images} ({masses})"

    @property
    def top_k(self) -> int | None:
        """How many words are kept of each target; None if all are known."""
        return self.store.columns["ids"].width if "ids" in self.store.columns else None

    def mass(self, tokens: int = 1000) -> dict[float, float]:
        """Temperature -> mean probability of the kept words together, over the first tokens."""
        logits, rest = (
            torch.from_numpy(self.store.array(name)[:tokens].copy()) for name in ("logits", "rest")
        )
        return kept_mass(logits, rest, self.temperatures)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # files are opened again

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """The targets of a batch, aligned with `batch.targets`.

        Args:
            batch: Captions and views that were cached.
            need: As for `Captioner`; logits if nothing is named.

        Raises:
            ConfigError: captions sampled from the student, random views, or outputs
                that were not kept.
            DataError: a caption of the batch was not cached.
        """
        if need - self.outputs:
            raise ConfigError(self.lack(need))
        found: dict[str, Any] = {}
        if need & {"logits", "hidden", "attention"} or not need:
            rows, places = self._places(batch)
            index = torch.from_numpy(places).to(self.teacher.device)

            def spread(values: Tensor) -> Tensor:  # (n, W) to (B, T - 1, W), 0 in the padding
                size = batch.targets.shape
                padded = values.new_zeros(size[0] * size[1], values.shape[1])
                return padded.index_copy_(0, index, values).view(*size, -1)

            if self.weight is None:
                if "logits" in need or not need:
                    found["words"] = self._words({n: spread(self._read(n, rows)) for n in WORDS})
            elif need & {"logits", "hidden"} or not need:
                hidden = self._read("hidden", rows)  # (n, H)
                if "hidden" in need:
                    found["hidden"] = (spread(hidden),)
                if "logits" in need or not need:
                    found["logits"] = spread(self._logits(hidden))
            if "attention" in need:
                found["attention"] = spread(self._read("attention", rows))
        if "features" in need:
            found["features"] = self._features(batch)
        return CaptionerOutput(mask=batch.target_mask, **found)

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.weight is not None
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def _places(self, batch: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For each target token: its row in the arrays, and its place among the B * (T - 1)."""
        if self.made_up:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        views, k = self._views(batch), batch.captions_per_image
        rows, length = batch.targets.shape
        starts, lengths = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for row, caption in enumerate(batch.captions):
            image_id, view = batch.image_ids[row // k], views[row // k]
            found = self.store.index.rows(image_id, view, caption)
            if found is not None:
                starts[row], lengths[row] = found
            elif caption:  # an image without captions has an empty one, which is no target
                raise self._missing(image_id, view, caption)
        if batch.mask.device.type == "cpu":
            self._require_lengths(batch, lengths)
        lengths = np.minimum(lengths, length)  # a shorter beginning has the same targets
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        begins = np.arange(rows) * length
        return np.repeat(starts, lengths) + within, np.repeat(begins, lengths) + within

    def _views(self, batch: Batch) -> tuple[int, ...]:
        if batch.sampled is not None:
            raise ConfigError(no_samples(self))
        if batch.views is None:
            raise ConfigError(
                f"'{self.name}' has cached targets of fixed views of the images, but the batch "
                "does not say which views it shows: they are cropped or mirrored at random. Set "
                "augment=False and flip=False, or cache_features=True with cache_views= as cached; "
                "in batches of your own, give Batch(views=...)."
            )
        for image_id, view in zip(batch.image_ids, batch.views, strict=True):
            self.store.require_whole(image_id, view, self._array)
        return batch.views

    def _require_lengths(self, batch: Batch, lengths: np.ndarray[Any, Any]) -> None:
        short = batch.target_mask.sum(1).numpy() > lengths
        if short.any():
            row = int(short.nonzero()[0][0])
            image, caption = row // batch.captions_per_image, batch.captions[row]
            if not lengths[row]:
                raise self._missing(batch.image_ids[image], self._views(batch)[image], caption)
            raise DataError(
                f"'{self.name}' has {lengths[row]} cached targets of {shortened(caption)}, but the "
                f"batch has {int(batch.target_mask[row].sum())}. The student's tokenizer splits it "
                "differently; give both models one tokenizer."
            )

    def _missing(self, image_id: str, view: int, caption: str) -> DataError:
        reason = self.store.index.errors.get(image_id)
        if reason is not None:
            return DataError(f"'{self.name}': image '{image_id}' could not be read ({reason}).")
        return DataError(
            f"'{self.name}' has no cached targets of image '{image_id}', view {view}, caption "
            f"{shortened(caption)}. {_ANEW}."
        )

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self._maps:
            self._maps[name] = self.store.array(name)
        return self._maps[name]

    def _read(self, name: str, rows: np.ndarray[Any, Any] | list[int]) -> Tensor:
        """(n, W) rows of an array, on the device."""
        values = torch.from_numpy(self._array(name)[rows]).to(
            self.teacher.device, non_blocking=True
        )
        return values.long() if name == "ids" else values.float()

    def _words(self, found: Mapping[str, Tensor]) -> TopWords:
        rest = dict(zip(self.temperatures, found["rest"].unbind(-1), strict=True))
        return TopWords(found["ids"], found["logits"], rest)

    def _features(self, batch: Batch) -> Tensor:
        """(I, N, D) features."""
        spec = self.spec()
        shape = batch.num_images, spec.tokens or 0, spec.feature_dim or 0
        if self.made_up:
            return torch.zeros(shape, device=self.teacher.device)
        rows = []
        for image_id, view in zip(batch.image_ids, self._views(batch), strict=True):
            row = self.store.index.image_row(image_id, view)
            if row is None:
                raise self._missing(image_id, view, "(any)")
            rows.append(row)
        return self._read("features", rows).view(shape)

    def lack(self, needs: Iterable[str]) -> str:
        """The message about outputs that are needed and were not kept."""
        lacking = sorted({*needs} - self.outputs)
        kept = ", ".join(f'"{name}"' for name in lacking)
        return (
            f"'{self.name}' has no cached {', '.join(lacking)}. Keep it: "
            f"capdistill.teachers.cache(teacher, data, directory, keep=[{kept}], overwrite=True)."
        )

    def require(self, source: Any, progress: bool = False) -> None:
        """Check that it has the targets of all batches of a source, as far as that can be known.

        Args:
            source: A loader; of any other source, each batch is checked when it is read.
            progress: Show the progress of hashing images, which takes time where they are new.

        Raises:
            ConfigError: other views, or random ones.
            DataError: images that have changed, captions that were not cached, or that the
                loader's tokenizer splits differently.
        """
        if not isinstance(source, Loader) or not isinstance(source.data, CaptionData):
            return
        collator, index, data = source.collator, self.store.index, source.data
        views = max(collator.views, collator.view + 1)
        chance = views == 1 and (collator.random_crop or collator.flip)
        mirrored = bool(self.store.content["about"]["flip"])
        if chance or (views > 1 and collator.flip != mirrored):
            raise ConfigError(
                f"'{self.name}' has cached targets of fixed views (mirrored: {mirrored}), but the "
                f"training images are {'cropped or mirrored at random' if chance else 'mirrored'} "
                f"(mirrored: {collator.flip}). Set augment=False and flip=False; or give "
                "cache_views= and flip= to capdistill.teachers.cache as to fit, with "
                "cache_features=True."
            )
        wanted = (
            (e, e.captions if source.train else e.captions[: collator.k]) for e in data.examples
        )
        lacking = [
            example.image_id
            for example, captions in wanted
            if example.image_id not in index.errors
            and captions
            and not index.has(example.image_id, captions, views)
        ]
        if lacking:
            more = "" if source.train else " Validation images are cached by val=data.val."
            raise DataError(
                f"'{self.name}' lacks cached targets of {len(lacking)} of {len(data)} images of "
                f"{data.name}, such as '{lacking[0]}' ({views} views). {_ANEW}.{more}"
            )
        self.store.require_unchanged(data, progress)
        given: Any = collator.tokenizer
        whole = getattr(given, "full_vocabulary", given.vocabulary)
        if tuple(whole) != tuple(self.tokenizer.vocabulary):
            return  # it reads its own ids of the captions, or features alone
        ids = getattr(given, "full_ids", range(len(whole)))
        for caption in nlargest(100, (c for e in data.examples for c in e.captions), key=len):
            theirs, mine = [ids[i] for i in given.encode(caption)], self.tokenizer.encode(caption)
            if theirs != mine:
                raise DataError(
                    f"'{self.name}': its tokenizer splits {shortened(caption)} into {mine}, the "
                    f"student's into {theirs}. Give both models one tokenizer."
                )

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification of what is kept."""
        about: Mapping[str, Any] = self.store.content["spec"]
        grid = about["grid"]
        return ModelSpec(
            feature_dim=about["feature_dim"],
            tokens=about["tokens"],
            prefix_tokens=about["prefix_tokens"],
            grid=None if grid is None else (grid[0], grid[1]),
            hidden_dims=() if self.weight is None else (self.weight.shape[1],),
            vocabulary=self.tokenizer.vocabulary,
            has_attention="attention" in self.outputs,
            name=self.name,
        )

    @property
    def image_size(self) -> None:
        """None: it reads no images, so the student's are loaded at the student's own size."""

    def decoding(self, images: Batch | Tensor) -> NoReturn:
        """Not possible: there are targets of the cached captions alone."""
        raise ConfigError(
            f"'{self.name}' has cached targets and cannot caption images. Give the teacher itself."
        )


def is_cached(directory: Path) -> bool:
    """Whether a directory holds cached targets."""
    return (directory / TARGETS).is_file()


def cached_parts(model: nn.Module | None) -> list[CachedTeacher]:
    """The cached teachers in a model."""
    parts = [] if model is None else model.modules()
    return [part for part in parts if isinstance(part, CachedTeacher)]


def no_samples(cached: CachedTeacher) -> str:
    """The message about captions that were not known when the targets were cached."""
    return (
        f"'{cached.name}' has cached targets of the captions of the data, but captions that are "
        "sampled from the student are new in every step. Give the teacher itself."
    )


def require_kept(losses: Mapping[str, DistillationLoss], teachers: Mapping[str, nn.Module]) -> None:
    """Refuse losses that need more of a cached teacher than it keeps.

    Args:
        losses: By term.
        teachers: Those that a loss may name; the only one is read by losses that name none.

    Raises:
        ConfigError: with the fix.
    """
    for term, loss in losses.items():
        only = next(iter(teachers)) if len(teachers) == 1 else None
        teacher = teachers.get(loss.teacher or only or "")
        teacher = getattr(teacher, "retokenized", teacher)  # one that reads another vocabulary
        if not isinstance(teacher, CachedTeacher) or not loss.from_teacher:
            continue
        if loss.needs - teacher.outputs:
            other = ', or compare fewer: match="pooled"' if "attention" in loss.needs else ""
            raise ConfigError(f"losses: '{term}': {teacher.lack(loss.needs)[:-1]}{other}.")
        if teacher.top_k is not None and "logits" in loss.needs:
            if not isinstance(loss, LogitsLoss):
                raise ConfigError(f"losses: '{term}': {words_missing(loss, teacher.top_k)}")
            loss.require_words(teacher.top_k, teacher.temperatures)
        if isinstance(loss, HiddenKD) and loss.layers not in ("last", {-1: -1}):
            raise ConfigError(
                f"losses: '{term}' pairs layers {loss.layers!r}, but '{teacher.name}' keeps the "
                'last hidden vector alone. Use layers="last", or give the teacher itself.'
            )


def kept_mass(logits: Tensor, rest: Tensor, temperatures: Iterable[float]) -> dict[float, float]:
    """Temperature -> mean probability of the kept words, of (n, k) logits and (n, temperatures)."""
    pairs = zip(temperatures, rest.unbind(-1), strict=True)
    odds = ((t, (logits.float() / t).logsumexp(-1) - others) for t, others in pairs)
    return {t: float(each.sigmoid().mean()) for t, each in odds}


@contextmanager
def made_up_targets(*models: nn.Module | None) -> Iterator[None]:
    """Inside the block, cached teachers give zeros for batches that were never cached."""
    parts = [part for model in models for part in cached_parts(model)]
    before = [part.made_up for part in parts]
    try:
        for part in parts:
            part.made_up = True
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.made_up = value
