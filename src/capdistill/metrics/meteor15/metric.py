"""METEOR 1.5 with its English parameters: statistics of alignments, and the score from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capdistill.metrics.base import Results, Tokens, of_images
from capdistill.metrics.meteor15.alignment import Match, align, find_matches
from capdistill.metrics.meteor15.sentence import Sentence
from capdistill.metrics.meteor15.tables import Rewrites, read_paraphrases
from capdistill.metrics.ngram_counts import Floats, Ints

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75  # the tool's, for English
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
_STAGES = len(_WEIGHTS)
_COUNTS = 2 * (2 + 2 * _STAGES) + 1  # numbers in `_Statistics.numbers()`


@dataclass(frozen=True)
class _Side:
    """Counts in the hypotheses, or in the references."""

    words: int = 0
    function_words: int = 0
    content_matches: tuple[int, ...] = (0,) * _STAGES  # a stage
    function_matches: tuple[int, ...] = (0,) * _STAGES

    @property
    def matches(self) -> int:
        return sum(self.content_matches) + sum(self.function_matches)

    def share(self) -> float:
        """The weighted share of the words that is matched: content words count three times.

        The order of the sums is the tool's: their last digit decides between references.
        """
        matched = 0.0
        for weight, number in zip(_WEIGHTS, self.content_matches, strict=True):
            matched += number * weight * _DELTA
        for weight, number in zip(_WEIGHTS, self.function_matches, strict=True):
            matched += number * weight * (1.0 - _DELTA)
        content_words = self.words - self.function_words
        return matched / (_DELTA * content_words + (1.0 - _DELTA) * self.function_words)

    def numbers(self) -> tuple[int, ...]:
        """All counts in a row."""
        words = self.words, self.function_words
        return (*words, *self.content_matches, *self.function_matches)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> _Side:
        """The counts that `numbers` gave."""
        words, function_words, *matches = numbers
        return cls(words, function_words, tuple(matches[:_STAGES]), tuple(matches[_STAGES:]))


@dataclass(frozen=True)
class _Statistics:
    """Statistics of one caption, or of a whole corpus, for METEOR."""

    hypothesis: _Side = _Side()
    reference: _Side = _Side()
    chunks: int = 0  # a caption that is matched whole and in order counts none

    def score(self) -> float:
        hypothesis, reference = self.hypothesis, self.reference
        if not hypothesis.matches:
            return 0.0
        precision, recall = hypothesis.share(), reference.share()
        mean = 1.0 / ((1.0 - _ALPHA) / precision + _ALPHA / recall)
        fragments = self.chunks / ((hypothesis.matches + reference.matches) / 2)
        return max(mean * (1.0 - _GAMMA * math.pow(fragments, _BETA)), 0.0)

    def numbers(self) -> tuple[int, ...]:
        """All counts in a row."""
        return (*self.hypothesis.numbers(), *self.reference.numbers(), self.chunks)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> _Statistics:
        """The counts that `numbers` gave."""
        *sides, chunks = numbers
        half = len(sides) // 2
        return cls(_Side.of(sides[:half]), _Side.of(sides[half:]), chunks)


class Meteor15:
    """METEOR 1.5 against references that are prepared once, as `meteor-1.5.jar -l en -norm`.

    The score of a caption is that with its best reference; the corpus score comes from the summed
    counts of these, not from the mean. Tokens are lower-cased.

    Example:
        >>> meteor = Meteor15([[["a", "dog", "runs"], ["the", "dogs", "run", "fast"]]])
        >>> corpus, per_image = meteor([["a", "dog", "ran"]])[meteor.name]
        >>> meteor.name, round(corpus, 4)
        ('meteor_1_5_nopara', 0.9143)

    Args:
        references: One list of tokenised references per image.
        paraphrases: The table for the fourth stage, `find_paraphrases()` for an installed one;
            its part for these references is read at the first call (some seconds). None: three
            stages, whose scores are lower and carry their own name.

    Raises:
        DataError: `paraphrases` is not such a table (at the first call).

    Source:
        Denkowski and Lavie (2014); behaviour as of the Java tool in pycocoevalcap.
    """

    def __init__(
        self, references: Sequence[Sequence[Tokens]], paraphrases: Path | str | None = None
    ) -> None:
        self.name = "meteor_1_5_nopara" if paraphrases is None else "meteor_1_5"
        self._references = [[Sentence(tokens) for tokens in image] for image in references]
        self._table = None if paraphrases is None else Path(paraphrases)
        self._rewrites: Rewrites | None = None

    def __call__(self, hypotheses: Sequence[Tokens], images: Ints | None = None) -> Results:
        """Corpus and single scores of tokenised captions: one per image, or of these images."""
        return self.scores(self.counts(hypotheses, images))

    def counts(self, hypotheses: Sequence[Tokens], images: Ints | None = None) -> Ints:
        """Align each caption with its best reference: whole numbers of each caption, (I, S)."""
        rewrites, references = self._paraphrases(), of_images(self._references, images)
        rows = [
            _best(Sentence(tokens), image, rewrites).numbers()
            for tokens, image in zip(hypotheses, references, strict=True)
        ]
        return np.array(rows, np.int64).reshape(len(rows), _COUNTS)

    def scores(self, counts: Ints) -> Results:
        """Corpus and per-image scores from `counts`."""
        corpus = self.scores_of_sums(counts.sum(0, keepdims=True))[0, 0] if len(counts) else 0.0
        return {self.name: (float(corpus), self.scores_of_sums(counts)[:, 0].tolist())}

    @staticmethod
    def scores_of_sums(sums: Ints) -> Floats:
        """The score, (n, 1), of n samples of images from the sums, (n, S), of their counts."""
        scores = [[_Statistics.of(each).score()] for each in sums.tolist()]
        return np.array(scores, np.float64).reshape(-1, 1)

    def _paraphrases(self) -> Rewrites | None:
        if self._rewrites is None and self._table is not None:
            sentences = [sentence for image in self._references for sentence in image]
            runs = {run for sentence in sentences for run in sentence.runs()}
            self._rewrites = read_paraphrases(self._table, runs)
            known = set(self._rewrites).union(*self._rewrites.values())
            for sentence in sentences:
                sentence.keep_phrases(known)
        return self._rewrites


def _best(
    hypothesis: Sentence, references: Sequence[Sentence], rewrites: Rewrites | None
) -> _Statistics:
    """The statistics with the reference of the highest score, the first of equal ones."""
    each = [_compare(hypothesis, reference, rewrites) for reference in references]
    return max(each, key=_Statistics.score)


def _compare(hypothesis: Sentence, reference: Sentence, rewrites: Rewrites | None) -> _Statistics:
    matches = align(find_matches(hypothesis, reference, rewrites))
    here = _side(hypothesis, [(m.stage, m.hypothesis, m.hypothesis_length) for m in matches])
    there = _side(reference, [(m.stage, m.reference, m.reference_length) for m in matches])
    chunks = _chunks(matches)
    whole = here.matches == here.words and there.matches == there.words
    return _Statistics(here, there, 0 if whole and chunks == 1 else chunks)


def _side(sentence: Sentence, matches: Sequence[tuple[int, int, int]]) -> _Side:
    content, function = [0] * _STAGES, [0] * _STAGES
    for stage, start, length in matches:
        run = ((1 << length) - 1) << start
        functional = (sentence.function & run).bit_count()
        function[stage] += functional
        content[stage] += length - functional
    words, function_words = len(sentence.words), sentence.function.bit_count()
    return _Side(words, function_words, tuple(content), tuple(function))


def _chunks(matches: Sequence[Match]) -> int:
    """Runs of matches that follow one another in both captions."""
    ends = (-1, -1)
    chunks = 0
    for match in matches:
        chunks += ends != (match.reference, match.hypothesis)
        ends = (
            match.reference + match.reference_length,
            match.hypothesis + match.hypothesis_length,
        )
    return chunks
