"""The meanings of a word in WordNet as METEOR looks them up: a form has those of its base too."""

from __future__ import annotations

import gzip
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

Senses = frozenset[int]

# The first ending that leads to a word of WordNet counts.
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
    ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


class _WordNet(NamedTuple):
    senses: dict[str, Senses]
    bases: dict[str, list[str]]  # irregular forms: men -> man


@lru_cache(maxsize=1 << 16)
def senses(word: str) -> Senses:
    """The meanings of a lower-case word and of its base; two words that share one are synonyms.

    Example:
        >>> senses("sofas").isdisjoint(senses("couch"))
        False
        >>> senses("dog").isdisjoint(senses("cat"))
        True
    """
    wordnet = _wordnet()
    own = wordnet.senses.get(word, Senses())
    bases = wordnet.bases.get(word)
    if bases is None:
        bases = [_base(word, wordnet)]
    return own.union(*(wordnet.senses.get(base, Senses()) for base in bases))


def _base(word: str, wordnet: _WordNet) -> str:
    """The regular base of a word; the word itself if it is too short or ends in -ss."""
    if len(word) < 3 or word.endswith("ss"):
        return word
    for ending, replacement in _ENDINGS:
        if word.endswith(ending):
            base = word[: -len(ending)] + replacement
            if base in wordnet.senses:
                return base
    return ""


@cache
def _wordnet() -> _WordNet:
    """Read the table: groups of synonyms, then words without any, then irregular forms."""
    packed = (files(__package__) / "synonyms.txt.gz").read_bytes()
    groups, lonely, irregular = gzip.decompress(packed).decode("ascii").split("\n\n")
    numbers: dict[str, list[int]] = {}
    for number, group in enumerate(groups.split("\n")):
        for word in group.split():
            numbers.setdefault(word, []).append(number)
    for number, word in enumerate(lonely.split(), len(numbers)):
        numbers[word] = [number]
    forms = (line.split() for line in irregular.splitlines())
    return _WordNet(
        senses={word: Senses(each) for word, each in numbers.items()},
        bases={form: bases for form, *bases in forms},
    )
