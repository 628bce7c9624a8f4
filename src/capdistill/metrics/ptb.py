"""Tokens as the COCO tool makes them: Penn Treebank rules, lower case, punctuation dropped."""

from __future__ import annotations

import re

from capdistill.metrics.ptb_rules import CLITIC, N_APOS, PLAIN_WORD, RULES, SPACE, SYMBOL

_TWO_TOKENS = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
_DROPPED = {"", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_WRITTEN = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **dict.fromkeys('"«»“”\x93\x94', "''"),
    **dict.fromkeys("‘’‛‹›\x91\x92", "'"),
    **dict.fromkeys("–—―\x96\x97", "--"),
    **dict.fromkeys(("&mdash;", "&ndash;", "&md;", "---", "----"), "--"),
    **dict.fromkeys("…\x85", "..."),
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'"},
    **dict.fromkeys("\x80¤€₠", "$"),
    **{"¢": "cents", "£": "#"},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
}
_SPELLING = str.maketrans({"\x92": "'", " ": "\u00a0", "\u00ad": None})
_CLITIC = re.compile(rf"{CLITIC}|n{N_APOS}t", re.IGNORECASE)


def ptb_tokenize(text: str) -> list[str]:
    """The tokens of one caption, as the COCO tool's tokeniser (in Java) gives them.

    Any white space separates, line breaks included, so that one caption stays one caption.

    Example:
        >>> ptb_tokenize("A man can't see the dogs' ball (red) .")
        ['a', 'man', 'ca', "n't", 'see', 'the', 'dogs', 'ball', '-lrb-', 'red', '-rrb-']
    """
    tokens, place = [], 0
    while place < len(text):
        space = SPACE.match(text, place)
        if space:
            place = space.end()
            continue
        token, place = _next(text, place)
        if token not in _DROPPED:
            tokens.append(token)
    return tokens


def _next(text: str, place: int) -> tuple[str, int]:
    """The token at `place` ("" where there is none), and where the text goes on."""
    plain = PLAIN_WORD.match(text, place)
    if plain and plain[0].lower() not in _TWO_TOKENS:
        return plain[0].lower(), plain.end()
    longest, end = 0, place
    for rule in RULES:
        match = rule.match(text, place)
        if match and match.end() - place > longest:
            longest, end = match.end() - place, match.end(match.lastindex or 0)
    if longest:
        return _write(text[place:end]), end
    symbol = SYMBOL.match(text, place)
    return _write(symbol[0]) if symbol else "", place + 1


def _write(token: str) -> str:
    """A token in the Treebank's spelling."""
    token = token.lower()
    if token in _WRITTEN:
        return _WRITTEN[token]
    if _CLITIC.fullmatch(token):
        token = token.replace("’", "'").replace("‘", "`")
    token = token.replace("&apos;", "'").replace("&amp;", "&").translate(_SPELLING)
    return token.replace("(", "-lrb-").replace(")", "-rrb-")
