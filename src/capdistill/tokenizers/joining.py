"""Pieces to text and words, by a tokenizer.json's `decoder` and without the package tokenizers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from capdistill.errors import ConfigError, shortened, suggest

Step = Callable[[list[str]], list[str]]
_CLOSING = frozenset(".,;:!?")


class Joining:
    """The rule that makes text of pieces.

    Example:
        >>> join = Joining({"type": "WordPiece", "prefix": "##", "cleanup": True})
        >>> join(["a", "dog", "##s", "."])
        'a dogs.'
        >>> Joining(None)(["a", "dog"])
        'a dog'

    Args:
        rule: The entry "decoder" of a tokenizer.json; None joins with spaces.

    Raises:
        ConfigError: a decoder of another type, or one without its options.

    Source:
        The decoders of the library tokenizers, whose `decode` gives the same text.
    """

    def __init__(self, rule: Mapping[str, Any] | None) -> None:
        self.rule = rule
        self._steps = None if rule is None else _steps(rule)

    def __call__(self, pieces: Sequence[str]) -> str:
        """The text of the pieces."""
        if self._steps is None:
            return " ".join(pieces)
        parts = list(pieces)
        for step in self._steps:
            parts = step(parts)
        return "".join(parts)

    def parts(self, pieces: Sequence[str | None]) -> list[str]:
        """What each piece adds to the text, without white space before it; None adds nothing.

        A piece that ends within a character adds that to the next one.
        """
        known = [[p for p in pieces[:n] if p is not None] for n in range(len(pieces) + 1)]
        *before, whole = [self(each).lstrip() for each in known]
        ends = accumulate((len(text.rstrip("\ufffd")) for text in before), max)
        return [whole[begin:end] for begin, end in pairwise([*ends, len(whole)])]


class WordBorders(NamedTuple):
    """How pieces make words.

    Args:
        added: Each of these is one more word in a caption: the first pieces of words, or the last
            ones where a tokenizer marks those.
        first: Those that are a word as the first piece of a caption.
        run_on: Pieces that belong to the word before them.
    """

    added: tuple[int, ...]
    first: tuple[int, ...]
    run_on: tuple[int, ...]


def borders_of(
    joining: Joining, ids: Mapping[str, int], before: Sequence[str], suffix: str
) -> WordBorders:
    """Which pieces begin or complete a word, and which continue the one before.

    Args:
        joining: From pieces to text.
        ids: The id of each piece.
        before: Pieces of a whole word.
        suffix: What a tokenizer marks the last pieces of words with, or "".
    """
    text = joining(before)
    count, run_on, solid = [], [], []
    for piece, index in sorted(ids.items(), key=operator.itemgetter(1)):
        added = joining([*before, piece])[len(text) :]
        word = any(c.isalnum() or c == "\ufffd" for c in added) or added.isspace()
        spaced = added[:1].isspace()
        count += [index] * (word and (piece.endswith(suffix) if suffix else spaced))
        solid += [index] * (word and not added.isspace())
        run_on += [index] * (not (suffix or spaced or _CLOSING.issuperset(added)))
    return WordBorders(tuple(count), tuple(count if suffix else solid), tuple(run_on))


def _steps(rule: Any) -> list[Step]:
    kind = rule.get("type") if isinstance(rule, Mapping) else None
    if kind == "Sequence" and isinstance(rule.get("decoders"), list):
        return [step for inner in rule["decoders"] for step in _steps(inner)]
    if not isinstance(kind, str) or kind not in _STEPS:
        raise ConfigError(
            f"tokenizer: its decoder {shortened(rule)} is not known here, so the pieces cannot be "
            f"joined. {suggest(str(kind), ['Sequence', *_STEPS])}"
        )
    make, options = _STEPS[kind]
    values = {name: rule.get(name, default) for name, default in options.items()}
    for name, default in options.items():
        if type(values[name]) is not type(default):
            raise ConfigError(
                f"tokenizer: the decoder {kind} has {name}={shortened(values[name])}; expected "
                f"{type(default).__name__}."
            )
    return [make(**values)]


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that byte-level tokenizers write for bytes.

    Example:
        >>> alphabet = byte_alphabet()
        >>> alphabet["a"], alphabet["Ġ"] == ord(" "), len(alphabet)
        (97, True, 256)

    Source:
        Radford et al. (2019), `bytes_to_unicode` of GPT-2's encoder.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTES = byte_alphabet()


def _byte_level() -> Step:
    def join(pieces: list[str]) -> list[str]:
        data = b"".join(
            bytes(_BYTES[c] for c in piece) if _BYTES.keys() >= set(piece) else piece.encode()
            for piece in pieces
        )
        return [data.decode("utf-8", "replace")]

    return join


_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def _word_piece(prefix: str, cleanup: bool) -> Step:
    def join(pieces: list[str]) -> list[str]:
        parts = []
        for number, piece in enumerate(pieces):
            if number:
                continues = piece.startswith(prefix)
                piece = piece.replace(prefix, "", 1) if continues else f" {piece}"
            for found, replacement in _CLEANED if cleanup else ():
                piece = piece.replace(found, replacement)
            parts.append(piece)
        return parts

    return join


def _metaspace(replacement: str, prepend_scheme: str) -> Step:
    first = " " if prepend_scheme == "never" else ""

    def join(pieces: list[str]) -> list[str]:
        return [p.replace(replacement, " " if n else first) for n, p in enumerate(pieces)]

    return join


def byte_of(piece: str) -> int | None:
    """The byte that a piece of byte fallback stands for; None for any other piece.

    Example:
        >>> byte_of("<0xE2>"), byte_of("dog")
        (226, None)
    """
    if len(piece) != 6 or not piece.startswith("<0x") or not piece.endswith(">"):
        return None
    digits = piece[3:5]
    return int(digits, 16) if all(c in "0123456789abcdefABCDEF" for c in digits) else None


def _byte_fallback() -> Step:
    def join(pieces: list[str]) -> list[str]:
        parts: list[str] = []
        run: list[int] = []
        for piece in [*pieces, None]:
            byte = None if piece is None else byte_of(piece)
            if byte is not None:
                run.append(byte)
                continue
            if run:
                parts.extend(_text_of(bytes(run)))
                run = []
            if piece is not None:
                parts.append(piece)
        return parts

    return join


def _text_of(data: bytes) -> list[str]:
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError:
        return ["\ufffd"] * len(data)


def _fuse() -> Step:
    return lambda pieces: ["".join(pieces)]


def _replace(pattern: dict[str, Any], content: str) -> Step:
    found = pattern.get("String")
    if not isinstance(found, str) or not found:
        raise ConfigError(
            f"tokenizer: its decoder replaces {shortened(pattern)}; only strings are replaced here."
        )
    return lambda pieces: [piece.replace(found, content) for piece in pieces]


def _strip(content: str, start: int, stop: int) -> Step:
    def strip(piece: str) -> str:
        first, last = 0, len(piece)
        while first < min(start, len(piece)) and piece[first] == content:
            first += 1
        while len(piece) - last < min(stop, len(piece)) and piece[last - 1] == content:
            last -= 1
        return piece[first:last]

    return lambda pieces: [strip(piece) for piece in pieces]


def _bpe(suffix: str) -> Step:
    def join(pieces: list[str]) -> list[str]:
        last = len(pieces) - 1
        return [p.replace(suffix, "" if n == last else " ") for n, p in enumerate(pieces)]

    return join


_STEPS: dict[str, tuple[Callable[..., Step], dict[str, Any]]] = {
    "ByteLevel": (_byte_level, {}),
    "WordPiece": (_word_piece, {"prefix": "##", "cleanup": True}),
    "Metaspace": (_metaspace, {"replacement": "▁", "prepend_scheme": "always"}),
    "ByteFallback": (_byte_fallback, {}),
    "Fuse": (_fuse, {}),
    "Replace": (_replace, {"pattern": {}, "content": ""}),
    "Strip": (_strip, {"content": " ", "start": 0, "stop": 0}),
    "BPEDecoder": (_bpe, {"suffix": "</w>"}),
}
