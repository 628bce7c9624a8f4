"""Numbers for n-grams, so that counting and looking up run over arrays and not over tuples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capdistill.metrics.ngrams import ORDER, Tokens

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
        """How many n-grams are known of each n."""
        return [len(self.words), *(len(pairs.ids) for pairs in self.pairs)]

    def copy(self) -> NgramIds:
        """Another one that may learn more without this one knowing."""
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
    """Where sorted keys have the wanted ones, and whether they do."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return places, keys[places] == wanted


def _count(rows: Ints, ids: Ints) -> Counted:
    keys, counts = np.unique(pack(rows, ids), return_counts=True)
    return Counted(*unpack(keys), counts)
