"""CIDEr-D on the COCO tool's scale: 0 to 10, a person scores about 0.8 on Flickr8k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capdistill.metrics.ngrams import ORDER, Ngram, Result, Tokens, count_ngrams, words

_SIGMA = 6.0  # the COCO tool's tolerance of a difference in length


@dataclass(frozen=True)
class _Weighted:
    """The tf-idf weights of one caption, their norm for each n, and its number of bigrams."""

    weights: dict[Ngram, float]
    norms: list[float]
    bigrams: int


class CiderD:
    """CIDEr-D; document frequencies come from the references unless they are given.

    Example:
        >>> cider = CiderD([[["a", "dog", "runs"]], [["a", "red", "car"]]])
        >>> round(cider([["a", "dog", "runs"], ["a", "red"]])["cider_d"][0], 3)
        5.493

    Args:
        references: One list of tokenised references an image.
        frequencies: n-gram -> number of documents (images) that have it, where the
            references are too few to count; None counts them in `references`.
        documents: How many documents `frequencies` were counted in.

    Source:
        Vedantam, Zitnick, Parikh (2015), the D form; as in pycocoevalcap, where the length
        of a caption is its number of bigrams.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]],
        *,
        frequencies: Mapping[Ngram, float] | None = None,
        documents: int | None = None,
    ) -> None:
        counted = [[count_ngrams(words(tokens)) for tokens in image] for image in references]
        self.frequencies = _frequencies(counted) if frequencies is None else frequencies
        self.documents = len(references) if documents is None else documents
        self._rarest = math.log(max(self.documents, 1))
        self._references = [[self._weigh(counts) for counts in image] for image in counted]

    def __call__(self, hypotheses: Sequence[Tokens]) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        scores = [
            self._score(self._weigh(count_ngrams(words(tokens))), references)
            for tokens, references in zip(hypotheses, self._references, strict=True)
        ]
        return {"cider_d": (sum(scores) / max(len(scores), 1), scores)}

    def _weigh(self, counts: Counter[Ngram]) -> _Weighted:
        weights, squares, bigrams = {}, [0.0] * ORDER, 0
        for ngram, count in counts.items():
            idf = self._rarest - math.log(max(1.0, self.frequencies.get(ngram, 0.0)))
            weights[ngram] = weight = count * idf
            squares[len(ngram) - 1] += weight * weight
            bigrams += count if len(ngram) == 2 else 0
        return _Weighted(weights, [math.sqrt(square) for square in squares], bigrams)

    def _score(self, hypothesis: _Weighted, references: Sequence[_Weighted]) -> float:
        total = sum(_similarity(hypothesis, reference) for reference in references)
        return 10.0 * total / ORDER / len(references)


def _frequencies(references: Sequence[Sequence[Counter[Ngram]]]) -> Counter[Ngram]:
    """In how many images each n-gram occurs."""
    frequencies: Counter[Ngram] = Counter()
    for image in references:
        frequencies.update({ngram for counts in image for ngram in counts})
    return frequencies


def _similarity(hypothesis: _Weighted, reference: _Weighted) -> float:
    """Sum over n of the clipped cosine, damped by the difference in length."""
    dots, theirs = [0.0] * ORDER, reference.weights
    for ngram, weight in hypothesis.weights.items():
        if ngram in theirs:
            other = theirs[ngram]
            dots[len(ngram) - 1] += min(weight, other) * other
    pairs = zip(dots, hypothesis.norms, reference.norms, strict=True)
    cosines = sum(dot / (ours * theirs) for dot, ours, theirs in pairs if ours and theirs)
    difference = hypothesis.bigrams - reference.bigrams
    return cosines * math.exp(-(difference**2) / (2 * _SIGMA**2))
