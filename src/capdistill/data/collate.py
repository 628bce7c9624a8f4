"""A batch from its image numbers, in any process: read, choose captions, crop, pad.

`Loader` uses it. Everything can be pickled for spawned workers.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from statistics import median_low
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from capdistill.data.caption_files import Problem, caption_problem, image_name
from capdistill.data.dataset import CaptionData
from capdistill.data.images import (
    centre_square,
    random_square,
    read_image,
    view_of,
    view_square,
)
from capdistill.data.source import require_unique_ids
from capdistill.errors import DataError, shortened
from capdistill.outputs import Batch
from capdistill.runtime import generator

T = TypeVar("T")
# Epoch, image numbers. Repetition r of image i in an epoch is r * (number of images) + i.
BatchIndex: TypeAlias = "tuple[int, tuple[int, ...]]"

CACHE_MARGIN = 1.16  # side of a cached image over the crop's, so that crops are not upscaled
MAX_CAPTIONS = 5  # most captions per image by default


class BatchResult(NamedTuple):
    """A batch, the problems in it, and the first exception behind them.

    Args:
        batch: None if no image of it can be used.
        problems: One per image or caption that was left out.
        cause: The exception that a data set, a transform or Pillow raised, if any.
    """

    batch: Batch | None
    problems: list[Problem]
    cause: Exception | None


class SupportsEncode(Protocol):
    """The part of a tokenizer that a loader needs."""

    @property
    def pad_id(self) -> int:
        """The id that fills short rows. It may equal another id: masks go by position."""

    def encode(self, caption: str) -> list[int]:
        """The ids from the start token to the end token."""


class Collator(Dataset[BatchResult]):
    """`collator[epoch, image_numbers]` is a `BatchResult`. For the arguments see `Loader`.

    Raises:
        DataError: the data set has `image_ids` that are not unique names, one per item.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: SupportsEncode,
        *,
        image_size: int,
        train: bool,
        captions_per_image: int | None,
        seed: int,
        flip: bool,
        crop: bool,
        cache_images: bool,
        caches: Mapping[str, Any],
        with_images: bool,
        max_length: int | None,
        views: int,
        view: int,
    ) -> None:
        self.data, self.tokenizer, self.caches = data, tokenizer, caches
        self.num_images = len(data)
        self.image_size, self.train, self.seed = image_size, train, seed
        self.flip, self.random_crop = flip and (train or view > 0), train and crop
        self.with_images, self.max_length = with_images, max_length
        self.views, self.view = views, view
        self.together: tuple[int, ...] = ()  # views that every batch shows, one after the other
        self.ids = None if isinstance(data, CaptionData) else image_ids_of(data)
        self.images: dict[int, Tensor] | None = {} if cache_images else None
        self._k = captions_per_image

    def __getitem__(self, index: BatchIndex) -> BatchResult:
        epoch, numbers = index
        samples: list[list[_Sample]] = []
        problems: list[Problem] = []
        cause: Exception | None = None
        for number in numbers:
            try:
                samples.append(self._samples(number, epoch, problems))
            except _UnusableError as error:
                problems.append(error.problem)
                cause = cause or _portable(error.__cause__)
        shown = [sample for of_view in zip(*samples, strict=True) for sample in of_view]
        return BatchResult(self._collate(shown) if shown else None, problems, cause)

    @property
    def image_ids(self) -> Sequence[str]:
        """The ids of all images, in the order of the data set."""
        if isinstance(self.data, CaptionData):
            return self.data.image_ids
        return [str(i) for i in range(self.num_images)] if self.ids is None else self.ids

    @property
    def k(self) -> int:
        """Captions per image. By default as many as its images usually have, at most 5."""
        if self._k is None:
            self._k = self._usual()
        return self._k

    def _usual(self) -> int:
        """The median in training, which repeats few; otherwise that of the first usable image."""
        if self.train and isinstance(self.data, CaptionData):
            return usual_captions(self.data)
        for number in range(len(self.data)):
            try:
                return min(MAX_CAPTIONS, len(self._item(number, []).captions) or 1)
            except _UnusableError:
                continue
        return 1

    def _samples(self, number: int, epoch: int, problems: list[Problem]) -> list[_Sample]:
        """An image, decoded once, in each view that is shown."""
        again, number = divmod(number, self.num_images)
        item = self._item(number, problems)
        rng = generator(self.seed, epoch, item.image_id, *([again] if again else []))
        choices = list(zip(item.captions, item.weights or repeat(1.0), strict=False))
        chosen = choose_captions(choices, self.k, rng if self.train else None)
        view = view_of(epoch + again, item.image_id, self.views) if self.views > 1 else self.view
        image = self._image(number, item) if self.with_images else None
        cached = {
            key: _features(cache[view] if self.views > 1 else cache, key, item)  # (N, D0)
            for key, cache in self.caches.items()
        }
        by_chance = self.views == 1 and not view and (self.random_crop or self.flip)
        views = self.together or (view,)
        pixels = [self._pixels(image, item, rng, each) for each in views]  # (3, S, S) each
        shown = [None] * len(views) if by_chance else views
        return [_Sample(item, chosen, *each, cached) for each in zip(pixels, shown, strict=True)]

    def _item(self, number: int, problems: list[Problem]) -> Item:
        if isinstance(self.data, CaptionData):
            example = self.data.examples[number]
            return Item(
                example.image_id,
                example.captions,
                example.path,
                str(example.path),
                example.references,
                example.weights,
            )
        name = self.ids[number] if self.ids is not None else str(number)
        try:
            pair = self.data[number]
        except Exception as error:  # user code: any exception means that the item is unusable
            raise _UnusableError("corrupt image", f"item {name}", _reason(error)) from error
        return _checked_item(pair, name, problems)

    def _image(self, number: int, item: Item) -> Tensor:
        image = None if self.images is None else self.images.get(number)
        if image is None:
            image = _decoded(item)
            if self.images is not None:
                image = self.images[number] = self._to_keep(image)
        return image

    def _pixels(self, image: Tensor | None, item: Item, rng: torch.Generator, view: int) -> Tensor:
        if image is None:
            return torch.empty(3, 0, 0, dtype=torch.uint8, device="cpu")
        if view or self.views > 1 or self.together:
            return view_square(image, self.image_size, view, item.image_id, flip=self.flip)
        if self.random_crop:
            return random_square(image, self.image_size, rng, flip=self.flip)
        square = centre_square(image, self.image_size)
        flipped = self.flip and torch.rand(1, generator=rng, device="cpu").item() < 0.5
        return square.flip(2) if flipped else square

    def _to_keep(self, image: Tensor) -> Tensor:
        if not self.random_crop:
            return centre_square(image, self.image_size)
        return centre_square(image, min(round(self.image_size * CACHE_MARGIN), *image.shape[1:]))

    def _collate(self, samples: list[_Sample]) -> Batch:
        from capdistill.tokenizer import pad_batch

        chosen = [each for sample in samples for each in sample.chosen or [("", 1.0)] * self.k]
        captions = tuple(caption for caption, _ in chosen)
        rows = [self.tokenizer.encode(caption)[: self.max_length] for caption in captions]
        ids, mask = pad_batch(rows, self.tokenizer.pad_id)  # (B, T)
        without = torch.tensor([not sample.chosen for sample in samples], device="cpu")  # (I,)
        mask[without.repeat_interleave(self.k), 1:] = False  # no caption, hence no targets
        weighted = any(sample.item.weights for sample in samples)
        weights = torch.tensor([w for _, w in chosen], device="cpu") if weighted else None  # (B,)
        views = [sample.view for sample in samples if sample.view is not None]
        return Batch(
            images=torch.stack([sample.pixels for sample in samples]),  # (I, 3, S, S)
            input_ids=ids,
            mask=mask,
            captions=captions,
            image_ids=tuple(sample.item.image_id for sample in samples),
            references=None if self.train else tuple(s.item.references for s in samples),
            caption_weights=weights,
            cached={
                key: torch.stack([sample.cached[key] for sample in samples])  # (I, N, D0)
                for key in self.caches
            },
            views=tuple(views) if len(views) == len(samples) else None,
        )


def usual_captions(data: CaptionData) -> int:
    """The usual number of captions per image that has any: the median, at most 5.

    Example:
        >>> from pathlib import Path
        >>> from capdistill.data.dataset import Example
        >>> captions = [("a", "b"), ("c", "d", "e"), tuple("fghijkl")]
        >>> usual_captions(CaptionData(Example(c[0], Path("x.jpg"), c) for c in captions))
        3
    """
    counts = [len(example.captions) for example in data.examples if example.captions]
    return min(MAX_CAPTIONS, median_low(counts or [1]))


def choose_captions(captions: Sequence[T], k: int, rng: torch.Generator | None = None) -> list[T]:
    """k captions, none twice before all are used. Without a generator, the first k.

    An image without captions gives none.

    Example:
        >>> choose_captions(["a", "b"], 3)
        ['a', 'b', 'a']
        >>> sorted(choose_captions(["a", "b", "c"], 3, generator(0)))
        ['a', 'b', 'c']
    """
    chosen: list[T] = []
    while captions and len(chosen) < k:
        n = len(captions)
        order = range(n) if rng is None else torch.randperm(n, generator=rng, device="cpu").tolist()
        chosen += [captions[i] for i in order]
    return chosen[:k]


class Item(NamedTuple):
    """An image and its captions as a data set gives them, and where they are for messages."""

    image_id: str
    captions: tuple[str, ...]
    image: Any  # any source that `read_image` takes, if the data set is valid
    place: str
    references: tuple[str, ...]
    weights: tuple[float, ...] | None = None


class _Sample(NamedTuple):
    item: Item
    chosen: list[tuple[str, float]]
    pixels: Tensor
    view: int | None
    cached: dict[str, Tensor]


class _UnusableError(Exception):
    def __init__(self, kind: str, where: str, reason: str) -> None:
        super().__init__(reason)
        detail = reason.removeprefix(f"{where}: ").removesuffix(".")
        self.problem = Problem(kind, where, "", detail)


def image_ids_of(data: Any) -> list[str] | None:
    """The ids that a user's data set gives its items, checked; None if it gives none."""
    given = getattr(data, "image_ids", None)
    if given is None:
        return None
    ids = [image_name(each) for each in given]
    if len(ids) != len(data) or None in ids:
        wrong = next((each for each in given if image_name(each) is None), None)
        what = f"{len(ids)} entries for {len(data)} items" if len(ids) != len(data) else repr(wrong)
        raise DataError(
            f"{type(data).__name__}.image_ids: {what}; expected one string per item, or no such "
            "attribute."
        )
    require_unique_ids([str(each) for each in ids], f"{type(data).__name__}.image_ids")
    return [str(each) for each in ids]


def _checked_item(pair: Any, name: str, problems: list[Problem]) -> Item:
    where = f"item {name}"
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        shape = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        reason = f"it is a {type(pair).__name__}{shape}; expected a pair (image, captions)"
        raise _UnusableError("malformed item", where, reason)
    image, captions = pair
    texts = tuple(_usable_captions(captions, where, problems))
    if not texts:
        raise _UnusableError("image without caption", where, f"captions: {shortened(captions)}")
    return Item(name, texts, image, where, texts)


def _usable_captions(captions: Any, where: str, problems: list[Problem]) -> Iterator[str]:
    several: Sequence[Any] = captions
    if isinstance(captions, (str, bytes)) or not isinstance(captions, Sequence):
        several = [captions]
    for caption in several:
        problem = caption_problem(caption)
        if problem is None:
            yield caption
        elif problem[0] == "invalid caption":
            problems.append(Problem("invalid caption", where, "", problem[1]))


def _decoded(item: Item) -> Tensor:
    try:
        return read_image(item.image)
    except Exception as error:  # a user's array or image class may raise anything
        raise _UnusableError("corrupt image", item.place, _reason(error)) from error


def _reason(error: Exception) -> str:
    """The text of an exception, with its type if the text alone is unclear."""
    plain = isinstance(error, (DataError, OSError, SyntaxError)) and str(error)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _portable(error: BaseException | None) -> Exception | None:
    """The exception in a form that can be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) and type(copy) is type(error) else None


def _features(cache: Any, key: str, item: Item) -> Tensor:
    try:
        tokens: Tensor = cache[item.image_id]  # (N, D0)
    except KeyError as error:
        reason = f"the cache {key[:12]} lacks it; what could not be read was left out there"
        raise _UnusableError("no cached features", item.place, reason) from error
    except DataError as error:
        raise _UnusableError("no cached features", item.place, str(error)) from error
    return tokens


# numpy has no bfloat16: its bits are kept as integers
STORED_AS: dict[str, Any] = {"fp16": np.float16, "bf16": np.int16}


class FeatureCache:
    """Cached values of a frozen trunk by image id.

    Args:
        tokens: (images, ...) float16, or the bits of bfloat16 as int16; a memory map is reopened in
            every worker.
        image_ids: In the order of the rows; None for a row without an image.
        checksums: Of the rows, each compared once; None compares nothing.
    """

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        image_ids: Iterable[str | None],
        checksums: Sequence[int] | None = None,
    ) -> None:
        self.tokens = tokens
        self.rows = {name: row for row, name in enumerate(image_ids) if name is not None}
        self.unchecked = {} if checksums is None else dict(enumerate(checksums))

    def __getitem__(self, image_id: str) -> Tensor:
        row = self.rows[image_id]
        bits = np.array(self.tokens[row])  # (...)
        expected = self.unchecked.get(row)
        if expected is not None and zlib.crc32(bits.data) != expected:
            raise DataError(
                f"its values in {getattr(self.tokens, 'filename', 'the cache')} are damaged. "
                "Remove that file; it is then written anew"
            )
        self.unchecked.pop(row, None)
        value = torch.from_numpy(bits)
        return value.view(torch.bfloat16) if value.dtype == torch.int16 else value

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """A memory map is pickled as the name of its file, without its content."""
        if not isinstance(self.tokens, np.memmap):
            return vars(self)
        place = {"file": self.tokens.filename, "shape": self.tokens.shape}
        return {**vars(self), "tokens": None, **place, "kind": self.tokens.dtype.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "file" in state:
            file, kind, shape = (state.pop(key) for key in ("file", "kind", "shape"))
            state["tokens"] = np.memmap(file, kind, "r", shape=shape)
        vars(self).update(state)
