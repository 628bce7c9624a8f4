"""BLEU-1..4 as the COCO tool computes it: corpus level, closest length, its smoothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from capdistill.metrics.ngrams import ORDER, Ngram, Result, Tokens, count_ngrams, words

_SMALL, _TINY = 1e-9, 1e-15  # the COCO tool's constants: they show in the tenth digit


@dataclass(frozen=True)
class _Match:
    """What one caption, or a whole corpus, adds to BLEU."""

    correct: list[int]
    guessed: list[int]
    length: int
    reference_length: int

    def scores(self) -> list[float]:
        product, scores = 1.0, []
        for n, (correct, guessed) in enumerate(zip(self.correct, self.guessed, strict=True), 1):
            product *= (correct + _TINY) / (guessed + _SMALL)
            scores.append(product ** (1.0 / n))
        ratio = (self.length + _TINY) / (self.reference_length + _SMALL)
        penalty = math.exp(1.0 - 1.0 / ratio) if ratio < 1.0 else 1.0
        return [score * penalty for score in scores]


class Bleu:
    """BLEU-1..4 against references that are counted once.

    Example:
        >>> bleu = Bleu([[["a", "dog", "runs"], ["the", "dog", "runs"]]])
        >>> corpus, per_image = bleu([["a", "dog"]])["bleu_1"]
        >>> round(corpus, 4)
        0.6065

    Args:
        references: One list of tokenised references an image.

    Source:
        Papineni et al. (2002); constants and the closest length as in pycocoevalcap.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        split = [[words(tokens) for tokens in image] for image in references]
        self._lengths = [[len(tokens) for tokens in image] for image in split]
        self._most = [_most(image) for image in split]

    def __call__(self, hypotheses: Sequence[Tokens]) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        matches = [
            _match(words(tokens), most, lengths)
            for tokens, most, lengths in zip(hypotheses, self._most, self._lengths, strict=True)
        ]
        corpus = _total(matches).scores()
        images = [match.scores() for match in matches]
        return {f"bleu_{n + 1}": (corpus[n], [s[n] for s in images]) for n in range(ORDER)}


def _most(references: Sequence[Tokens]) -> Counter[Ngram]:
    """For each n-gram the most occurrences in any one reference."""
    most: Counter[Ngram] = Counter()
    for tokens in references:
        most |= count_ngrams(tokens)
    return most


def _match(tokens: Tokens, most: Counter[Ngram], lengths: Sequence[int]) -> _Match:
    length = len(tokens)
    correct = [0] * ORDER
    for ngram, count in count_ngrams(tokens).items():
        if ngram in most:
            correct[len(ngram) - 1] += min(count, most[ngram])
    return _Match(
        correct=correct,
        guessed=[max(0, length - n) for n in range(ORDER)],
        length=length,
        reference_length=min(lengths, key=lambda other: (abs(other - length), other)),
    )


def _total(matches: Sequence[_Match]) -> _Match:
    return _Match(
        correct=[sum(match.correct[n] for match in matches) for n in range(ORDER)],
        guessed=[sum(match.guessed[n] for match in matches) for n in range(ORDER)],
        length=sum(match.length for match in matches),
        reference_length=sum(match.reference_length for match in matches),
    )
