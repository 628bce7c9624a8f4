"""Curriculum learning: the easy images first, by a measure of difficulty."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from capdistill.data.caption_files import pluralize
from capdistill.data.collate import image_ids_of
from capdistill.data.dataset import CaptionData, Splits
from capdistill.data.rows import accept_rows
from capdistill.errors import (
    ConfigError,
    DataError,
    UnknownName,
    as_float,
    require_number,
    shortened,
    suggest,
)
from capdistill.runtime import generator, stable_hash
from capdistill.tokenizer import split_words

Difficulty = str | Mapping[str, float] | Callable[[str], float]
Pacing = Literal["linear", "root", "step"]


class Curriculum(Dataset[Any]):
    """A data set to train on, easy images first: `fit(train=Curriculum(data.train))`.

    The images are ranked by difficulty. Epoch n of a run of E epochs draws from the easiest share
    c(n / E) of them, the competence. It grows from `start` to 1 at `until`; after that an epoch is
    every image once, the same epoch as without a curriculum.

    Every epoch has as many images as the data, so that schedules do not change: while the share is
    below 1, its images are repeated, none a further time before all have been drawn as often. A
    repetition has its own choice of captions, crop and view. The images of an epoch and their order
    depend on (seed, epoch, ids, difficulty) alone. In evaluation it is the data as they are.

    Example:
        >>> from capdistill.data import sample
        >>> train = Curriculum(sample().train, "rarity", pacing="linear", start=0.2, until=0.5)
        >>> [train.available(epoch, epochs=10) for epoch in range(6)]    # of 39 images
        [8, 15, 21, 27, 33, 39]
        >>> train
        <Curriculum of 39 images by rarity, linear from 0.2 to 1 at 0.5 of the run>

    Args:
        data: A capdistill data set, or any data set or sequence of (image, captions) pairs.
        difficulty: As for `difficulty`, or image id -> number for every image; larger is harder.
            `capdistill.training.model_difficulty` measures it by a model. Of equal images the order
            is random, but the same in every run.
        pacing: "linear", "root" (faster at first: as much time for every newly added image) or
            "step" (`start` until then, everything afterwards).
        start: Share of the images in the first epoch, above 0.
        until: Share of the run after which all images are used, above 0.

    Raises:
        ConfigError: a share that is not in (0, 1], data that cannot be ranked, or a difficulty that
            is not a finite number.
        UnknownName: there is no such pacing or difficulty.

    Source:
        Platanios et al. (2019), Competence-based Curriculum Learning for Neural Machine
        Translation, the linear and the square root competence functions; here the competence of an
        epoch is that of its beginning. Step: Bengio et al. (2009), Curriculum Learning.
    """

    def __init__(
        self,
        data: Any,
        difficulty: Difficulty = "length",
        *,
        pacing: Pacing = "root",
        start: float = 0.3,
        until: float = 0.5,
    ) -> None:
        data = accept_rows(data)
        _require_data(data)
        if pacing not in tuple(_PACINGS):  # it may not be hashable
            raise UnknownName(f"Curriculum: no pacing {pacing!r}. {suggest(str(pacing), _PACINGS)}")
        self.data, self.pacing = data, pacing
        self.start = require_number("Curriculum: start", start, above=0, maximum=1)
        self.until = require_number("Curriculum: until", until, above=0, maximum=1)
        self.kind = difficulty if isinstance(difficulty, str) else "given numbers"
        names = image_ids(data)
        values = difficulty
        if not isinstance(values, Mapping):
            values = _measure(data, values)
        numbers = [_number(values, name) for name in names]
        keys = [(numbers[i], stable_hash(name), i) for i, name in enumerate(names)]
        self.ranking = tuple(i for _, _, i in sorted(keys))  # numbers of images, easiest first
        for name in ("examples", "image_ids", "captions"):  # read by checks and caches
            if hasattr(data, name):
                setattr(self, name, getattr(data, name))

    def __len__(self) -> int:
        return len(self.ranking)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __repr__(self) -> str:
        return (
            f"<Curriculum of {len(self)} images by {self.kind}, {self.pacing} from {self.start:g} "
            f"to 1 at {self.until:g} of the run>"
        )

    def competence(self, progress: float) -> float:
        """The share of the images that is used at `progress` (0 to 1) of the run."""
        at = min(progress / self.until, 1.0)
        return 1.0 if at == 1 else _PACINGS[self.pacing](at, self.start)

    def available(self, epoch: int, epochs: int) -> int:
        """How many images, the easiest ones, an epoch of a run of `epochs` draws from."""
        share = self.competence(epoch / epochs)
        return max(1, min(len(self), math.ceil(share * len(self) - 1e-9)))

    def require_epochs(self, epochs: int | None) -> int:
        """The number of epochs of a run, which it cannot do without; warn if it is too small.

        Raises:
            ConfigError: it was not given.
        """
        if epochs is None:
            raise ConfigError(
                "Loader: a Curriculum needs the number of epochs of the run, which was not given. "
                "Give epochs=, or give the Curriculum itself to fit, which knows them."
            )
        last = self.available(epochs - 1, epochs)
        if last < len(self):
            warnings.warn(
                f"Curriculum: a run of {pluralize(epochs, 'epoch')} ends with the {last} easiest "
                f"images and never reads the other {len(self) - last}: all are used from "
                f"{self.until:g} of the run on, in whole epochs. Give a smaller until, or more "
                "epochs.",
                stacklevel=4,
            )
        return epochs

    def order(self, seed: int, epoch: int, epochs: int) -> list[int]:
        """The numbers of the images in an epoch. Repetition r of image i is r * len(self) + i.

        Args:
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            epochs: Epochs of the whole run.
        """
        total, usable = len(self), sorted(self.ranking[: self.available(epoch, epochs)])
        rng = generator(seed, "order", epoch)
        numbers: list[int] = []
        for repetition in range(math.ceil(total / len(usable))):
            order = torch.randperm(len(usable), generator=rng, device="cpu").tolist()
            numbers += [repetition * total + usable[i] for i in order]
        return numbers[:total]

    def key(self, epochs: int) -> int:
        """A number that determines the images of all epochs, given the seed."""
        sizes = [self.available(epoch, epochs) for epoch in range(epochs)]
        return stable_hash(self.ranking, sizes)


_PACINGS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda at, start: start + (1 - start) * at,
    "root": lambda at, start: math.sqrt(start**2 + (1 - start**2) * at),
    "step": lambda at, start: start,
}


def difficulty(data: Any, kind: str | Callable[[str], float] = "length") -> dict[str, float]:
    """The difficulty of every image: the mean over its captions.

    Example:
        >>> pairs = [("1.jpg", ["a dog", "a dog runs fast"]), ("2.jpg", "a cat")]
        >>> difficulty(pairs)
        {'0': 3.0, '1': 2.0}
        >>> rare = difficulty(pairs, "rarity")
        >>> rare["0"] > rare["1"]
        True

    Args:
        data: A capdistill data set, or a data set or sequence of (image, captions) pairs, each of
            which is read once.
        kind: "length", the number of words; "rarity", minus the sum of the log-probabilities (nats)
            of its words, whose probabilities are their frequencies in all captions of the data; or
            a function of a caption.

    Returns:
        Image id -> difficulty. Images without ids have their numbers; one without captions gets the
        mean of the others.

    Raises:
        UnknownName: there is no such kind.
        ConfigError: these are no data, or a function that gives something else than a number.
        DataError: an item that cannot be read; no caption at all.

    Source:
        Platanios et al. (2019), the difficulty metrics sentence length and word rarity.
    """
    data = accept_rows(data)
    _require_data(data)
    return _measure(data, kind)


def _measure(data: Any, kind: str | Callable[[str], float]) -> dict[str, float]:
    if isinstance(kind, str) and kind not in ("length", "rarity"):
        raise UnknownName(
            f"difficulty: no measure '{kind}'. {suggest(kind, ['length', 'rarity'])} Or give a "
            "mapping from image ids to numbers, or a function of a caption."
        )
    if not isinstance(kind, str) and not callable(kind):
        raise ConfigError(
            f"difficulty: {kind!r} was given; expected 'length', 'rarity', a mapping from image "
            "ids to numbers, or a function of a caption."
        )
    captions = _captions(data)
    measure = kind if callable(kind) else _length
    if kind == "rarity":
        measure = _rarity([text for texts in captions.values() for text in texts])
    found = {}
    for name, texts in captions.items():
        if texts:
            values = [_number({name: measure(text)}, name) for text in texts]
            found[name] = sum(values) / len(values)
    return with_mean(found, list(captions))


def with_mean(known: dict[str, float], names: list[str]) -> dict[str, float]:
    """The difficulty of all images; of those where it is not known, the mean of the others.

    Raises:
        DataError: none is known.
    """
    if not known:
        raise DataError("difficulty: no image has a caption to measure. Give captions, or numbers.")
    return dict.fromkeys(names, sum(known.values()) / len(known)) | known


def _length(caption: str) -> float:
    return float(len(split_words(caption)))


def _rarity(captions: list[str]) -> Callable[[str], float]:
    counts = Counter(word for caption in captions for word in split_words(caption))
    total = counts.total()
    return lambda caption: -sum(math.log(counts[word] / total) for word in split_words(caption))


def _captions(data: Any) -> dict[str, tuple[str, ...]]:
    """Image id -> captions."""
    if isinstance(data, CaptionData):
        return {example.image_id: example.captions for example in data.examples}
    found = {}
    for number, name in enumerate(image_ids(data)):
        try:
            captions = data[number][1]
            texts = (captions,) if isinstance(captions, str) else tuple(captions)
        except Exception as error:
            raise DataError(
                f"difficulty: item {number} cannot be read ({type(error).__name__}: {error}). "
                "Leave it out, or give the difficulty as a mapping from image ids to numbers."
            ) from error
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"difficulty: the captions of item {number} are {shortened(captions)}; expected a "
                "string or a list of strings."
            )
        found[name] = texts
    return found


def image_ids(data: Any) -> list[str]:
    """The id of every image: that of the data, or its number."""
    ids = list(data.image_ids) if isinstance(data, CaptionData) else image_ids_of(data)
    return [str(number) for number in range(len(data))] if ids is None else ids


def _number(values: Mapping[str, Any], name: str) -> float:
    if name not in values:
        near = suggest(name, list(values)[:3])
        raise ConfigError(f"Curriculum: image '{name}' has no difficulty. {near}")
    value = values[name]
    number = as_float(value)
    if not math.isfinite(number):
        raise ConfigError(
            f"Curriculum: the difficulty of image '{name}' is {value!r}; expected a finite number."
        )
    return number


def _require_data(data: Any) -> None:
    """Refuse what has no items that can be ranked."""
    whole = isinstance(data, (Splits, Curriculum, str, bytes, Mapping, type))
    if whole or callable(getattr(data, "epoch", None)) or not hasattr(data, "__getitem__"):
        hint = " Give one of its splits, such as data.train." if isinstance(data, Splits) else ""
        raise ConfigError(
            f"Curriculum: {type(data).__name__} was given as data. Expected a capdistill data set, "
            f"or a data set or sequence of (image, captions).{hint}"
        )
    if not len(data):
        raise DataError("Curriculum: the data set holds no image.")
