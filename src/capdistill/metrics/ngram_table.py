"""References as tables of counted n-grams, shared by BLEU and CIDEr-D, and captions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from capdistill.errors import ConfigError
from capdistill.metrics.ngram_ids import Counted, Ints, NgramIds, arange, find, pack, unpack
from capdistill.metrics.ngrams import Tokens, words


class HypothesisNgrams(NamedTuple):
    """The counted n-grams of one caption an image; `ReferenceNgrams.count` makes it."""

    lengths: Ints  # tokens of each caption
    counted: list[Counted]  # for n = 1, 2, ...


class ReferenceNgrams:
    """The counted n-grams of all references.

    Example:
        >>> references = ReferenceNgrams([[["a", "dog"], ["a", "cat"]], [["a", "red", "car"]]])
        >>> references.image.tolist(), references.lengths.tolist()
        ([0, 0, 1], [2, 2, 3])
        >>> references.tables[0].frequencies.tolist()  # images with a, car, cat, dog, red
        [2, 1, 1, 1, 1]

    Args:
        references: One list of tokenised references an image.
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

    def count(self, hypotheses: Sequence[Tokens]) -> HypothesisNgrams:
        """The n-grams of one caption an image, in the numbers of the references.

        Raises:
            ValueError: as many captions as images were expected.
        """
        if len(hypotheses) != self.images:
            raise ValueError(f"{len(hypotheses)} captions of {self.images} images; give one each.")
        captions = [words(tokens) for tokens in hypotheses]
        lengths = np.array([len(tokens) for tokens in captions], np.int64)
        return HypothesisNgrams(lengths, self.ids.count(captions, keep=False))


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

    def find(self, counted: Counted) -> tuple[Ints, Ints]:
        """Which n-grams of the captions their image's references have, and in which groups."""
        groups, found = find(self.keys, pack(counted.rows, counted.ids))
        return np.flatnonzero(found), groups[found]

    def join(self, counted: Counted) -> tuple[Ints, Ints]:
        """Every pair of a caption's n-gram and the same in a reference of its image, as indices."""
        found, groups = self.find(counted)
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
