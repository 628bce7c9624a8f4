"""Tokens as the COCO tool makes them: Penn Treebank rules, lower case, punctuation dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from capdistill.metrics.ptb_rules import ALL_RULES, PLAIN_WORD, RULES_AT, SPACE, Rule

_TWO_TOKENS = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
_DROPPED = {"", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_KIND = dict.fromkeys("0123456789", "0") | {"'": "'"}
_KIND |= dict.fromkeys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "a")
_LINE_BREAK = re.compile(r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")

# What stands between two spaces is cut off and known once its tokens are, unless these may depend
# on what stands beside it: numbers ("3 1/2", "555 1234"), "A. The", "no. 5", ". . .5", mark-up.
# Such text is cut only at the spaces that part for certain; text with other white space nowhere.
_OPEN = re.compile(
    r"[<\s]|[0-9)]$|^\.+[^.]|(?:^|[^A-Za-z])[A-Za-z]\.$|[^A-Za-z][A-Za-z]+\.$"
    r"|^(?i:art|ca|figs?|nos?|op|pp|prop)\.$"
)
_CUT = re.compile(r"(?<![0-9). ]) +|(?<=[0-9)]) +(?![0-9 ])|(?<=\.) +(?![0-9A-Z. ])")
_UNCUT = re.compile(r"<|[^\S ]")
_PIECES, _LENGTH = 1 << 16, 40  # how many pieces are remembered, and how long ones


class _Open(Exception):
    """The tokens of a piece may depend on its neighbours."""


class _Pieces(dict[str, tuple[str, ...]]):
    """The tokens of the pieces met so far; when it is full it forgets them all."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        tokens = tuple(_scan(piece))
        if len(self) >= _PIECES:
            self.clear()
        if len(piece) <= _LENGTH:
            self[piece] = tokens
        return tokens


class _ClosedPieces(_Pieces):
    """The tokens of pieces that are the same whatever stands beside them."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        if _OPEN.search(piece):
            raise _Open
        return super().__missing__(piece)


_closed, _joined = _ClosedPieces(), _Pieces()


def ptb_tokenize(text: str) -> list[str]:
    """The tokens of one caption, as the COCO tool's tokeniser (in Java) gives them.

    Any white space separates, line breaks included, so that one caption stays one caption.

    Example:
        >>> ptb_tokenize("A man can't see the dogs' ball (red) .")
        ['a', 'man', 'ca', "n't", 'see', 'the', 'dogs', 'ball', '-lrb-', 'red', '-rrb-']
    """
    try:
        return list(chain.from_iterable(map(_closed.__getitem__, text.split(" "))))
    except _Open:
        return _with_neighbours(text)


def _with_neighbours(text: str) -> list[str]:
    """The tokens of a text in which some reach over a space."""
    if _UNCUT.search(text):
        return list(_scan(text))
    return list(chain.from_iterable(map(_joined.__getitem__, _CUT.split(text))))


def _scan(text: str) -> Iterator[str]:
    """The tokens by the rules alone, place by place."""
    text, place = _LINE_BREAK.sub(" ", text) + "\n", 0
    last = len(text.rstrip())
    failing: dict[Rule, int] = {}
    while place < len(text):
        if space := SPACE.match(text, place):
            place = space.end()
            continue
        token, place = _next(text, place, failing)
        if token not in _DROPPED:
            yield token if place < last else token.rstrip()


def _next(text: str, place: int, failing: dict[Rule, int]) -> tuple[str, int]:
    """The token at `place` ("" where there is none), and where the text goes on."""
    plain = PLAIN_WORD.match(text, place)
    if plain and plain[0].lower() not in _TWO_TOKENS:
        return plain[0].lower(), plain.end()
    kind = _KIND.get(text[place])
    longest, end, write = 0, place + 1, None
    for rule in RULES_AT[kind] if kind else ALL_RULES:
        if rule.reach and place < failing.get(rule, 0):
            continue
        match = rule.pattern.match(text, place)
        if match and match.end() - place > longest:
            longest, end = match.end() - place, match.end(match.lastindex or 0)
            write = rule.write
        elif match is None and rule.reach:
            failing[rule] = rule.reach.match(text, place).end()  # type: ignore[union-attr]
    return (write(text[place:end]).lower() if write else ""), end
