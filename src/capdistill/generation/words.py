"""Words of the configuration as ids of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

from capdistill.errors import ConfigError
from capdistill.tokenizer import Tokenizer

_FUNCTION_WORDS = """a an the and or but nor of with without to at from for into onto in on as than
that which who whose while because if his its my our your their is are was were be very"""
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())  # after which an English caption has to go on


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of the text alone, without start and end."""
    ids = list(tokenizer.encode(text))
    if ids and ids[0] == tokenizer.start_id:
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.end_id:
        ids = ids[:-1]
    return tuple(ids)


def sayable(tokenizer: Tokenizer, option: str, texts: Iterable[str]) -> list[tuple[int, ...]]:
    """The ids of each text that the vocabulary can say; the others can not be said anyway.

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


def single(tokenizer: Tokenizer, option: str, texts: Iterable[str]) -> tuple[int, ...]:
    """The ids of the texts that are one token."""
    return tuple(ids[0] for ids in sayable(tokenizer, option, texts) if len(ids) == 1)


def function_words(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of `FUNCTION_WORDS` that are one entry of the vocabulary."""
    ids = {entry: index for index, entry in enumerate(tokenizer.vocabulary)}
    return tuple(ids[word] for word in FUNCTION_WORDS if word in ids)


def prefix_ids(tokenizer: Tokenizer, prefix: str) -> tuple[int, ...]:
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
            f"generation: prefix={prefix!r} has words that the vocabulary has not: "
            f"{', '.join(missing)}. Leave them out."
        )
    return ids
