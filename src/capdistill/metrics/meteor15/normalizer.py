"""METEOR's own normalisation: it separates the punctuation that a tokenizer left on words."""

from __future__ import annotations

import re

from capdistill.metrics.base import Tokens

_LETTER = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e"  # Latin
    "\u0400-\u0527\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"  # Cyrillic, phonetic
)
_ELLIPSIS = "\ue000"  # one for each dot of an ellipsis, while single dots are dealt with

# In this order. Every rule reads on behind its last match, as the tool's do, so that of two
# marks in a row the second may stay where it is.
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
_PREFIXES = {"v", "vs", "rev"}  # of the tool's abbreviations those without capitals ...
_NUMBER_PREFIXES = {"pp"}  # ... and those that are one only before a number


def normalize(tokens: Tokens) -> list[str]:
    """The words of a caption as METEOR sees them, lower-cased.

    Example:
        >>> normalize(["a", "well-known", "dog", "(brown)", "n't"])
        ['a', 'well', 'known', 'dog', '(', 'brown', ')', 'n', "'t"]
        >>> normalize("the u.s. team , no. 1 at 3 p.m.".split())
        ['the', 'us', 'team', ',', 'no', '.', '1', 'at', '3', 'pm']
    """
    text = f" {' '.join(tokens)} ".lower()
    if not text.isascii() or not text.replace(" ", "").isalnum():
        text = _separate(text)
    return [word for word in _SPACES.split(text) if word]


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
    """A dot ends a sentence, or belongs to an abbreviation, or is dropped from initials."""
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
