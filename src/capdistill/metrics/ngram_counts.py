"""References as tables of counted n-grams, shared by BLEU and CIDEr-D, and captions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capdistill.errors import ConfigError
from capdistill.metrics.base import ORDER, Tokens, words


class HypothesisNgrams(NamedTuple):
    """The counted n-grams of captions, and their pairs; `ReferenceNgrams.count` makes it.

    A caption makes a pair with each reference of its image; the pairs of a caption are adjacent.
    """

    lengths: Ints  # tokens of each caption
    counted: list[Counted]  # for n = 1, 2, ...
    images: Ints  # of each caption
    first: Ints  # pair of each caption
    caption: Ints  # of each pair
    reference: Ints  # of each pair


class ReferenceNgrams:
    """The counted n-grams of all references.

    Example:
        >>> references = ReferenceNgrams([[["a", "dog"], ["a", "cat"]], [["a", "red", "car"]]])
        >>> references.image.tolist(), references.lengths.tolist()
        ([0, 0, 1], [2, 2, 3])
        >>> references.tables[0].frequencies.tolist()  # images with a, car, cat, dog, red
        [2, 1, 1, 1, 1]

    Args:
        references: One list of tokenised references per image.
        ids: Numbers to start from; this object keeps its own copy.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]], ids: NgramIds | None = None) -> None:
        captions = [words(tokens) for tokens in chain.from_iterable(references)]
        self.images = len(references)
        self.lengths = np.array([len(tokens) for tokens in captions], np.int64)
        self.per_image = np.array([len(image) for image in references], np.int64)
        self.image = np.repeat(arange(self.images), self.per_image)  # of each reference
        self.first = np.cumsum(self.per_image) - self.per_image  # reference of each image
        self.started_from = ids
        self.ids = ids.copy() if ids else NgramIds()
        counted = self.ids.count(captions, keep=True)
        sizes = self.ids.sizes
        self.tables = [Table(c, self.image, n) for c, n in zip(counted, sizes, strict=True)]

    def count(self, hypotheses: Sequence[Tokens], images: Ints | None = None) -> HypothesisNgrams:
        """The n-grams of captions, in the numbers of the references.

        Args:
            hypotheses: Tokenised captions.
            images: The image of each caption, by its place; None is one caption per image.

        Raises:
            ValueError: as many captions as images were expected.
        """
        images = arange(self.images) if images is None else images
        if len(hypotheses) != len(images):
            raise ValueError(f"{len(hypotheses)} captions of {len(images)} images; give one each.")
        captions = [words(tokens) for tokens in hypotheses]
        lengths = np.array([len(tokens) for tokens in captions], np.int64)
        sizes = self.per_image[images]
        first = np.cumsum(sizes) - sizes
        caption = np.repeat(arange(len(images)), sizes)
        reference = np.repeat(self.first[images] - first, sizes) + arange(len(caption))
        counted = self.ids.count(captions, keep=False)
        return HypothesisNgrams(lengths, counted, images, first, caption, reference)


class Table:
    """The n-grams of one n in the references, grouped by image and n-gram.

    Args:
        counted: As counted in each reference.
        image: The image of each reference.
        size: How many n-grams there are.
    """

    def __init__(self, counted: Counted, image: Ints, size: int) -> None:
        keys = pack(image[counted.rows], counted.ids)
        order = np.argsort(keys, kind="stable")
        self.rows, self.ids, self.counts = (column[order] for column in counted)
        self.keys, self.starts = np.unique(keys[order], return_index=True)
        self.sizes = np.diff(self.starts, append=len(order))  # references that have it
        self.most = np.maximum.reduceat(self.counts, self.starts) if len(order) else self.counts
        self.frequencies = np.bincount(unpack(self.keys)[1], minlength=size)

    def find(self, counted: Counted, images: Ints) -> tuple[Ints, Ints]:
        """Which n-grams of the captions their image's references have, and in which groups."""
        groups, found = find(self.keys, pack(images[counted.rows], counted.ids))
        return np.flatnonzero(found), groups[found]

    def join(self, counted: Counted, images: Ints) -> tuple[Ints, Ints]:
        """Every pair of a caption's n-gram and the same in a reference of its image, as indices."""
        found, groups = self.find(counted, images)
        sizes = self.sizes[groups]
        before = np.cumsum(sizes) - sizes
        inside = arange(sizes.sum()) - np.repeat(before, sizes)
        return np.repeat(found, sizes), np.repeat(self.starts[groups], sizes) + inside


def reference_ngrams(
    references: Sequence[Sequence[Tokens]] | ReferenceNgrams, ids: NgramIds | None = None
) -> ReferenceNgrams:
    """Counted references as they are; others are counted.

    Raises:
        ConfigError: the references were counted without the numbers that are needed.
    """
    if not isinstance(references, ReferenceNgrams):
        return ReferenceNgrams(references, ids)
    if ids is not None and references.started_from is not ids:
        raise ConfigError(
            "The references were counted before the document frequencies were known. Give "
            "ReferenceNgrams(references, document_frequencies.ids), or the references uncounted."
        )
    return references


Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
_SHIFT = 32  # two numbers below 2^31 in one


class Counted(NamedTuple):
    """The n-grams of one n in some captions: each once a caption, sorted by caption and number."""

    rows: Ints  # the caption that has it
    ids: Ints  # its number
    counts: Ints  # how often


@dataclass
class NgramIds:
    """Gives every n-gram a number, its own for each n: 0, 1, ... in the order of arrival.

    An n-gram of more than one word is the pair of its beginning's number and its last word's.

    Example:
        >>> ids = NgramIds()
        >>> for counted in ids.count([["a", "dog", "a"]], keep=True)[:2]:
        ...     counted.ids.tolist(), counted.counts.tolist()
        ([0, 1], [2, 1])
        ([0, 1], [1, 1])

    Args:
        words: Word -> number.
        pairs: For each n from 2 on the pairs that are known.
    """

    words: dict[str, int] = field(default_factory=dict)
    pairs: list[Pairs] = field(default_factory=lambda: [Pairs() for _ in range(1, ORDER)])

    @property
    def sizes(self) -> list[int]:
        """Number of known n-grams for each n."""
        return [len(self.words), *(len(pairs.ids) for pairs in self.pairs)]

    def copy(self) -> NgramIds:
        """A copy that can learn more n-grams without changing this one."""
        return NgramIds(self.words, [Pairs(pairs.keys, pairs.ids) for pairs in self.pairs])

    def count(self, captions: Sequence[Tokens], *, keep: bool) -> list[Counted]:
        """Occurrences of the n-grams of each n in every caption.

        Args:
            captions: Tokenised captions, split by `words`.
            keep: Remember the new ones; else their numbers, from the size on, are for this call.
        """
        lengths = np.array([len(tokens) for tokens in captions], np.int64)
        rows = np.repeat(arange(len(captions)), lengths)
        room = np.repeat(np.cumsum(lengths), lengths) - arange(len(rows))  # tokens to the end
        last = self._word_ids(list(chain.from_iterable(captions)), keep)
        starts, ids = arange(len(rows)), last
        counted = [_count(rows, ids)]
        for n, pairs in enumerate(self.pairs, 2):
            whole = room[starts] >= n
            starts = starts[whole]
            ids = pairs.number(ids[whole], last[starts + n - 1], keep=keep)
            counted.append(_count(rows[starts], ids))
        return counted

    def _word_ids(self, tokens: list[str], keep: bool) -> Ints:
        new = sorted(set(tokens).difference(self.words))
        numbers = self.words
        if new:
            size = len(numbers)
            numbers = {**numbers, **{word: size + n for n, word in enumerate(new)}}
        if keep:
            self.words = numbers
        return np.fromiter(map(numbers.__getitem__, tokens), np.int64, len(tokens))


def _nothing() -> Ints:
    return np.empty(0, np.int64)


@dataclass
class Pairs:
    """Pairs of numbers, in order, with a number each."""

    keys: Ints = field(default_factory=_nothing)  # sorted
    ids: Ints = field(default_factory=_nothing)

    def number(self, first: Ints, last: Ints, *, keep: bool) -> Ints:
        """The numbers of pairs; new ones get those from the size on."""
        keys, inverse = np.unique(pack(first, last), return_inverse=True)
        places, known = find(self.keys, keys)
        ids = np.empty(len(keys), np.int64)
        ids[known] = self.ids[places[known]]
        ids[~known] = len(self.ids) + arange(int(np.count_nonzero(~known)))
        if keep:
            merged = np.concatenate([self.keys, keys[~known]])
            order = np.argsort(merged, kind="stable")
            self.keys = merged[order]
            self.ids = np.concatenate([self.ids, ids[~known]])[order]
        return ids[inverse]


def arange(stop: int) -> Ints:
    """0, 1, ... as 64 bits on every platform."""
    return np.arange(stop, dtype=np.int64)


def pack(first: Ints, last: Ints) -> Ints:
    """Two numbers as one that sorts by the first, then the last."""
    return first << _SHIFT | last


def unpack(keys: Ints) -> tuple[Ints, Ints]:
    """The two numbers again."""
    return keys >> _SHIFT, keys & ((1 << _SHIFT) - 1)


def find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The positions of keys among sorted ones, and whether they are present."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return places, keys[places] == wanted


def _count(rows: Ints, ids: Ints) -> Counted:
    keys, counts = np.unique(pack(rows, ids), return_counts=True)
    return Counted(*unpack(keys), counts)
