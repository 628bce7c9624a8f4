"""The English Snowball stemmer ("Porter 2") in the edition that METEOR 1.5 carries."""

from __future__ import annotations

import re
from collections.abc import Sequence

_VOWELS = frozenset("aeiouy")
_FIRST_REGION = re.compile("(?:gener|commun|arsen)|[^aeiouy]*[aeiouy]+[^aeiouy]")
_REGION = re.compile("[^aeiouy]*[aeiouy]+[^aeiouy]")
_SHORT_END = re.compile("[^aeiouy][aeiouy][^aeiouywxY]$|^[aeiouy][^aeiouy]$")
_DOUBLE = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")

_Rules = Sequence[tuple[str, str]]


def _rules(text: str) -> _Rules:
    """'ational:ate li:' as (suffix, replacement), the longest suffix first."""
    pairs = (pair.partition(":") for pair in text.split())
    return sorted(((old, new) for old, _, new in pairs), key=lambda pair: -len(pair[0]))


_WHOLE = dict(
    _rules(
        "skis:ski skies:sky dying:die lying:lie tying:tie idly:idl gently:gentl ugly:ugli "
        "early:earli only:onli singly:singl sky:sky news:news howe:howe atlas:atlas "
        "cosmos:cosmos bias:bias andes:andes"
    )
)
_KEPT = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
_STEP_2 = _rules(
    "tional:tion enci:ence anci:ance abli:able entli:ent izer:ize ization:ize ational:ate "
    "ation:ate ator:ate alism:al aliti:al alli:al fulness:ful ousli:ous ousness:ous "
    "iveness:ive iviti:ive biliti:ble bli:ble ogi:og fulli:ful lessli:less li:"
)
_STEP_3 = _rules("tional:tion ational:ate alize:al icate:ic iciti:ic ical:ic ful: ness: ative:")
_STEP_4 = _rules(
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ism: ate: iti: ous: ive: ize: ion:"
)


def stem(word: str) -> str:
    """The stem of a lower-case word.

    Example:
        >>> [stem(word) for word in ("running", "happily", "realization", "news", "'tis")]
        ['run', 'happili', 'realiz', 'news', 'tis']

    Source:
        Porter, "The English (Porter2) stemming algorithm", snowballstem.org, with the lists
        of the edition in METEOR 1.5.
    """
    if word in _WHOLE or len(word) < 3:
        return _WHOLE.get(word, word)
    word = _mark_consonant_y(word.removeprefix("'"))
    r1, r2 = _regions(word)
    word = _plural(word)
    if word not in _KEPT:
        word = _past(word, r1)
        if len(word) > 2 and word[-1] in "yY" and word[-2] not in _VOWELS:
            word = word[:-1] + "i"
        word = _derivation(word, _STEP_2, r1, r2)
        word = _derivation(word, _STEP_3, r1, r2)
        word = _derivation(word, _STEP_4, r2, r2)
        word = _final_letter(word, r1, r2)
    return word.replace("Y", "y")


def _mark_consonant_y(word: str) -> str:
    """Write Y for each y that starts the word or follows a vowel: it is no vowel there."""
    letters = list(word)
    for place, letter in enumerate(letters):
        if letter == "y" and (place == 0 or letters[place - 1] in _VOWELS):
            letters[place] = "Y"
    return "".join(letters)


def _regions(word: str) -> tuple[int, int]:
    """Where R1 and R2 begin: behind the first, and the second, consonant after a vowel."""
    first = _FIRST_REGION.match(word)
    if first is None:
        return len(word), len(word)
    second = _REGION.match(word, first.end())
    return first.end(), second.end() if second else len(word)


def _has_vowel(text: str) -> bool:
    return not _VOWELS.isdisjoint(text)


def _plural(word: str) -> str:
    for suffix in ("'s'", "'s", "'"):
        if word.endswith(suffix):
            word = word[: -len(suffix)]
            break
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and _has_vowel(word[:-2]):
        return word[:-1]
    return word


def _past(word: str, r1: int) -> str:
    for suffix in ("eedly", "eed"):
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            return word[:start] + "ee" if start >= r1 else word
    for suffix in ("ingly", "edly", "ing", "ed"):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            return _mend(rest, r1) if _has_vowel(rest) else word
    return word


def _mend(word: str, r1: int) -> str:
    """What is left after -ed or -ing: hop(p), lik(e), creat(e)."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if word.endswith(_DOUBLE):
        return word[:-1]
    return word + "e" if len(word) == r1 and _SHORT_END.search(word) else word


def _derivation(word: str, rules: _Rules, region: int, r2: int) -> str:
    """Replace the longest of the suffixes if it lies within the region."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            allowed = start >= region and _may_go(suffix, word[:start], start >= r2)
            return word[:start] + replacement if allowed else word
    return word


def _may_go(suffix: str, rest: str, in_r2: bool) -> bool:
    """The conditions that single suffixes have."""
    if suffix == "ogi":
        return rest.endswith("l")
    if suffix == "li":
        return rest.endswith(tuple("cdeghkmnrt"))
    if suffix == "ion":
        return rest.endswith(("s", "t"))
    return in_r2 if suffix == "ative" else True


def _final_letter(word: str, r1: int, r2: int) -> str:
    start = len(word) - 1
    if word.endswith("e"):
        gone = start >= r2 or (start >= r1 and not _SHORT_END.search(word[:-1]))
        return word[:-1] if gone else word
    return word[:-1] if word.endswith("ll") and start >= r2 else word
