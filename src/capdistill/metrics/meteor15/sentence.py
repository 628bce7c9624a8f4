"""A caption prepared for METEOR's matching: its words, stems, senses and phrases."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TypeVar

from capdistill.metrics.base import Tokens
from capdistill.metrics.meteor15.tables import LONGEST, senses

# The most frequent words of METEOR's corpora, above one in a thousand: they count less.
_FREQUENT = """the , . to of a and in that for " is on 's it with was as said at he by be from have
has are his but an this not i will ’ they ) -rrb- ( -lrb- who their had we which were been more or
s its would about new one after you : also up when there than $ all out her people she year two -
can if last first “ over other ” into some what so -- no time years could ? 't — '"""
FUNCTION_WORDS = frozenset(_FREQUENT.split())

_Key = TypeVar("_Key")


def _places(found: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    places: dict[_Key, int] = {}
    for key, place in found:
        places[key] = places.get(key, 0) | 1 << place
    return places


_LETTER = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e"  # Latin
    "\u0400-\u0527\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"  # Cyrillic, phonetic
)
_ELLIPSIS = "\ue000"  # one for each dot of an ellipsis, while single dots are dealt with

# In this order. Every rule continues behind its last match, as the tool's do: of two marks in a
# row the second may stay where it is.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([^0-9" + _LETTER + r" \t\n\x0b\f\r.'`,‘’-])", r" \1 "),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),  # a comma stays only between two digits
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        (r"[`‘’]", "'"),
        (r"“|”|''", ' " '),
        (r"–|--", "-"),
        (rf"([0-9.{_LETTER}])-([0-9{_LETTER}])", r"\1 \2"),  # no hyphens within words
        (rf"([^{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([^0-9{_LETTER}])'([{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),  # she's -> she 's
        (r"([0-9])'(s)", r"\1 '\2"),
    )
]
_DOTS = re.compile(r"\.{2,}")
_BREAKS = re.compile(r"[ \t\n\r\f]+")
_SPACES = re.compile(r"[ \t\n\r\f\xa0\u2000-\u200a\u202f\u205f\u3000]+")
_HAS_LETTER = re.compile(f"[{_LETTER}]")
# Abbreviations that keep their dot, and those that keep it only before a number.
_ABBREVIATIONS = """A B C D E F G H I J K L M N O P Q R S T U V W X Y Z Adj Adm Adv Asst Bart Bldg
Brig Bros Capt Cmdr Col Comdr Con Corp Cpl DR Dr Drs Ens Gen Gov Hon Hr Hosp Insp Lt MM MR MRS MS
Maj Messrs Mlle Mme Mr Mrs Ms Msgr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr St
Supt Surg v vs rev Nos Nr"""
_PREFIXES = frozenset(_ABBREVIATIONS.split())
_NUMBER_PREFIXES = frozenset({"No", "Art", "pp"})


def normalize(tokens: Tokens) -> list[str]:
    """The words of a caption as METEOR sees them: split from their punctuation, then lower-cased.

    Example:
        >>> normalize(["a", "well-known", "dog", "(brown)", "n't"])
        ['a', 'well', 'known', 'dog', '(', 'brown', ')', 'n', "'t"]
        >>> normalize("the U.S. team , No. 1 of Dr. Who".split())  # "No." keeps its dot before 1
        ['the', 'us', 'team', ',', 'no.', '1', 'of', 'dr.', 'who']
    """
    text = f" {' '.join(tokens)} "
    if not text.isascii() or not text.replace(" ", "").isalnum():
        text = _separate(text)
    return [word for word in _SPACES.split(text.lower()) if word]


def _separate(text: str) -> str:
    first, *others = _RULES
    text = first[0].sub(first[1], text)
    text = _DOTS.sub(lambda dots: f" {_ELLIPSIS * len(dots[0])} ", text)
    for pattern, replacement in others:
        text = pattern.sub(replacement, text)
    words = [word for word in _BREAKS.split(text) if word]
    following = [*words[1:], ""]
    text = " ".join(map(_final_dot, words, following))
    return text.replace(_ELLIPSIS, ".")


def _final_dot(word: str, following: str) -> str:
    """Cut off the dot that ends a sentence; keep an abbreviation's; drop those of initials."""
    if len(word) == 1 or not word.endswith("."):
        return word
    stem = word[:-1]
    if "." in stem and _HAS_LETTER.search(stem):
        return word.replace(".", "")
    if stem in _PREFIXES or "a" <= following[:1] <= "z":
        return word
    if stem in _NUMBER_PREFIXES and "0" <= following[:1] <= "9":
        return word
    return f"{stem} ."


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
    """Write Y for each y that starts the word or follows a vowel: it is a consonant there."""
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
            return _restore_ending(rest, r1) if _has_vowel(rest) else word
    return word


def _restore_ending(word: str, r1: int) -> str:
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


_stem = lru_cache(maxsize=1 << 16)(stem)


class Sentence:
    """One caption; what the stages look up is computed once, at its first use.

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
