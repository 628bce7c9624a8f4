"""Options of decoding that speak of words, in the ids of a tokenizer of words or of subwords."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from capdistill.errors import ConfigError

Ids = tuple[int, ...]
_FUNCTION_WORDS = """a an the and or but nor of with without to at from for into onto in on as than
that which who whose while because if his its my our your their is are was were be very"""
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())  # words with which an English caption cannot end


class WordBorders(Protocol):
    """How pieces make words; see `capdistill.tokenizers.joining.WordBorders`."""

    @property
    def added(self) -> Ids:
        """Each of these is one more word."""

    @property
    def first(self) -> Ids:
        """These are a word as the first piece of a caption."""

    @property
    def run_on(self) -> Ids:
        """These belong to the word before them."""


class SubwordTokenizer(Protocol):
    """What a tokenizer knows about the words that its pieces spell."""

    @property
    def word_borders(self) -> WordBorders:
        """Which pieces make a word."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def word_forms(self, text: str) -> tuple[Ids, Ids]:
        """Ids of words as the beginning of a caption, and as they stand within one."""


@dataclass(frozen=True)
class SubwordRules:
    """Constraints that a vocabulary of words does not need.

    Args:
        banned_first: Sequences that no caption begins with: banned words without a space before
            them. Elsewhere the same pieces are the end of another word.
        not_last: Sequences of two and more ids that no caption ends with.
        not_whole: Sequences that are no whole caption.
        added, first: Ids that add a word, and those that do as the first; for `min_length`.
        run_on: Ids that may not follow the prefix: they would continue its last word.
    """

    banned_first: tuple[Ids, ...] = ()
    not_last: tuple[Ids, ...] = ()
    not_whole: tuple[Ids, ...] = ()
    added: Ids = ()
    first: Ids = ()
    run_on: Ids = ()


def find(
    tokenizer: Any,
    banned_words: Iterable[str],
    not_last: Iterable[str] | str,
    prefix: str,
    *,
    counts: bool,
) -> dict[str, Any]:
    """The arguments of a `GenerationSpec` that hold words.

    Args:
        tokenizer: A tokenizer of words, or of subwords if it has `word_forms`.
        banned_words: Words or phrases.
        not_last: Words, or "function_words".
        prefix: What every caption begins with.
        counts: Whether the words of a caption are counted.

    Raises:
        ConfigError: a text without any word, or a prefix that the vocabulary does not have.
    """
    last = FUNCTION_WORDS if isinstance(not_last, str) else tuple(not_last)
    begin = prefix_ids(tokenizer, prefix)
    if hasattr(tokenizer, "word_forms"):
        found = subword_ids(tokenizer, banned_words, last, counts=counts or bool(prefix))
        return {**found, "prefix": begin}
    banned = known_ids(tokenizer, "banned_words", banned_words)
    if isinstance(not_last, str):
        ends = function_words(tokenizer)
    else:
        known = known_ids(tokenizer, "not_last", last)
        ends = tuple(ids[0] for ids in known if len(ids) == 1)
    return {
        "banned": tuple(ids[0] for ids in banned if len(ids) == 1),
        "phrases": tuple(ids for ids in banned if len(ids) > 1),
        "not_last": ends,
        "prefix": begin,
    }


def subword_ids(
    tokenizer: SubwordTokenizer,
    banned_words: Iterable[str],
    not_last: Iterable[str],
    *,
    counts: bool,
) -> dict[str, Any]:
    """Words in ids, in every form in which the tokenizer writes them.

    A word is taken as it is given, in lower case, with a capital and in capitals, at the beginning
    of a caption and within. It is banned as the sequence of its pieces, so a longer word that
    begins with all of them is banned too; another sequence of pieces that spells it is not.

    Args:
        tokenizer: A tokenizer of subwords.
        banned_words, not_last: Words or phrases.
        counts: Whether words are counted or follow a prefix.

    Raises:
        ConfigError: a text without any word.
    """
    first, inside = _forms(tokenizer, "banned_words", banned_words)
    whole, last = _forms(tokenizer, "not_last", not_last)
    borders = tokenizer.word_borders if counts else None
    rules = SubwordRules(
        banned_first=tuple(ids for ids in first if ids not in inside),
        not_last=tuple(ids for ids in last if len(ids) > 1),
        not_whole=tuple(ids for ids in whole if ids not in last),
        added=borders.added if borders else (),
        first=borders.first if borders else (),
        run_on=borders.run_on if borders else (),
    )
    return {
        "banned": tuple(ids[0] for ids in inside if len(ids) == 1),
        "phrases": tuple(ids for ids in inside if len(ids) > 1),
        "not_last": tuple(ids[0] for ids in last if len(ids) == 1),
        "subwords": rules,
    }


def _forms(
    tokenizer: SubwordTokenizer, option: str, texts: Iterable[str]
) -> tuple[list[Ids], list[Ids]]:
    """Every form of the texts at the beginning, and within; those of known pieces alone."""
    unknown = getattr(tokenizer, "unk_id", None)
    found: tuple[dict[Ids, None], dict[Ids, None]] = ({}, {})
    for text in texts:
        if not text.strip():
            raise ConfigError(f"generation: {option} has {text!r}, which holds no word.")
        cases = (text, text.lower(), text[:1].upper() + text[1:], text.upper())
        for case in dict.fromkeys(cases):
            for forms, ids in zip(found, tokenizer.word_forms(case), strict=True):
                lost = _letters(tokenizer.decode(ids)) < _letters(case)
                if ids and not lost and (unknown is None or unknown not in ids):
                    forms[ids] = None
    return [*found[0]], [*found[1]]


def _letters(text: str) -> int:
    return sum(map(str.isalnum, unicodedata.normalize("NFC", text)))


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of the text alone, without start and end."""
    ids = list(tokenizer.encode(text))
    if ids and ids[0] == tokenizer.start_id:
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.end_id:
        ids = ids[:-1]
    return tuple(ids)


def known_ids(tokenizer: Any, option: str, texts: Iterable[str]) -> list[tuple[int, ...]]:
    """The ids of each text whose words are in the vocabulary; the others cannot occur anyway.

    Raises:
        ConfigError: a text without any word.
    """
    unknown, found = getattr(tokenizer, "unk_id", None), []
    for text in texts:
        ids = encode(tokenizer, text)
        if not ids:
            raise ConfigError(f"generation: {option} has {text!r}, which holds no word.")
        if unknown is None or unknown not in ids:
            found.append(ids)
    return found


def function_words(tokenizer: Any) -> tuple[int, ...]:
    """The ids of `FUNCTION_WORDS` that are one entry of the vocabulary."""
    ids = {entry: index for index, entry in enumerate(tokenizer.vocabulary)}
    return tuple(ids[word] for word in FUNCTION_WORDS if word in ids)


def prefix_ids(tokenizer: Any, prefix: str) -> tuple[int, ...]:
    """The prefix' ids.

    Raises:
        ConfigError: a word that the vocabulary does not have, or no word at all.
    """
    if not prefix:
        return ()
    ids = encode(tokenizer, prefix)
    if not ids:
        raise ConfigError(f"generation: prefix={prefix!r} holds no word.")
    unknown = getattr(tokenizer, "unk_id", None)
    if unknown in ids:
        missing = [w for w in prefix.split() if unknown in encode(tokenizer, w)]
        raise ConfigError(
            f"generation: prefix={prefix!r} has words that are not in the vocabulary: "
            f"{', '.join(missing)}. Leave them out."
        )
    return ids


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Words, or the text of pieces for a tokenizer that has it."""
    texts = getattr(tokenizer, "token_texts", None)
    return tuple(texts(ids) if texts else (tokenizer.vocabulary[index] for index in ids))
