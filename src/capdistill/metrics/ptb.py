"""Tokens as the COCO tool makes them: Penn Treebank rules, lower case, punctuation dropped."""

from __future__ import annotations

import re

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(
    r"""n't | '(?:s|m|d|re|ve|ll)\b | \w+(?=n't\b) | \w+(?:[-]\w+)* | [^\w\s]""",
    re.VERBOSE,
)


def ptb_tokenize(text: str) -> list[str]:
    """The tokens of one caption, as the COCO tool's Java tokeniser gives them.

    Example:
        >>> ptb_tokenize("A man can't see the dogs' ball .")
        ['a', 'man', 'ca', "n't", 'see', 'the', 'dogs', 'ball']
    """
    tokens = [_BRACKETS.get(token, token) for token in _TOKEN.findall(text.lower())]
    return [token for token in tokens if token not in _PUNCTUATION]
