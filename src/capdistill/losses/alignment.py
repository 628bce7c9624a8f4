"""Two tokenizations of one caption, aligned at the words that begin at the same character."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer

Spans = Sequence[tuple[int, int]]
Table = np.ndarray[Any, np.dtype[np.int64]]
_JOINERS = "'’ʼ-‐‑"
_KEPT = 2**16  # captions whose alignment is kept
_FIRST, _LATER = 0, 1  # contexts: units differ at the start of a caption ("dog", " dog")


class Word(NamedTuple):
    """A word of a caption in one tokenization.

    Args:
        start, stop: Its characters; blanks before it do not count.
        first, end: Its tokens, as positions of the targets: 0 follows the start token.
    """

    start: int
    stop: int
    first: int
    end: int


def split_tokens(caption: str, spans: Spans) -> list[Word]:
    """The words of an encoded caption; the end token is a word without characters.

    A token begins a word unless it goes on within a run of letters and digits. Tokens of blanks
    alone belong to the word that follows.

    Example:
        >>> spans = [(0, 0), (0, 1), (1, 5), (5, 7), (7, 8), (8, 8)]
        >>> [(word.start, word.first, word.end) for word in split_tokens("a doggy.", spans)]
        [(0, 0, 1), (2, 1, 3), (7, 3, 4), (8, 4, 5)]

    Args:
        caption: The raw caption.
        spans: (start, end) characters of each token, the start token first; see `encode_spans`.
    """
    words: list[Word] = []
    first, last = 0, -1
    for place, (start, end) in enumerate(spans[1:]):
        text = caption[start:end]
        begin, stop = end - len(text.lstrip()), start + len(text.rstrip())
        ends = start == end == len(caption)
        if begin >= end and not ends:
            continue  # blanks: `first` stays, the next word begins here
        if not words or (begin > last and _begins_word(caption, begin)):
            words.append(Word(begin, max(stop, begin), first, place + 1))
        else:
            words[-1] = words[-1]._replace(stop=max(stop, words[-1].stop), end=place + 1)
        first, last = place + 1, max(last, begin)
    return words


def _begins_word(caption: str, place: int) -> bool:
    return not (place and _is_inside(caption, place - 1) and _is_inside(caption, place))


def _is_inside(caption: str, place: int) -> bool:
    """Whether a character is part of a word; an apostrophe or a hyphen is between two letters."""
    if caption[place : place + 1] in _JOINERS:
        around = caption[place - 1 : place], caption[place + 1 : place + 2]
        return place > 0 and all(map(_is_letter, around))
    return _is_letter(caption[place : place + 1])


def _is_letter(character: str) -> bool:
    return character.isalnum() or (character != "" and unicodedata.category(character)[0] == "M")


class Units(NamedTuple):
    """The tokens of a vocabulary that are a whole word, and the classes of these words.

    Args:
        ids: (U,) the tokens.
        classes: (U,) the class of each, 0 to K - 1. Several may have one: "Dog" and "dog".
        rest: Whether there are other tokens.
    """

    ids: Tensor
    classes: Tensor
    rest: bool


class Context(NamedTuple):
    """The words that are one token in both vocabularies, at the start or within a caption."""

    size: int
    student: Units
    teacher: Units


class Side(NamedTuple):
    """One model at n aligned words.

    Args:
        rows, places: (n,) the caption, and the position of the word's first token in it.
        ids: (n,) that token.
        moves: (n,) bool, whether the probability of the whole word is moved to its class.
        chain: (m, 4) the tokens that follow within a word: number of the word, caption, position
            and id of each.
    """

    rows: Tensor
    places: Tensor
    ids: Tensor
    moves: Tensor
    chain: Tensor


class AlignedWords(NamedTuple):
    """The words of a batch that begin at the same character for both models.

    Args:
        student, teacher: Where they are.
        contexts: (n,) 0 for the first word of a caption, 1 for others.
        classes: (n,) the class of the word itself: 0 to K - 1, K for the rest, or K + 1 for a
            class of its own.
    """

    student: Side
    teacher: Side
    contexts: Tensor
    classes: Tensor


class Coverage(NamedTuple):
    """Numbers of words: all of the student's, the aligned ones, those that both have as a token."""

    words: int
    aligned: int
    single: int


@dataclass(frozen=True)
class _Caption:
    """The aligned words of a caption: (n, 10) numbers, and the chains of both models."""

    ids: list[int]  # of the student
    words: Table
    chains: tuple[Table, Table]  # (m, 3): word, position, id


class WordAlignment:
    """Aligns the student's ids of a batch with the teacher's ids of the same captions.

    Example:
        >>> from capdistill.tokenizer import WordTokenizer
        >>> one, other = WordTokenizer(["a", "dog"]), WordTokenizer(["dog", "cat", "a"])
        >>> aligned = WordAlignment(one, other)
        >>> aligned.contexts[1].student.ids.tolist(), aligned.contexts[1].teacher.ids.tolist()
        ([2, 5, 4], [2, 4, 6])

    Args:
        student, teacher: Tokenizers with `encode_spans`.

    Raises:
        ConfigError: one has no `encode_spans`.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        for role, tokenizer in {"student": student, "teacher": teacher}.items():
            if not callable(getattr(tokenizer, "encode_spans", None)):
                raise ConfigError(
                    f"The tokenizer of the {role}, {type(tokenizer).__name__}, has no "
                    "encode_spans, by which words are aligned: it returns the ids of encode "
                    "and the characters (start, end) that each covers. Add it, or learn from "
                    "captions of the teacher: cd.teachers.caption."
                )
        self.student, self.teacher = student, teacher
        self._contexts: tuple[Context, Context] | None = None
        self._classes: list[tuple[dict[int, int], dict[int, int]]] = []  # token -> class
        self._captions: dict[str, _Caption] = {}

    def __deepcopy__(self, memo: object) -> WordAlignment:
        return self  # it has no state but what it has computed

    @property
    def contexts(self) -> tuple[Context, Context]:
        """The words that are one token in both vocabularies: at the start of a caption, later."""
        if self._contexts is None:
            texts = _texts(self.student), _texts(self.teacher)
            made = [_common(self.student, self.teacher, texts, before) for before in ("", "a ")]
            self._contexts = made[_FIRST], made[_LATER]
            self._classes = [(_by_id(each.student), _by_id(each.teacher)) for each in made]
        return self._contexts

    def of(self, batch: Batch) -> AlignedWords:
        """The aligned words of a batch, on its device.

        Words are read from the captions. Where the ids of a row are no longer those of its caption
        (a sample that was cut, or cut into other pieces), its further words are left out.
        """
        given = batch.input_ids.masked_fill(~batch.mask, -1).tolist()
        words: list[Table] = []
        chains: tuple[list[Table], list[Table]] = ([], [])
        done = 0
        for number, caption in enumerate(batch.captions):
            known = self._caption(caption)
            limit = _common_length(known.ids, given[number]) - 1  # targets
            count = int(np.searchsorted(known.words[:, 3], limit, side="right"))
            words.append(np.insert(known.words[:count], 0, number, axis=1))
            for several, chain in zip(chains, known.chains, strict=True):
                kept = chain[chain[:, 0] < count] + np.array([done, 0, 0])
                several.append(np.insert(kept, 1, number, axis=1))
            done += count
        device = batch.input_ids.device
        table, *further = (torch.from_numpy(np.concatenate(x)).to(device) for x in (words, *chains))
        row, context, own = table[:, :3].unbind(1)
        sides = []
        for columns, following in zip((table[:, 3:7], table[:, 7:]), further, strict=True):
            first, _, token, moves = columns.unbind(1)
            sides.append(Side(row, first, token, moves.bool(), following))
        return AlignedWords(sides[0], sides[1], context, own)

    def coverage(self, captions: Iterable[str]) -> Coverage:
        """How many words of some captions are aligned."""
        words = aligned = single = 0
        for caption in captions:
            table = self._caption(caption).words
            words += len(split_tokens(caption, self.student.encode_spans(caption)[1]))
            aligned += len(table)
            sizes = np.array([each.size for each in self.contexts])[table[:, 0]]
            single += int((table[:, 1] < sizes).sum())
        return Coverage(words, aligned, single)

    def side_by_side(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) captions, and positions up to the end of the shorter encoding, equal in both."""
        lengths = batch.target_mask.sum(1).tolist()
        theirs = [len(self.teacher.encode(caption)) - 1 for caption in batch.captions]
        shorter = [min(pair) for pair in zip(lengths, theirs, strict=True)]
        device = batch.input_ids.device
        count = torch.tensor(shorter, device=device)
        rows = torch.arange(len(shorter), device=device).repeat_interleave(count)
        begins = (count.cumsum(0) - count).repeat_interleave(count)
        places = torch.arange(len(rows), device=device) - begins
        return rows, places, places

    def _caption(self, caption: str) -> _Caption:
        found = self._captions.get(caption)
        if found is None:
            if len(self._captions) >= _KEPT:
                self._captions.clear()
            found = self._captions[caption] = self._align(caption)
        return found

    def _align(self, caption: str) -> _Caption:
        contexts = self.contexts
        ids, spans = self.student.encode_spans(caption)
        their_ids, their_spans = self.teacher.encode_spans(caption)
        others = {word.start: word for word in split_tokens(caption, their_spans)}
        rows: list[list[int]] = []
        chains: tuple[list[list[int]], list[list[int]]] = ([], [])
        for mine in split_tokens(caption, spans):
            theirs = others.get(mine.start)
            if theirs is None:
                continue
            context = _FIRST if mine.first == theirs.first == 0 else _LATER
            parts = ids[1 + mine.first : 1 + mine.end], their_ids[1 + theirs.first : 1 + theirs.end]
            own = self._own_class(context, *parts) if _same(caption, mine, theirs) else None
            row = [context, contexts[context].size if own is None else own]
            for side, (word, tokens) in enumerate(zip((mine, theirs), parts, strict=True)):
                rest = contexts[context].size
                before = self._classes[context][side].get(tokens[0], rest)
                row += [word.first, word.end, tokens[0], int(own not in (None, before))]
                following = enumerate(tokens[1:], word.first + 1)
                chains[side].extend([len(rows), place, token] for place, token in following)
            rows.append(row)
        table = np.array(rows, np.int64).reshape(-1, 10)
        both = [np.array(each, np.int64).reshape(-1, 3) for each in chains]
        return _Caption(ids, table, (both[0], both[1]))

    def _own_class(self, context: int, mine: Sequence[int], theirs: Sequence[int]) -> int | None:
        """The class of the word itself; None if one of the vocabularies does not know it."""
        for side, tokens in enumerate((mine, theirs)):
            if len(tokens) == 1 and tokens[0] in self._classes[context][side]:
                return self._classes[context][side][tokens[0]]
        unknown = [getattr(each, "unk_id", None) for each in (self.student, self.teacher)]
        if unknown[0] in mine or unknown[1] in theirs:
            return None
        return self.contexts[context].size + 1


def _same(caption: str, *words: Word) -> bool:
    """Whether words that begin together also end together, but for punctuation."""
    ends = []
    for word in words:
        stop = word.stop
        while stop > word.start and not _is_letter(caption[stop - 1]):
            stop -= 1
        ends.append(stop)
    return ends[0] == ends[1]


def _by_id(units: Units) -> dict[int, int]:
    return dict(zip(units.ids.tolist(), units.classes.tolist(), strict=True))


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many entries are equal from the beginning."""
    if list(other[: len(one)]) == one:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    """The text of every token that may be a word."""
    special = _special(tokenizer)
    ids = (each for each in range(len(tokenizer.vocabulary)) if each not in special)
    texts = ((each, tokenizer.decode([each]).strip()) for each in ids)
    return {each: text for each, text in texts if text and "\ufffd" not in text}


def _special(tokenizer: Any) -> set[int | None]:
    names = ("pad_id", "start_id", "end_id", "unk_id")
    return {getattr(tokenizer, name, None) for name in names}


def _common(student: Any, teacher: Any, texts: Sequence[dict[int, str]], before: str) -> Context:
    """The words that both tokenizers encode as one token, behind a text.

    Tokens of one vocabulary that are the same to the other one are in one class.
    """
    singles = _Single(student, before), _Single(teacher, before)
    classes, size = ({student.end_id: 0}, {teacher.end_id: 0}), 1
    for side in (1, 0):
        for token, text in texts[side].items():
            pair = singles[0](text), singles[1](text)
            if None in pair or pair[side] != token:
                continue
            known = [of.get(each) for of, each in zip(classes, pair, strict=True)]
            number = next((each for each in known if each is not None), size)
            size = max(size, number + 1)
            for of, each in zip(classes, pair, strict=True):
                of.setdefault(each, number)
    units = (_units(of, each) for of, each in zip(classes, (student, teacher), strict=True))
    return Context(size, *units)


def _units(classes: dict[int, int], tokenizer: Tokenizer) -> Units:
    ids, of = torch.tensor([*classes]), torch.tensor([*classes.values()])
    return Units(ids, of, len(classes) < len(tokenizer.vocabulary))


class _Single:
    """The only token of a text behind another one; None if it has several, or is unknown."""

    def __init__(self, tokenizer: Any, before: str) -> None:
        self.tokenizer, self.before = tokenizer, before
        self.special = _special(tokenizer)
        self.prefix = list(tokenizer.encode(before.strip())[:-1])

    def __call__(self, text: str) -> int | None:
        try:
            ids = list(self.tokenizer.encode(self.before + text))
        except DataError:  # what looks like a printed list is no caption
            return None
        whole = ids[:-2] == self.prefix and ids[-1] == self.tokenizer.end_id
        return ids[-2] if whole and ids[-2] not in self.special else None
