"""Captions to token ids and back.

`WordTokenizer` is the built-in one. Any object with the members of `Tokenizer` works, so another
teacher can keep its vocabulary.
"""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from capdistill.errors import (
    PRINTED_ENDS,
    CheckpointError,
    ConfigError,
    DataError,
    Requirement,
    is_count,
    require_attributes,
    require_text,
    shortened,
)
from capdistill.files import from_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
_FORMAT = "capdistill.word_tokenizer/1"
_SEPARATORS = re.compile(
    r"(?:[\s\u200b\ufeff.,!?;:\"`“”„«»()\[\]{}<>…–—―/\\|*_=+~^#¿¡।،؛؟。，、！？；：（）「」『』《》]|--)+"
)
_STRAIGHT = str.maketrans({**dict.fromkeys("‘’‛ʼ＇", "'"), **dict.fromkeys("‐‑", "-")})
_CLITICS = frozenset({"'s", "'re", "'ll", "'ve", "'d", "'m", "'t", "'n"})


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a tokenizer. Ids may coincide: padding is known by position."""

    pad_id: int
    start_id: int
    end_id: int

    @property
    def vocabulary(self) -> Sequence[str]:
        """The entries in the order of their ids."""

    def encode(self, caption: str) -> list[int]:
        """Ids from the start token to the end token; a truncated caption has no end token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the first end token (a leading start token is skipped)."""


def require_tokenizer(tokenizer: Tokenizer) -> None:
    """Check that an object has the interface of a tokenizer.

    Example:
        >>> require_tokenizer(WordTokenizer(["dog"]))

    Raises:
        ConfigError: an attribute is missing, or has another kind of value.
    """
    require_attributes("tokenizer", tokenizer, "Tokenizer", _ATTRIBUTES)


def _is_id(value: object) -> bool:
    return is_count(value, 0)


_ATTRIBUTES: dict[str, Requirement] = {
    "vocabulary": (lambda words: isinstance(words, Sequence), "its entries in order of their ids"),
    "pad_id": (_is_id, "the id of the padding token"),
    "start_id": (_is_id, "the id of the start token"),
    "end_id": (_is_id, "the id of the end token"),
    "encode": (callable, "a method from a caption to ids"),
    "decode": (callable, "a method from ids to a caption"),
}


def split_words(caption: str) -> list[str]:
    """Lower-cased words without punctuation; apostrophes, hyphens and digits inside them stay.

    Example:
        >>> split_words("A man's T-shirt , size 42 ... 'cool' !")
        ['a', "man's", 't-shirt', 'size', '42', 'cool']
    """
    text = unicodedata.normalize("NFC", caption).lower().translate(_STRAIGHT)
    if "'" not in text and "-" not in text:  # as most captions: nothing to strip
        return [word for word in _SEPARATORS.split(text) if word]
    pieces = (piece.strip("-") for piece in _SEPARATORS.split(text))
    words = (p if p in _CLITICS else p.strip("'-") for p in pieces)
    return [word for word in words if word]


def word_spans(caption: str) -> list[tuple[str, tuple[int, int]]]:
    """The words of `split_words`, and the characters [start, end) of the caption that each covers.

    Example:
        >>> word_spans("A man's T-shirt!")
        [('a', (0, 1)), ("man's", (2, 7)), ('t-shirt', (8, 15))]
    """
    text = unicodedata.normalize("NFC", caption).lower().translate(_STRAIGHT)
    plain = [(n, n + 1) for n in range(len(caption))]
    places = plain if caption.isascii() else _places(caption)
    words, at = [], 0
    for word in split_words(caption):
        at = text.index(word, at)
        end = at + len(word)
        words.append((word, (places[at][0], places[end - 1][1])))
        at = end
    return words


def _places(caption: str) -> list[tuple[int, int]]:
    """For each character of the normalised caption, the characters of the caption behind it."""
    places: list[tuple[int, int]] = []
    begin, normal = 0, ""
    for end in range(1, len(caption) + 1):
        normal = unicodedata.normalize("NFC", caption[begin:end])
        following = caption[end : end + 1]
        composed = unicodedata.normalize("NFC", caption[begin : end + 1])
        alone = normal + unicodedata.normalize("NFC", following)
        if following and (unicodedata.combining(following) or composed != alone):
            continue
        size = len(normal.lower())
        each = [(place, place + 1) for place in range(begin, end)]
        places += each if size == end - begin else [(begin, end)] * size
        begin = end
    return places


class WordTokenizer:
    """One id per word, for words that are frequent enough in the training captions.

    Example:
        >>> tokenizer = WordTokenizer.train(["A dog runs.", "A dog sleeps."], min_count=2)
        >>> tokenizer.vocabulary
        ('<pad>', '<start>', '<end>', '<unk>', 'a', 'dog')
        >>> tokenizer.encode("A dog runs."), tokenizer.decode([1, 4, 5, 2, 0])
        ([1, 4, 5, 3, 2], 'a dog')

    Args:
        words: The words, without the four special tokens, in the order of their ids.
        max_length: Words kept of a caption. A longer one is cut and gets no end token, so a model
            never learns to stop there; `count_truncated` counts them.

    Raises:
        ConfigError: a word twice, a special token among the words, an entry that is not a word,
            max_length < 1.
    """

    pad_id, start_id, end_id, unk_id = range(4)

    def __init__(self, words: Iterable[str], *, max_length: int = 40) -> None:
        _check_limit("max_length", max_length, 1)
        self._vocabulary = (*SPECIAL, *_checked(words))
        self._ids = {word: index for index, word in enumerate(self._vocabulary)}
        self.max_length = int(max_length)
        if len(self._ids) != len(self._vocabulary):
            twice = [w for w, n in Counter(self._vocabulary).items() if n > 1]
            raise ConfigError(f"WordTokenizer: entries must be distinct; given twice: {twice[:5]}.")

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        *,
        min_count: int = 5,
        max_size: int | None = None,
        max_length: int = 40,
    ) -> WordTokenizer:
        """Count the words of the training captions and keep the frequent ones.

        Args:
            captions: Raw captions of the training split.
            min_count: A word seen less often becomes the unknown token.
            max_size: Largest vocabulary, including the special tokens; the rarest words are
                dropped.
            max_length: Words kept of a caption.

        Raises:
            DataError: no word is frequent enough, or a caption is not text.
            ConfigError: max_size leaves no room for a word, min_count < 0, max_length < 1.
        """
        _check_limit("min_count", min_count, 0)
        if max_size is not None:
            _check_limit("max_size", max_size, len(SPECIAL) + 1)
        counts = Counter(word for caption in _texts(captions) for word in split_words(caption))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        words = [word for word, count in ranked if count >= min_count]
        if not words:
            raise DataError(
                f"WordTokenizer.train: none of the {len(counts)} distinct words occurs "
                f"{min_count} times. Give more captions or a smaller min_count."
            )
        kept = words if max_size is None else words[: max_size - len(SPECIAL)]
        return cls(kept, max_length=max_length)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The entries in the order of their ids, the special tokens first."""
        return self._vocabulary

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __repr__(self) -> str:
        return f"WordTokenizer({len(self)} words, max_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WordTokenizer):
            return NotImplemented
        mine, theirs = (self.vocabulary, self.max_length), (other.vocabulary, other.max_length)
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self._vocabulary, self.max_length))

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption: start, words, end; without end if it was cut."""
        if type(caption) is not str or caption.rstrip().endswith(PRINTED_ENDS):
            require_text(caption, "WordTokenizer: the caption")
        words = split_words(caption)
        ids = [self._ids.get(word, self.unk_id) for word in words[: self.max_length]]
        end = [] if len(words) > self.max_length else [self.end_id]
        return [self.start_id, *ids, *end]

    def encode_spans(self, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and the characters [start, end) of the caption that each covers.

        Example:
            >>> WordTokenizer(["dog"]).encode_spans("A dog!")
            ([1, 3, 4, 2], [(0, 0), (0, 1), (2, 5), (6, 6)])

        Start covers (0, 0) and end (n, n), where n is the number of characters.
        """
        ids, n = self.encode(caption), len(caption)
        spans = [span for _, span in word_spans(caption)[: self.max_length]]
        return ids, [(0, 0), *spans, *([(n, n)] if len(ids) > len(spans) + 1 else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """Words up to the first end token; padding and start never appear.

        Raises:
            DataError: one is not the id of an entry.
        """
        words = []
        for given in ids:
            index = operator.index(given) if hasattr(given, "__index__") else -1
            if not 0 <= index < len(self):
                raise DataError(
                    f"WordTokenizer: {shortened(given)} is not an id of this vocabulary; expected "
                    f"whole numbers from 0 to {len(self) - 1}, as encode() gives them."
                )
            if index == self.end_id:
                break
            if index not in (self.pad_id, self.start_id):
                words.append(self._vocabulary[index])
        return " ".join(words)

    def count_truncated(self, captions: Iterable[str]) -> int:
        """How many captions are longer than `max_length` words."""
        return sum(len(split_words(caption)) > self.max_length for caption in _texts(captions))

    def count_unknown(self, captions: Iterable[str]) -> tuple[int, int]:
        """Number of unknown words in the captions, and of all words."""
        words = [word for caption in _texts(captions) for word in split_words(caption)]
        return sum(word not in self._ids for word in words), len(words)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON."""
        content = {
            "format": _FORMAT,
            "max_length": self.max_length,
            "words": self._vocabulary[len(SPECIAL) :],
        }
        write_text(path, json.dumps(content, ensure_ascii=False, indent=0))

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read a vocabulary that `save` wrote.

        Raises:
            CheckpointError: the file was not written by `save`.
        """
        try:
            content = from_json(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise KeyError(content["format"])
            return cls(content["words"], max_length=content["max_length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a vocabulary of a WordTokenizer ({type(error).__name__}: {error}). "
                f"Expected a JSON file with format '{_FORMAT}', as WordTokenizer.save writes it."
            ) from error


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Sequences of ids to (B, T) ids and (B, T) mask; what is real is known by position.

    Example:
        >>> ids, mask = pad_batch([[0, 1, 0], [0, 0]], pad_id=0)
        >>> ids.tolist(), mask.tolist()
        ([[0, 1, 0], [0, 0, 0]], [[True, True, True], [True, True, False]])
    """
    import torch  # a tokenizer alone needs none

    lengths = torch.tensor([len(sequence) for sequence in sequences], device="cpu")
    longest = int(lengths.max())
    rows = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    ids = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return ids, torch.arange(longest, device="cpu") < lengths[:, None]


def _texts(captions: Iterable[str]) -> Iterable[str]:
    """The captions, each of which must be text.

    Raises:
        DataError: one is not, or they are one string.
    """
    if isinstance(captions, str) or not isinstance(captions, Iterable):
        kind = "one string" if isinstance(captions, str) else type(captions).__name__
        raise DataError(
            f"WordTokenizer: the captions are {shortened(captions)}, {kind}; give a list of "
            "captions."
        )
    for number, caption in enumerate(captions):
        yield require_text(caption, f"WordTokenizer: caption {number}")


def _checked(words: Iterable[str]) -> Iterable[str]:
    if isinstance(words, str) or not isinstance(words, Iterable):
        kind = "one string" if isinstance(words, str) else type(words).__name__
        raise ConfigError(
            f"WordTokenizer: words are {shortened(words, 40)}, {kind}; give a list of words, or "
            "train on captions with WordTokenizer.train."
        )
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"WordTokenizer: {word!r} is not a word; give strings.")
        yield word


def _check_limit(name: str, value: int, least: int) -> None:
    if not is_count(value, least):
        raise ConfigError(
            f"WordTokenizer: {name} must be a whole number of at least {least}, got {value!r}."
        )
