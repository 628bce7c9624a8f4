"""A caption prepared for METEOR's matching: its words, stems, senses and phrases."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cached_property, lru_cache
from typing import TypeVar

from capdistill.metrics.base import Tokens
from capdistill.metrics.meteor15.normalizer import normalize
from capdistill.metrics.meteor15.paraphrases import LONGEST
from capdistill.metrics.meteor15.stemmer import stem
from capdistill.metrics.meteor15.synonyms import senses

# The most frequent words of METEOR's corpora, above one in a thousand: they count less.
_FREQUENT = """the , . to of a and in that for " is on 's it with was as said at he by be from have
has are his but an this not i will ’ they ) -rrb- ( -lrb- who their had we which were been more or
s its would about new one after you : also up when there than $ all out her people she year two -
can if last first “ over other ” into some what so -- no time years could ? 't — '"""
FUNCTION_WORDS = frozenset(_FREQUENT.split())

_Key = TypeVar("_Key")
_stem = lru_cache(maxsize=1 << 16)(stem)


class Sentence:
    """One caption; what the stages look up is computed once, when it is first asked for.

    Example:
        >>> dogs = Sentence(["two", "dogs", "run"])
        >>> dogs.words, dogs.stems, bin(dogs.function)
        (['two', 'dogs', 'run'], ['two', 'dog', 'run'], '0b1')
    """

    def __init__(self, tokens: Tokens) -> None:
        self.words = normalize(tokens)

    @cached_property
    def function(self) -> int:
        """The places of function words, as bits."""
        return sum(1 << place for place, w in enumerate(self.words) if w in FUNCTION_WORDS)

    @cached_property
    def stems(self) -> list[str]:
        """The stem of each word."""
        return [_stem(word) for word in self.words]

    @cached_property
    def senses(self) -> list[frozenset[int]]:
        """The meanings of each word."""
        return [senses(word) for word in self.words]

    @cached_property
    def word_places(self) -> dict[str, int]:
        """Each word with its places, as bits."""
        return _places((word, place) for place, word in enumerate(self.words))

    @cached_property
    def stem_places(self) -> dict[str, int]:
        """Each stem with its places, as bits."""
        return _places((each, place) for place, each in enumerate(self.stems))

    @cached_property
    def sense_places(self) -> dict[int, int]:
        """Each meaning with its places, as bits."""
        return _places((each, place) for place, all_ in enumerate(self.senses) for each in all_)

    @cached_property
    def phrases(self) -> dict[str, list[int]]:
        """The runs of words that paraphrases are looked up for, with their starts in order."""
        return self.runs()

    def runs(self) -> dict[str, list[int]]:
        """Every run of words with the places where it starts, in order."""
        runs: dict[str, list[int]] = {}
        for start in range(len(self.words)):
            for end in range(start + 1, min(start + LONGEST, len(self.words)) + 1):
                runs.setdefault(" ".join(self.words[start:end]), []).append(start)
        return runs

    def keep_phrases(self, known: Container[str]) -> None:
        """Keep, of many sentences, only the phrases that have paraphrases: most have none."""
        self.phrases = {phrase: starts for phrase, starts in self.runs().items() if phrase in known}


def _places(found: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    places: dict[_Key, int] = {}
    for key, place in found:
        places[key] = places.get(key, 0) | 1 << place
    return places
