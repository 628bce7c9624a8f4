"""What the n-gram metrics share: the types of tokenised captions, and counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ORDER = 4
Tokens = Sequence[str]
Ngram = tuple[str, ...]
Result = tuple[float, list[float]]  # corpus score, one score an image


def words(tokens: Tokens) -> Tokens:
    """The tokens without white space: "3 1/2" is one token of the Treebank but two words.

    Example:
        >>> words(["3\\u00a01/2", "cups"])
        ['3', '1/2', 'cups']
    """
    text = " ".join(tokens)
    return text.split() if "\u00a0" in text else tokens


def count_ngrams(tokens: Tokens, order: int = ORDER) -> Counter[Ngram]:
    """Occurrences of every n-gram of 1 to `order` tokens.

    Example:
        >>> count_ngrams(["a", "dog", "a"], order=2)[("a",)]
        2
    """
    counts: Counter[Ngram] = Counter()
    for n in range(1, order + 1):
        counts.update(zip(*(tokens[k:] for k in range(n)), strict=False))
    return counts
