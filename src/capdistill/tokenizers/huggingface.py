"""`HuggingFace`: the subwords of any Hugging Face tokenizer, trimmed to a student's captions."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from capdistill.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    require_int,
    require_text,
    shortened,
)
from capdistill.files import from_json, write_text
from capdistill.tokenizers.given import (
    FORMAT,
    ROLES,
    Given,
    as_text,
    check_content,
    find_roles,
    library_call,
    library_tokenizer,
    read,
    special_pieces,
)
from capdistill.tokenizers.joining import Joining, WordBorders, borders_of
from capdistill.tokenizers.trimming import Speller, kept_pieces, reduced

Span = tuple[int, int]
_HALVES = re.compile("[\ud800-\udfff]")


class HuggingFace:
    """The subwords of a Hugging Face tokenizer, all of them or those that a student needs.

    With `keep`, the vocabulary is what occurs in those captions, start, end, padding and unknown
    token, and the single bytes or characters. Nothing is lost: captions of `keep` are split exactly
    as by the full tokenizer, and any other text into more pieces that decode to the same text.

    The text of a caption never becomes a special token. Encoding needs the package tokenizers
    (extra `hf`), decoding needs nothing.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> pieces = ["[UNK]", "[CLS]", "[SEP]", "a", "d", "##d", "##a", "dad", "add"]
        >>> theirs = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}))
        >>> theirs.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> theirs.decoder = decoders.WordPiece()
        >>> tokenizer = HuggingFace(theirs, keep=["a dad"])
        >>> tokenizer.vocabulary
        ('[UNK]', '[CLS]', '[SEP]', 'a', 'd', '##d', '##a', 'dad')
        >>> tokenizer.full_ids
        (0, 1, 2, 3, 4, 5, 6, 7)
        >>> ids = tokenizer.encode("dad add")
        >>> [tokenizer.vocabulary[each] for each in ids]
        ['[CLS]', 'dad', 'a', '##d', '##d', '[SEP]']
        >>> tokenizer.decode(ids)
        'dad add'

    Args:
        tokenizer: A fast tokenizer of transformers, a `tokenizers.Tokenizer`, the path of a
            tokenizer.json or of its directory, or one of this class, such as a teacher's.
        keep: Captions of the training split; None keeps the whole vocabulary with its ids.
        max_length: Pieces kept of a caption. A longer one is cut and gets no end token.
        start, end, pad: Tokens or ids. By default those that the tokenizer declares (start: BOS or
            CLS, end: EOS or SEP). Without a start or padding token, it is the end token.
        size: Width of the model's logits where it exceeds the number of entries.

    Raises:
        ConfigError: another kind of tokenizer, no end token, or a token that it does not have.
        DataError: a caption is not text.
        MissingExtra: the package tokenizers is not installed.
    """

    pad_id: int
    start_id: int
    end_id: int
    unk_id: int | None

    def __init__(
        self,
        tokenizer: Any,
        keep: Iterable[str] | None = None,
        max_length: int = 40,
        *,
        start: str | int | None = None,
        end: str | int | None = None,
        pad: str | int | None = None,
        size: int | None = None,
    ) -> None:
        require_int("HuggingFace: max_length", max_length, 1)
        ours = isinstance(tokenizer, HuggingFace)
        given = tokenizer._given(size) if ours else read(tokenizer, size)
        if ours:
            start = tokenizer.start_id if start is None else start
            end = tokenizer.end_id if end is None else end
            pad = tokenizer.pad_id if pad is None else pad
        full = given.vocabulary
        roles = dict(zip(ROLES, find_roles(given, start, end, pad), strict=True))
        special = special_pieces(given.content) | {full[i] for i in roles.values() if i is not None}
        special |= {piece for index, piece in enumerate(full) if piece == f"<unused {index}>"}
        special_ids = [index for index, piece in enumerate(full) if piece in special]
        content = {
            "format": FORMAT,
            "max_length": int(max_length),
            **roles,
            "special": special_ids,
            "pieces": list(full),
            "full_ids": None,
            "full_vocabulary": None,
            "tokenizer": _text_only(given.content, special),
        }
        if ours:
            before = tokenizer._content
            content |= {key: before[key] for key in ("unknown", "full_ids", "full_vocabulary")}
            content["special"] = sorted(set(before["special"]).union(special_ids))
        self._set(content)
        if keep is not None:
            self._set(self._trimmed(content, keep))

    def _given(self, size: int | None) -> Given:
        if size not in (None, len(self)):
            raise ConfigError(
                f"HuggingFace: size={size!r} was given with a tokenizer of {len(self)} entries "
                "that capdistill made. Leave it out."
            )
        return Given(self._content["tokenizer"], {}, self._vocabulary)

    def _set(self, content: dict[str, Any]) -> None:
        self._content = content
        self._vocabulary = tuple(content["pieces"])
        self.max_length: int = content["max_length"]
        self.start_id, self.end_id = content["start"], content["end"]
        self.pad_id, self.unk_id = content["pad"], content["unknown"]
        self._special = frozenset(content["special"])
        self._own = {p: i for i, p in enumerate(self._vocabulary) if i not in self._special}
        if self.unk_id is not None:
            self._own[self._vocabulary[self.unk_id]] = self.unk_id
        self._joining = Joining(content["tokenizer"].get("decoder"))
        self._spelled: dict[int, tuple[int, ...]] = {}
        for cached in ("_encoder", "_speller", "full_ids", "full_vocabulary", "word_borders"):
            self.__dict__.pop(cached, None)

    def _trimmed(self, content: dict[str, Any], keep: Iterable[str]) -> dict[str, Any]:
        full, tokenizer = self._vocabulary, content["tokenizer"]
        special = {full[index] for index in self._special}
        occurring = {index for text in _texts(keep) for index in self._pieces(_spaced(text))[0]}
        kept = kept_pieces(tokenizer, {full[i] for i in occurring - self._special}, special)
        needed = {content[role] for role in ROLES} | {self._own[p] for p in kept if p in self._own}
        ids = sorted(index for index in needed if index is not None)
        place = {index: number for number, index in enumerate(ids)}
        return {
            **content,
            **{role: place.get(content[role]) for role in ROLES},
            "special": [place[index] for index in content["special"] if index in place],
            "pieces": [full[index] for index in ids],
            "full_ids": [self.full_ids[index] for index in ids],
            "full_vocabulary": list(self.full_vocabulary),
            "tokenizer": reduced(tokenizer, kept, special),
        }

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The entries in the order of their ids, as the tokenizer writes them."""
        return self._vocabulary

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of special tokens; `decode` leaves them out."""
        return tuple(sorted(self._special))

    @property
    def trimmed(self) -> bool:
        """Whether pieces were dropped."""
        return self._content["full_ids"] is not None

    @cached_property
    def full_ids(self) -> tuple[int, ...]:
        """For each id, that of the same entry in the untrimmed vocabulary."""
        ids = self._content["full_ids"]
        return tuple(range(len(self))) if ids is None else tuple(ids)

    @cached_property
    def full_vocabulary(self) -> tuple[str, ...]:
        """The entries of the untrimmed vocabulary."""
        entries = self._content["full_vocabulary"]
        return self._vocabulary if entries is None else tuple(entries)

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __repr__(self) -> str:
        kind = self._content["tokenizer"]["model"]["type"]
        of = f" of {len(self.full_vocabulary):,}" if self.trimmed else ""
        return f"HuggingFace({kind}, {len(self):,}{of} pieces, max_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HuggingFace):
            return NotImplemented
        return self._content == other._content

    def __hash__(self) -> int:
        return hash((self._vocabulary, self.max_length, self.start_id, self.end_id))

    def __getstate__(self) -> dict[str, Any]:
        return self._content

    def __setstate__(self, content: dict[str, Any]) -> None:
        self._set(content)

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption: start, pieces, end; without end if it was cut.

        White space is a single space each, without any at the ends.
        """
        require_text(caption, "HuggingFace: the caption")
        ids = self._pieces(_spaced(caption))[0]
        end = [] if len(ids) > self.max_length else [self.end_id]
        return [self.start_id, *ids[: self.max_length], *end]

    def encode_spans(self, caption: str) -> tuple[list[int], list[Span]]:
        """The ids of `encode`, and the characters [start, end) of the caption that each covers.

        Spans have no white space at their ends. Start covers (0, 0) and end (n, n) of n characters.
        Pieces that share a character, as its bytes do, all cover it.
        """
        ids = self.encode(caption)
        spans = self._pieces(_spaced(caption))[1][: self.max_length]
        words = caption.split()
        places, at = [], 0  # of each character of the text with single spaces
        for word in words:
            at = caption.index(word, at)
            places += [*range(at, at + len(word)), at + len(word)]
            at += len(word)
        found = [(places[a], places[b - 1] + 1 if b > a else places[a]) for a, b in spans]
        n = len(caption)
        return ids, [(0, 0), *found, *([(n, n)] if len(ids) > len(found) + 1 else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end token, without special tokens.

        Raises:
            DataError: one is not the id of an entry.
        """
        pieces = []
        for number, given in enumerate(ids):
            index = operator.index(given) if hasattr(given, "__index__") else -1
            if not 0 <= index < len(self):
                raise DataError(
                    f"HuggingFace: {shortened(given)} is not an id of this vocabulary; expected "
                    f"whole numbers from 0 to {len(self) - 1}, as encode() gives them."
                )
            if index == self.end_id and (number or index != self.start_id):
                break
            if index not in self._special:
                pieces.append(self._vocabulary[index])
        return self._joining(pieces).strip()

    def count_truncated(self, captions: Iterable[str]) -> int:
        """How many captions are longer than `max_length` pieces."""
        lengths = (len(self._pieces(_spaced(text))[0]) for text in _texts(captions))
        return sum(length > self.max_length for length in lengths)

    def count_unknown(self, captions: Iterable[str]) -> tuple[int, int]:
        """Number of unknown tokens in the captions, and of all pieces."""
        ids = [i for text in _texts(captions) for i in self._pieces(_spaced(text))[0]]
        return (0 if self.unk_id is None else ids.count(self.unk_id)), len(ids)

    def word_forms(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of words as the beginning of a caption, and as they stand within one.

        Example:
            >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
            >>> theirs = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2, "end": 3}, [("Ġ", "a")]))
            >>> theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            >>> theirs.decoder = decoders.ByteLevel()
            >>> HuggingFace(theirs, end="end").word_forms("a a")
            ((0, 2), (2, 2))
        """
        text, before = _spaced(text), self._pieces("a")[0]
        within = self._pieces(f"a {text}")[0]
        same = within[: len(before)] == before
        inside = within[len(before) :] if same else self._pieces(f" {text}")[0]
        return tuple(self._pieces(text)[0]), tuple(inside)

    @cached_property
    def word_borders(self) -> WordBorders:
        """Which pieces begin or complete a word, and which continue the one before."""
        before = [self._vocabulary[index] for index in self._pieces("a")[0]]
        return borders_of(self._joining, self._own, before, self._speller.suffix)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each id adds: joined, they are that of `decode`.

        Example:
            >>> from tokenizers import Tokenizer, decoders, models
            >>> theirs = Tokenizer(models.WordPiece({"[SEP]": 0, "a": 1, "dog": 2, "##s": 3}))
            >>> theirs.decoder = decoders.WordPiece()
            >>> HuggingFace(theirs).token_texts([1, 2, 3])
            ['a', ' dog', 's']

        The bytes of one character are the text of the last of them.
        """
        special, entries = self._special, self._vocabulary
        return self._joining.parts([None if i in special else entries[i] for i in ids])

    def _pieces(self, text: str) -> tuple[list[int], list[Span]]:
        """Own ids of a text, and the characters of it that each covers."""
        encoder = self._encoder
        encoding = library_call(lambda: encoder.encode(text, add_special_tokens=False))
        ids: list[int] = []
        spans: list[Span] = []
        for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            own = self._spelling(index)
            part = text[begin:end]
            begin += len(part) - len(part.lstrip())
            end = max(begin, end - (len(part) - len(part.rstrip())))
            ids += own
            spans += [(begin, end)] if len(own) == 1 else self._divided(own, begin, end)
        return ids, spans

    def _spelling(self, index: int) -> tuple[int, ...]:
        """Own ids for an id of the encoder."""
        if index not in self._spelled:
            added = self._encoder.get_added_tokens_decoder().get(index)
            piece = added.content if added else self._encoder.id_to_token(index)
            own = self._own.get(piece)
            unknown = () if self.unk_id is None else (self.unk_id,)
            is_unknown = piece == self._content["tokenizer"]["model"].get("unk_token")
            parts = [piece] if own is not None else None if is_unknown else self._speller(piece)
            self._spelled[index] = unknown if parts is None else tuple(self._own[p] for p in parts)
        return self._spelled[index]

    def _divided(self, ids: tuple[int, ...], begin: int, end: int) -> list[Span]:
        """The spans of pieces that spell one with the span [begin, end)."""
        pieces = [self._vocabulary[index] for index in ids]
        texts = [self._joining(pieces[:n]).strip() for n in range(len(pieces) + 1)]
        if len(texts[-1]) != end - begin:  # the text was normalised: no character has a piece
            return [(begin, end)] * len(ids)
        borders = [(len(t) - t.endswith("\ufffd"), len(t)) for t in texts]
        return [
            (begin + borders[n][0], begin + max(borders[n][0], borders[n + 1][1]))
            for n in range(len(ids))
        ]

    @cached_property
    def _speller(self) -> Speller:
        pieces = (piece for piece, index in self._own.items() if index != self.unk_id)
        return Speller(self._content["tokenizer"]["model"], pieces)

    @cached_property
    def _encoder(self) -> Any:
        return library_tokenizer(as_text(self._content["tokenizer"]))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary, the rules and the special tokens as JSON."""
        write_text(path, as_text(self._content))

    @classmethod
    def load(cls, path: str | Path) -> HuggingFace:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file was not written by `save`.
        """
        try:
            content = from_json(Path(path).read_text(encoding="utf-8"))
            check_content(content)
            tokenizer = cls.__new__(cls)
            tokenizer._set(content)
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a tokenizer of subwords ({type(error).__name__}: {error}). "
                f"Expected a JSON file with format '{FORMAT}', as HuggingFace.save writes it."
            ) from error


def _text_only(content: Mapping[str, Any], special: set[str]) -> dict[str, Any]:
    """The tokenizer without special tokens, which are never part of a caption's text."""
    kept = [t for t in content.get("added_tokens") or () if t["content"] not in special]
    return {
        **json.loads(json.dumps(content)),
        **{"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None},
    }


def _spaced(caption: str) -> str:
    """With single spaces, and without half characters, which have no bytes."""
    return _HALVES.sub("\ufffd", " ".join(caption.split()))


def _texts(captions: Iterable[str]) -> Iterable[str]:
    if isinstance(captions, str) or not isinstance(captions, Iterable):
        raise DataError(
            f"HuggingFace: the captions are {shortened(captions)}, {type(captions).__name__}; give "
            "a list of captions."
        )
    for number, caption in enumerate(captions):
        yield require_text(caption, f"HuggingFace: caption {number}")
