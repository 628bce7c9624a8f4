"""Score captions against references that are prepared once: what training and evaluation use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from capdistill.errors import DataError, UnknownName, suggest
from capdistill.metrics.bleu import Bleu
from capdistill.metrics.captions import Captions, References, align, as_text, prepare, tokens_of
from capdistill.metrics.cider import CiderD
from capdistill.metrics.meteor import HOW_TO_GET_WORDNET, MeteorNltk, wordnet_found
from capdistill.metrics.results import Direction, Metric, Scores
from capdistill.metrics.rouge import RougeL

_BUILT_IN: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "bleu": (Bleu, ("bleu_1", "bleu_2", "bleu_3", "bleu_4")),
    "rouge_l": (RougeL, ("rouge_l",)),
    "cider_d": (CiderD, ("cider_d",)),
    "meteor_nltk": (MeteorNltk, ("meteor_nltk",)),
}
DIRECTIONS: dict[str, Direction] = {
    name: "higher" for _, names in _BUILT_IN.values() for name in names
}
"""Every built-in score -> the direction in which it gets better."""

_ONE_IMAGE = (
    "cider_d is 0 for a single image whatever the caption: its document frequencies are counted "
    "over the images. Score several images together."
)


class CaptionScorer:
    """Scores captions of the same images again and again; the references are read once.

    Example:
        >>> scorer = CaptionScorer(
        ...     {"1": ["a dog runs", "the dog is running"], "2": ["a red car", "a car"]},
        ...     metrics=("bleu", "cider_d"),
        ... )
        >>> scores = scorer({"1": "a dog runs", "2": "a red car"})
        >>> round(scores["bleu_1"], 6), list(scores.per_image["cider_d"])
        (1.0, ['1', '2'])

    Args:
        references: Image -> its references, or one list of references an image. A caption is
            a string, or a list of tokens, which are taken as they are.
        metrics: Which to compute: "bleu", "rouge_l", "cider_d", "meteor_nltk", or a score's own
            name such as "bleu_4", or a `Metric` of your own. None is all the built-in ones.

    Raises:
        DataError: no image, an image without a reference, or a caption of another type.
        UnknownName: a metric that there is not.
    """

    def __init__(
        self, references: References, *, metrics: Iterable[str | Metric] | None = None
    ) -> None:
        self._references = prepare(references)
        self._own, families = [], {}
        for metric in _BUILT_IN if metrics is None else metrics:
            if isinstance(metric, Metric):
                self._own.append(metric)
            else:
                family = _family(metric)
                families.setdefault(family, []).extend(_scores_of(family, metric))
        self.notes = self._leave_out(families)
        tokens = [[tokens_of(c) for c in image] for image in self._references.values()]
        self._metrics = [(_BUILT_IN[name][0](tokens), wanted) for name, wanted in families.items()]

    @property
    def directions(self) -> dict[str, Direction]:
        """Every score that a call gives -> the direction in which it gets better.

        Example:
            >>> CaptionScorer([["a dog"]], metrics=["bleu_4"]).directions
            {'bleu_4': 'higher'}
        """
        names = {name: DIRECTIONS[name] for _, wanted in self._metrics for name in wanted}
        for metric in self._own:
            names.update(metric.directions)
        return names
