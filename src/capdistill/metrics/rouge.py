"""ROUGE-L as the COCO tool computes it: the best precision and recall over references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from capdistill.metrics.ngrams import Result, Tokens

_BETA = 1.2  # the COCO tool's weight of recall


class RougeL:
    """F-score of the longest common subsequence; the corpus score is the mean over images.

    Example:
        >>> rouge = RougeL([[["a", "dog", "runs"]]])
        >>> round(rouge([["a", "dog"]])["rouge_l"][0], 4)
        0.7722

    Args:
        references: One list of tokenised references an image.

    Source:
        Lin (2004); beta and the maxima as in pycocoevalcap, but a caption without words scores
        0 even where a reference has none either (pycocoevalcap gives 1 there).
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._references = references

    def __call__(self, hypotheses: Sequence[Tokens]) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        pairs = zip(hypotheses, self._references, strict=True)
        scores = [_f_score(tokens, references) for tokens, references in pairs]
        return {"rouge_l": (sum(scores) / max(len(scores), 1), scores)}


def _f_score(tokens: Tokens, references: Sequence[Tokens]) -> float:
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    common = [_common(places, len(tokens), reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(tokens)
    recall = max(c / len(ref) for c, ref in zip(common, references, strict=True) if c)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(places: Mapping[str, int], length: int, reference: Tokens) -> int:
    """Length of the longest common subsequence, one step a token (Hyyrö 2004, bit-parallel)."""
    open_places = full = (1 << length) - 1
    for token in reference:
        matched = open_places & places.get(token, 0)
        open_places = (open_places + matched | open_places - matched) & full
    return length - open_places.bit_count()
