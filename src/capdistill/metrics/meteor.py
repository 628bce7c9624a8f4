"""METEOR as NLTK computes it, on PTB tokens, with WordNet's synonyms from the package."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from capdistill.metrics.ngrams import Result, Tokens, words
from capdistill.metrics.synonyms import synonyms

_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5  # NLTK's defaults, those of Lavie and Agarwal (2007)
Match = tuple[int, int]  # a place in the caption, a place in the reference


class MeteorNltk:
    """NLTK's METEOR: the mean over images of the best reference's score.

    Named after NLTK because it is another metric than METEOR 1.5, about twice as high. Scores
    are those of `nltk.translate.meteor_score` with all of WordNet 3.0, and nothing is fetched.

    Example:
        >>> meteor = MeteorNltk([[["a", "dog", "runs"]]])
        >>> round(meteor([["a", "dog", "runs"]])["meteor_nltk"][0], 2)
        0.98

    Args:
        references: One list of tokenised references an image.

    Source:
        Banerjee, Lavie (2005); `nltk.translate.meteor_score` with its defaults.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._references = [[_Sentence.of(tokens) for tokens in image] for image in references]

    def __call__(self, hypotheses: Sequence[Tokens]) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        pairs = zip(map(_Sentence.of, hypotheses), self._references, strict=True)
        scores = [max(_score(ours, theirs) for theirs in image) for ours, image in pairs]
        return {"meteor_nltk": (sum(scores) / max(len(scores), 1), scores)}


class _Sentence(NamedTuple):
    words: list[str]
    stems: list[str]

    @classmethod
    def of(cls, tokens: Tokens) -> _Sentence:
        lowered = [token.lower() for token in words(tokens)]
        return cls(lowered, [_stem(word) for word in lowered])


def _score(ours: _Sentence, theirs: _Sentence) -> float:
    matches = _align(ours, theirs)
    if not matches:
        return 0.0
    precision = len(matches) / len(ours.words)
    recall = len(matches) / len(theirs.words)
    mean = (precision * recall) / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty: float = _GAMMA * (_chunks(matches) / len(matches)) ** _BETA
    return (1 - penalty) * mean


def _align(ours: _Sentence, theirs: _Sentence) -> list[Match]:
    """Words are matched by form, the rest by stem, the rest by synonyms of their stems."""
    matches: list[Match] = []
    left, free = list(range(len(ours.words))), list(range(len(theirs.words)))
    for our_keys, their_keys in zip(ours, theirs, strict=True):
        found = list(_equal(left, our_keys, free, their_keys))
        matches += found
        left = _without(left, {i for i, _ in found})
        free = _without(free, {j for _, j in found})
    matches += _synonymous(left, ours.stems, free, theirs.stems)
    return sorted(matches)


def _equal(
    left: Sequence[int], ours: Sequence[str], free: Sequence[int], theirs: Sequence[str]
) -> Iterator[Match]:
    """Each word, from the last on, with the last free one that is equal."""
    places: dict[str, list[int]] = {}
    for j in free:
        places.setdefault(theirs[j], []).append(j)
    for i in reversed(left):
        if equal := places.get(ours[i]):
            yield i, equal.pop()


def _synonymous(
    left: Sequence[int], ours: Sequence[str], free: Sequence[int], theirs: Sequence[str]
) -> Iterator[Match]:
    """Each word, from the last on, with the last free one that is a synonym."""
    free = list(free)
    for i in reversed(left) if free else ():
        same = synonyms(ours[i])
        last = next((j for j in reversed(free) if theirs[j] in same), None)
        if last is not None:
            free.remove(last)
            yield i, last


def _without(places: list[int], taken: Container[int]) -> list[int]:
    return [place for place in places if place not in taken] if taken else places


def _chunks(matches: Sequence[Match]) -> int:
    """In how many runs the matched words stand, side by side in both sentences."""
    following = pairwise(matches)
    return 1 + sum(i + 1 != k or j + 1 != m for (i, j), (k, m) in following)


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
