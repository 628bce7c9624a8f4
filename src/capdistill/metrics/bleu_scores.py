"""BLEU-1..4 as the COCO tool computes it: corpus level, closest length, its smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capdistill.metrics.ngram_ids import Floats, Ints
from capdistill.metrics.ngram_table import HypothesisNgrams, ReferenceNgrams, reference_ngrams
from capdistill.metrics.ngrams import ORDER, Result, Tokens

_SMALL, _TINY = 1e-9, 1e-15  # the COCO tool's constants: they show in the tenth digit


class BleuMatches(NamedTuple):
    """What captions add to BLEU, one row each; sums over rows give the BLEU of a corpus."""

    correct: Ints  # (I, 4)
    guessed: Ints  # (I, 4)
    length: Ints  # (I,)
    reference_length: Ints  # (I,)

    def total(self) -> BleuMatches:
        """The matches of all captions together."""
        return BleuMatches(*(column.sum(0) for column in self))

    def scores(self) -> Floats:
        """BLEU-1..4 of each row, (I, 4), or of a total, (4,)."""
        shares = (self.correct + _TINY) / (self.guessed + _SMALL)
        means = np.cumprod(shares, -1) ** (1.0 / np.arange(1, ORDER + 1))
        ratio = (self.length + _TINY) / (self.reference_length + _SMALL)
        penalty = np.where(ratio < 1.0, np.exp(1.0 - 1.0 / ratio), 1.0)
        scores: Floats = means * penalty[..., None]
        return scores


class Bleu:
    """BLEU-1..4 against references that are counted once.

    Example:
        >>> bleu = Bleu([[["a", "dog", "runs"], ["the", "dog", "runs"]]])
        >>> corpus, per_image = bleu([["a", "dog"]])["bleu_1"]
        >>> round(corpus, 4)
        0.6065

    Args:
        references: One list of tokenised references an image, or these counted.

    Source:
        Papineni et al. (2002); constants and the closest length as in pycocoevalcap.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]] | ReferenceNgrams) -> None:
        self._references = reference_ngrams(references)

    def __call__(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        matches = self.matches(hypotheses)
        corpus, images = matches.total().scores().tolist(), matches.scores().T.tolist()
        return {f"bleu_{n + 1}": (corpus[n], images[n]) for n in range(ORDER)}

    def matches(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> BleuMatches:
        """What each caption adds to BLEU; a sample of the rows gives the BLEU of a sample."""
        if not isinstance(hypotheses, HypothesisNgrams):
            hypotheses = self._references.count(hypotheses)
        lengths = hypotheses.lengths
        return BleuMatches(
            correct=self._correct(hypotheses),
            guessed=np.maximum(0, lengths[:, None] - np.arange(ORDER)),
            length=lengths,
            reference_length=self._closest(lengths),
        )

    def _correct(self, hypotheses: HypothesisNgrams) -> Ints:
        correct = np.zeros((self._references.images, ORDER), np.int64)
        for n, (table, ours) in enumerate(
            zip(self._references.tables, hypotheses.counted, strict=True)
        ):
            found, groups = table.find(ours)
            clipped = np.minimum(ours.counts[found], table.most[groups])
            np.add.at(correct[:, n], ours.rows[found], clipped)
        return correct

    def _closest(self, lengths: Ints) -> Ints:
        """The length of the reference that is closest in length, the shorter of two."""
        references = self._references
        away = np.abs(references.lengths - lengths[references.image])
        unit = int(references.lengths.max()) + 1
        best: Ints = np.minimum.reduceat(away * unit + references.lengths, references.first) % unit
        return best
