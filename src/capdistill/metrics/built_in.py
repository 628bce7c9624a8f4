"""The built-in metrics by name: the scores that each gives, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from capdistill.errors import UnknownName, suggest
from capdistill.metrics.bleu_scores import Bleu
from capdistill.metrics.cider import CiderD
from capdistill.metrics.frequencies import DocumentFrequencies
from capdistill.metrics.meteor import MeteorNltk
from capdistill.metrics.ngram_table import ReferenceNgrams
from capdistill.metrics.ngrams import Result, Tokens
from capdistill.metrics.results import Direction
from capdistill.metrics.rouge import RougeL

Prepared = Callable[[Any], dict[str, Result]]

SCORES: dict[str, tuple[str, ...]] = {
    "bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4"),
    "rouge_l": ("rouge_l",),
    "cider_d": ("cider_d",),
    "meteor_nltk": ("meteor_nltk",),
    "meteor_1_5": ("meteor_1_5",),
    "meteor_1_5_nopara": ("meteor_1_5_nopara",),
}
"""Every built-in metric -> the scores that it gives."""

DIRECTIONS: dict[str, Direction] = {score: "higher" for each in SCORES.values() for score in each}
"""Every built-in score -> the direction in which it gets better."""

ON_NGRAMS = ("bleu", "cider_d")
"""Those that take counted n-grams in place of tokens."""


def select(names: Iterable[str] | None) -> dict[str, list[str]]:
    """Metric -> those of its scores that are asked for; None asks for all that can be had.

    METEOR 1.5 becomes its variant without paraphrases where there is no table of them.

    Example:
        >>> select(["bleu_4", "rouge_l"])
        {'bleu': ['bleu_4'], 'rouge_l': ['rouge_l']}

    Raises:
        UnknownName: a metric that there is not.
    """
    wanted: dict[str, list[str]] = {}
    for name in list(SCORES)[:-1] if names is None else names:
        metric = _metric_of(name)
        scores = [name] if name in SCORES[metric] else SCORES[metric]
        if metric == "meteor_1_5" and not _has_paraphrases():
            metric, scores = "meteor_1_5_nopara", SCORES["meteor_1_5_nopara"]
        found = wanted.setdefault(metric, [])
        found += [score for score in scores if score not in found]
    return wanted


def make(
    metric: str,
    tokens: Sequence[Sequence[Tokens]],
    ngrams: ReferenceNgrams | None,
    document_frequencies: DocumentFrequencies | None,
) -> Prepared:
    """A metric with its references prepared; those on n-grams share the counted ones."""
    if metric == "bleu":
        return Bleu(ngrams or tokens)
    if metric == "cider_d":
        return CiderD(ngrams or tokens, document_frequencies=document_frequencies)
    if metric == "rouge_l":
        return RougeL(tokens)
    if metric == "meteor_nltk":
        return MeteorNltk(tokens)
    from capdistill.metrics.meteor15 import Meteor15, find_paraphrases

    return Meteor15(tokens, find_paraphrases() if metric == "meteor_1_5" else None)


def _metric_of(name: str) -> str:
    for metric, scores in SCORES.items():
        if name == metric or name in scores:
            return metric
    raise UnknownName(f"No metric '{name}'. {suggest(name, dict.fromkeys([*SCORES, *DIRECTIONS]))}")


def _has_paraphrases() -> bool:
    from capdistill.metrics.meteor15 import find_paraphrases

    return find_paraphrases() is not None
