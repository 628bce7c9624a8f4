"""WordNet 3.0's synonyms as NLTK's METEOR sees them, from a table in the package.

`tools/build_wordnet_synonyms.py` makes the table and says how it is written.
"""

from __future__ import annotations

import gzip
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_name("wordnet") / "synonyms.txt.gz"

# Inflections that NLTK undoes, by part of speech: noun, verb, adjective, adverb.
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "N": (
        *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch")),
        *(("shes", "sh"), ("men", "man"), ("ies", "y")),
    ),
    "V": (
        *(("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", "")),
        *(("ing", "e"), ("ing", "")),
    ),
    "A": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "R": (),
}


@cache
def synonyms(word: str) -> frozenset[str]:
    """The word and the single words that share a meaning with it or with a base form of it.

    Example:
        >>> sorted(synonyms("sofas"))
        ['couch', 'lounge', 'sofa', 'sofas']

    Args:
        word: In lower case.

    Source:
        Fellbaum (1998), WordNet 3.0; forms as `WordNetCorpusReader.synsets` of NLTK finds them.
    """
    found, entry = {word}, _entry(word)
    for pos, endings in _ENDINGS.items():
        bases = entry.get(f"={pos}")
        forms = _without_ending(word, endings) if bases is None else bases
        for form in (word, *forms):
            found.update(_answers(form, pos))
    return frozenset(found)


def _without_ending(word: str, endings: tuple[tuple[str, str], ...]) -> Iterator[str]:
    return (word[: -len(old)] + new for old, new in endings if word.endswith(old))


def _answers(form: str, pos: str) -> list[str]:
    entry = _entry(form)
    if pos in entry:
        return [form, *entry[pos]]
    return entry.get(f"-{pos}", [])


def _entry(word: str) -> dict[str, list[str]]:
    """The line of a word: a mark such as N, -N or =N -> the words after it."""
    lines, start = _lines(), f"{word} "
    place = bisect_left(lines, start)
    entry: dict[str, list[str]] = {}
    if place == len(lines) or not lines[place].startswith(start):
        return entry
    for field in lines[place][len(start) :].split(" "):
        if field.isupper():  # marks alone have capitals
            entry[field] = words = []
        else:
            words.append(field)
    return entry


@cache
def _lines() -> list[str]:
    return gzip.decompress(_TABLE.read_bytes()).decode("ascii").split("\n")
