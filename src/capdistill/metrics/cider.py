"""CIDEr-D on the COCO tool's scale: 0 to 10, a person scores about 0.8 on Flickr8k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capdistill.metrics.frequencies import DocumentFrequencies
from capdistill.metrics.ngram_ids import Counted, Floats, Ints
from capdistill.metrics.ngram_table import HypothesisNgrams, ReferenceNgrams, reference_ngrams
from capdistill.metrics.ngrams import ORDER, Result, Tokens

_SIGMA = 6.0  # the COCO tool's tolerance of a difference in length


class _Weighted(NamedTuple):
    """The tf-idf weights of the n-grams of one n, and their norm in each caption."""

    weights: Floats
    norms: Floats


class CiderD:
    """CIDEr-D; document frequencies come from the references unless they are given.

    Example:
        >>> cider = CiderD([[["a", "dog", "runs"]], [["a", "red", "car"]]])
        >>> round(cider([["a", "dog", "runs"], ["a", "red"]])["cider_d"][0], 3)
        5.493

    Args:
        references: One list of tokenised references an image, or these counted.
        document_frequencies: Where the references are too few to count; None counts them in
            `references`.

    Source:
        Vedantam, Zitnick, Parikh (2015), the D form; as in pycocoevalcap, where the length
        of a caption is its number of bigrams.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]] | ReferenceNgrams,
        *,
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        given = document_frequencies
        self._references = references = reference_ngrams(references, given.ids if given else None)
        counts = given.counts if given else [t.frequencies for t in references.tables]
        documents = given.documents if given else references.images
        self._rarest = math.log(max(documents, 1))
        self._idf = [self._rarest - _log(np.maximum(1.0, count)) for count in counts]
        self._weighted = [
            self._weigh(n, Counted(table.rows, table.ids, table.counts), len(references.image))
            for n, table in enumerate(references.tables)
        ]

    def __call__(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        references = self._references
        if not isinstance(hypotheses, HypothesisNgrams):
            hypotheses = references.count(hypotheses)
        cosines = sum(self._cosines(n, counted) for n, counted in enumerate(hypotheses.counted))
        ours, theirs = (np.maximum(0, n - 1) for n in (hypotheses.lengths, references.lengths))
        difference = ours[references.image] - theirs
        damped = cosines * np.exp(-(difference**2) / (2 * _SIGMA**2))
        totals = np.bincount(references.image, damped, references.images)
        scores: list[float] = (10.0 * totals / ORDER / references.per_image).tolist()
        return {"cider_d": (sum(scores) / max(len(scores), 1), scores)}

    def _cosines(self, n: int, counted: Counted) -> Floats:
        """The clipped cosine of each reference and its image's caption."""
        references, table = self._references, self._references.tables[n]
        ours, theirs = self._weigh(n, counted, references.images), self._weighted[n]
        mine, other = table.join(counted)
        products = np.minimum(ours.weights[mine], theirs.weights[other]) * theirs.weights[other]
        dots = np.bincount(table.rows[other], products, len(references.image))
        norms = ours.norms[references.image] * theirs.norms
        return np.divide(dots, norms, out=np.zeros_like(norms), where=norms != 0)

    def _weigh(self, n: int, counted: Counted, captions: int) -> _Weighted:
        weights = counted.counts * _take(self._idf[n], counted.ids, self._rarest)
        squares = np.bincount(counted.rows, weights * weights, captions)
        return _Weighted(weights, np.sqrt(squares))


def _log(values: Floats) -> Floats:
    """Logarithms that are equal where the values are, whatever their places in an array."""
    distinct, inverse = np.unique(values, return_inverse=True)
    return np.array([math.log(value) for value in distinct], np.float64)[inverse]


def _take(values: Floats, places: Ints, otherwise: float) -> Floats:
    """The values at the places; for places beyond the end `otherwise`."""
    return np.append(values, otherwise)[np.minimum(places, len(values))]
