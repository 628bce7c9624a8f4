"""One batch from its image numbers, in whatever process: read, choose captions, crop, pad.

Enter here from `Loader`; everything is picklable, so that workers can be spawned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from capdistill.data.caption_files import Problem
from capdistill.data.dataset import CaptionData
from capdistill.data.images import (
    ImageSource,
    centre_square,
    random_square,
    read_image,
    view_of,
    view_square,
)
from capdistill.errors import DataError
from capdistill.outputs import Batch
from capdistill.runtime import (
    generator,
)

BatchIndex: TypeAlias = "tuple[int, tuple[int, ...]]"  # epoch, image numbers
BatchResult: TypeAlias = "tuple[Batch | None, list[Problem]]"

_READ_ERRORS = (DataError, OSError, SyntaxError)  # Pillow calls a broken PNG a SyntaxError
_ROOM = 1.16  # a cached image is this much larger than the crop, so that crops are not blown up
_MOST = 5


def usual_captions(data: CaptionData) -> int:
    """How many captions an image of the data usually has: the median, at most 5.

    Example:
        >>> from pathlib import Path
        >>> from capdistill.data.dataset import Example
        >>> captions = [("a", "b"), ("c", "d", "e"), tuple("fghijkl")]
        >>> usual_captions(CaptionData(Example(c[0], Path("x.jpg"), c) for c in captions))
        3
    """
    return min(_MOST, median_low(len(example.captions) for example in data.examples))


class SupportsEncode(Protocol):
    """What a loader needs of a tokenizer."""

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; may equal another id, since masks go by position."""

    def encode(self, caption: str) -> list[int]:
        """The ids from the start token to the end token."""


class Item(NamedTuple):
    """An image as the data set gives it."""

    image_id: str
    captions: tuple[str, ...]
    image: ImageSource | None
    place: str


class Collator(Dataset[BatchResult]):
    """`collator[epoch, images]` is (Batch or None, problems). For the arguments see `Loader`."""

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
        self.image_size, self.train, self.seed = image_size, train, seed
        self.flip, self.random_crop = flip and (train or view > 0), train and crop
        self.with_images, self.max_length = with_images, max_length
        self.views, self.view = views, view
        self.ids: Sequence[str] | None = getattr(data, "image_ids", None)
        self.cache: dict[int, Tensor] | None = {} if cache_images else None
        self._k = captions_per_image

    def __getitem__(self, job: BatchIndex) -> BatchResult:
        epoch, numbers = job
        parts, problems = [], []
        for number in numbers:
            try:
                parts.append(self._part(number, epoch))
            except _UnusableError as error:
                problems.append(error.problem)
        return (self._join(parts) if parts else None), problems

    @property
    def k(self) -> int:
        """Captions an image; unless given, as many as its images usually have, at most 5."""
        if self._k is None:
            self._k = self._usual()
        return self._k

    def _usual(self) -> int:
        """The median in training, so that few come twice; else what the first usable image has."""
        if self.train and isinstance(self.data, CaptionData):
            return usual_captions(self.data)
        for number in range(len(self.data)):
            try:
                return min(_MOST, len(self._item(number).captions))
            except _UnusableError:
                continue
        return 1

    def _part(self, number: int, epoch: int) -> _Part:
        item = self._item(number)
        rng = generator(self.seed, epoch, item.image_id)
        chosen = sample_captions(item.captions, self.k, rng if self.train else None)
        view = view_of(epoch, item.image_id, self.views) if self.views > 1 else self.view
        pixels = self._pixels(number, item, rng, view)
        caches = {key: self._at(store, view) for key, store in self.caches.items()}
        cached = {key: _fetch(store, key, item) for key, store in caches.items()}
        return _Part(item.image_id, item.captions, chosen, pixels, cached)

    def _at(self, store: Any, view: int) -> Any:
        return store[view] if self.views > 1 else store

    def _item(self, number: int) -> Item:
        if isinstance(self.data, CaptionData):
            example = self.data.examples[number]
            return Item(example.image_id, example.captions, example.path, str(example.path))
        name = str(self.ids[number]) if self.ids is not None else str(number)
        try:
            pair = self.data[number]
        except _READ_ERRORS as error:
            raise _UnusableError("corrupt image", f"item {name}", str(error)) from error
        return _checked(pair, name)

    def _pixels(self, number: int, item: Item, rng: torch.Generator, view: int) -> Tensor:
        if not self.with_images:
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        image = None if self.cache is None else self.cache.get(number)
        if image is None:
            image = self._decoded(item)
            if self.cache is not None:
                image = self.cache[number] = self._to_keep(image)
        if view or self.views > 1:
            return view_square(image, self.image_size, view, item.image_id, flip=self.flip)
        if self.random_crop:
            return random_square(image, self.image_size, rng, flip=self.flip)
        square = centre_square(image, self.image_size)
        flipped = self.flip and torch.rand(1, generator=rng).item() < 0.5
        return square.flip(2) if flipped else square

    def _decoded(self, item: Item) -> Tensor:
        try:
            assert item.image is not None
            return read_image(item.image)
        except DataError as error:
            raise _UnusableError("corrupt image", item.place, str(error)) from error

    def _to_keep(self, image: Tensor) -> Tensor:
        if not self.random_crop:
            return centre_square(image, self.image_size)
        return centre_square(image, min(round(self.image_size * _ROOM), *image.shape[1:]))

    def _join(self, parts: list[_Part]) -> Batch:
        from capdistill.tokenizer import pad_batch

        captions = tuple(caption for part in parts for caption in part.chosen)
        rows = [self.tokenizer.encode(caption)[: self.max_length] for caption in captions]
        ids, mask = pad_batch(rows, self.tokenizer.pad_id)  # (B, T)
        return Batch(
            images=torch.stack([part.pixels for part in parts]),  # (I, 3, S, S)
            input_ids=ids,
            mask=mask,
            captions=captions,
            image_ids=tuple(part.image_id for part in parts),
            references=None if self.train else tuple(part.captions for part in parts),
            cached={key: torch.stack([p.cached[key] for p in parts]) for key in self.caches},
        )


class _Part(NamedTuple):
    image_id: str
    captions: tuple[str, ...]
    chosen: list[str]
    pixels: Tensor
    cached: dict[str, Tensor]


class _UnusableError(Exception):
    def __init__(self, kind: str, where: str, reason: str) -> None:
        super().__init__(reason)
        detail = reason.removeprefix(f"{where}: ").removesuffix(".")
        self.problem = Problem(kind, where, "", detail)


def _checked(pair: Any, name: str) -> Item:
    where = f"item {name}"
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{where} is {type(pair).__name__}; expected a pair (image, captions).")
    image, captions = pair
    texts = tuple(_texts(captions, where))
    if not texts:
        raise _UnusableError("empty caption", where, "no caption with text")
    return Item(name, texts, image, where)


def _texts(captions: Any, where: str) -> Iterator[str]:
    several = (captions,) if isinstance(captions, str) else captions
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise DataError(
            f"{where}: captions are {type(captions).__name__}; expected a string or a list of "
            "strings. A data set that yields (images, ids) is not one of captions."
        )
    return (text for text in several if text.strip())


def _fetch(store: Any, key: str, item: Item) -> Tensor:
    try:
        tokens: Tensor = store[item.image_id]  # (N, D0)
    except KeyError as error:
        raise _UnusableError(
            "no cached features", item.place, f"{item.image_id} in {key}"
        ) from error
    return tokens


def sample_captions(
    captions: Sequence[str], k: int, rng: torch.Generator | None = None
) -> list[str]:
    """k captions, none twice before all are used; the first k where there is no generator.

    Example:
        >>> sample_captions(["a", "b"], 3)
        ['a', 'b', 'a']
        >>> sorted(sample_captions(["a", "b", "c"], 3, generator(0)))
        ['a', 'b', 'c']
    """
    chosen: list[str] = []
    while len(chosen) < k:
        order = range(len(captions)) if rng is None else _permutation(len(captions), rng)
        chosen += [captions[i] for i in order]
    return chosen[:k]


def _permutation(n: int, rng: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(n, generator=rng).tolist()
    return order


class FeatureCache:
    """Trunk tokens by image id.

    Args:
        tokens: (images, N, D0) float16; a memory map is opened anew in every worker.
        image_ids: In the order of the rows.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], image_ids: Iterable[str]) -> None:
        self.tokens = tokens
        self.rows = {image_id: row for row, image_id in enumerate(image_ids)}

    def __getitem__(self, image_id: str) -> Tensor:
        return torch.from_numpy(np.array(self.tokens[self.rows[image_id]]))  # (N, D0)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to another process as its file's name, not as its content."""
        if not isinstance(self.tokens, np.memmap):
            return vars(self)
        return {"rows": self.rows, "file": self.tokens.filename, "shape": self.tokens.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "file" in state:
            state["tokens"] = open_features(state.pop("file"), state.pop("shape"))
        vars(self).update(state)


def open_features(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The memory map of cached features, (images, N, D0) float16."""
    return np.memmap(path, np.float16, "r", shape=shape)
