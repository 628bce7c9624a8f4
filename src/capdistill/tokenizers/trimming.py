"""Which pieces of a tokenizer a student keeps, and how they spell the others.

Captions of `keep` are split exactly as by the full tokenizer. BPE: the reduced model has every
piece from which a kept one can be merged, and the merges between those, in their order. What the
full model merges on the way to a kept piece exists here too, and is still the first that applies.
Unigram: the best path of the full model consists of kept pieces, and fewer pieces give no better
one. WordPiece: the longest piece that matches is kept, and fewer pieces give no longer one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from capdistill.tokenizers.given import as_text, pieces_of, unknown_piece
from capdistill.tokenizers.joining import byte_of

_BYTE_COST = 1e3  # a byte is the last resort
_LONGEST = 256  # characters of a piece that spells others; bounds the time of a hostile file
_ASCII = {chr(code) for code in range(33, 127)}


class Speller:
    """Spells pieces by others: the fewest, or for a Unigram model the most probable.

    Example:
        >>> model = {"type": "WordPiece", "vocab": {}, "continuing_subword_prefix": "##"}
        >>> Speller(model, {"run", "##n", "##i", "##g", "##ing"})("running")
        ['run', '##n', '##ing']

    Args:
        model: The model in a tokenizer.json.
        pieces: Those that may be used.
    """

    def __init__(self, model: Mapping[str, Any], pieces: Iterable[str]) -> None:
        self.pieces = frozenset(pieces)
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""
        self.bytes = has_byte_fallback(model)
        scores = model["vocab"] if model["type"] == "Unigram" else ()
        self.costs = {piece: -float(score) for piece, score in scores}
        self.longest = min(max(map(len, self.pieces), default=0), _LONGEST)

    def body(self, piece: str) -> tuple[str, bool, bool]:
        """A piece without prefix and suffix, and whether it has them."""
        inside = bool(self.prefix) and piece.startswith(self.prefix) and piece != self.prefix
        text = piece[len(self.prefix) :] if inside else piece
        last = bool(self.suffix) and text.endswith(self.suffix) and text != self.suffix
        return (text[: -len(self.suffix)] if last else text), inside, last

    def symbols(self, piece: str) -> list[str]:
        """The smallest pieces of which a piece consists."""
        text, inside, last = self.body(piece)
        ends = len(text) - 1
        return [self._form(c, inside or n > 0, last and n == ends) for n, c in enumerate(text)]

    def _form(self, text: str, inside: bool, last: bool) -> str:
        return (self.prefix if inside else "") + text + (self.suffix if last else "")

    def __call__(self, piece: str) -> list[str] | None:
        """The pieces that spell a piece; None if there are none."""
        text, inside, last = self.body(piece)
        size = len(text)
        costs, before = [0.0] + [math.inf] * size, [0] * (size + 1)
        parts: list[list[str]] = [[]] * (size + 1)  # the last pieces of the best spelling so far
        for end in range(1, size + 1):
            for begin in range(max(0, end - self.longest), end):  # the longest first
                form = self._form(text[begin:end], inside or begin > 0, last and end == size)
                cost, found = self._cost(form, text[begin:end])
                if found and costs[begin] + cost < costs[end]:
                    costs[end], before[end], parts[end] = costs[begin] + cost, begin, found
        if costs[size] == math.inf:
            return None
        spelled: list[str] = []
        while size:
            spelled, size = parts[size] + spelled, before[size]
        return spelled

    def _cost(self, form: str, text: str) -> tuple[float, list[str]]:
        if form in self.pieces:
            return self.costs.get(form, 1.0), [form]
        if self.bytes and len(text) == 1:
            return _BYTE_COST, [f"<0x{byte:02X}>" for byte in text.encode("utf-8", "replace")]
        return 0.0, []


def has_byte_fallback(model: Mapping[str, Any]) -> bool:
    """Whether a character without a piece becomes its UTF-8 bytes."""
    if not model.get("byte_fallback"):
        return False
    pieces = pieces_of(model)
    return all(f"<0x{byte:02X}>" in pieces for byte in range(256))


def kept_pieces(content: Mapping[str, Any], occurring: set[str], special: set[str]) -> set[str]:
    """The pieces that stay: those that occur, and those that spell everything else.

    Args:
        content: The object in a tokenizer.json.
        occurring: Pieces of the captions.
        special: Special tokens; they spell nothing.
    """
    model = content["model"]
    pieces = {piece for piece in pieces_of(model) if piece not in special}
    speller = Speller(model, ())
    single = {piece for piece in pieces if len(speller.body(piece)[0]) == 1}
    if not speller.bytes:
        kept = occurring | single
        added = {t["content"] for t in content.get("added_tokens") or ()} - pieces - special
        symbols = {
            text: [s for word in text.split() for s in speller.symbols(word)] for text in added
        }
        symbols |= {piece: speller.symbols(piece) for piece in pieces}
        return kept | {text for text, parts in symbols.items() if not kept.issuperset(parts)}
    written = {key: content.get(key) for key in ("decoder", "pre_tokenizer", "normalizer")}
    characters = {c for piece in occurring for c in piece} | set(as_text(written)) | _ASCII
    return occurring | (single & characters) | {p for p in pieces if byte_of(p) is not None}


def reduced(content: Mapping[str, Any], kept: set[str], special: set[str]) -> dict[str, Any]:
    """The tokenizer with the kept pieces alone, where that is as good at spelling any text.

    Args:
        content: The object in a tokenizer.json.
        kept: As `kept_pieces` gives them.
        special: Special tokens; they spell nothing.
    """
    model = content["model"]
    unknown = unknown_piece(content)
    needed = kept | ({unknown} if unknown else set())
    make = {"BPE": _reduced_bpe, "Unigram": _reduced_unigram, "WordPiece": _reduced_word_piece}
    smaller = make[model["type"]](model, needed, special - {unknown})
    added = [token for token in content.get("added_tokens") or () if token["content"] in kept]
    return {**content, "added_tokens": added, "model": model if smaller is None else smaller}


def _reduced_bpe(model: Mapping[str, Any], kept: set[str], special: set[str]) -> dict[str, Any]:
    merges = [_pair(merge) for merge in model["merges"]]
    prefix = len(model.get("continuing_subword_prefix") or "")
    sources = defaultdict(list)
    for left, right in merges:
        sources[left + right[prefix:]].append((left, right))
    needed, queue = set(kept), list(kept)
    while queue:
        for pair in sources.get(queue.pop(), ()):
            queue += [piece for piece in pair if piece not in needed]
            needed.update(pair)
    ordered = [piece for piece in _by_id(model) if piece in needed and piece not in special]
    vocabulary = {piece: index for index, piece in enumerate(ordered)}
    fits = [list(p) for p in merges if {*p, p[0] + p[1][prefix:]} <= vocabulary.keys()]
    return {**model, "vocab": vocabulary, "merges": fits}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _reduced_unigram(
    model: Mapping[str, Any], kept: set[str], special: set[str]
) -> dict[str, Any] | None:
    """None if a character has no piece of its own: a path may then need a longer one."""
    pieces = [piece for piece, _ in model["vocab"] if piece not in special]
    if not has_byte_fallback(model) and not kept.issuperset(c for p in pieces for c in p):
        return None
    least = min(model["vocab"], key=lambda entry: entry[1])[0]  # sets the score of the unknown
    entries = [entry for entry in model["vocab"] if entry[0] in kept | {least}]
    entries = [entry for entry in entries if entry[0] not in special or entry[0] == least]
    unknown = model.get("unk_id")
    if unknown is not None:
        unknown = [entry[0] for entry in entries].index(model["vocab"][unknown][0])
    return {**model, "vocab": entries, "unk_id": unknown}


def _reduced_word_piece(
    model: Mapping[str, Any], kept: set[str], special: set[str]
) -> dict[str, Any] | None:
    """None if a character lacks a piece at the start of a word or within one."""
    speller = Speller(model, ())
    pieces = [piece for piece in _by_id(model) if piece not in special]
    characters = {c for piece in pieces for c in speller.body(piece)[0]}
    if not all({c, speller.prefix + c} <= kept for c in characters):
        return None
    ordered = [piece for piece in pieces if piece in kept]
    return {**model, "vocab": {piece: index for index, piece in enumerate(ordered)}}


def _by_id(model: Mapping[str, Any]) -> list[str]:
    return sorted(model["vocab"], key=model["vocab"].__getitem__)
