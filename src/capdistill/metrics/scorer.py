"""Score captions against references that are prepared once: what training and evaluation use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from capdistill.errors import DataError, UnknownName, suggest
from capdistill.metrics.bleu import Bleu
from capdistill.metrics.captions import (
    Caption,
    Captions,
    References,
    align,
    as_text,
    prepare,
    tokens_of,
)
from capdistill.metrics.cider import CiderD
from capdistill.metrics.meteor import HOW_TO_GET_WORDNET, MeteorNltk, wordnet_found
from capdistill.metrics.ngrams import Result, Tokens
from capdistill.metrics.results import Direction, Metric, Scores
from capdistill.metrics.rouge import RougeL

_Prepared = Callable[[Sequence[Tokens]], dict[str, Result]]
_BUILT_IN: dict[str, tuple[Callable[[list[list[Tokens]]], _Prepared], tuple[str, ...]]] = {
    "bleu": (Bleu, ("bleu_1", "bleu_2", "bleu_3", "bleu_4")),
    "rouge_l": (RougeL, ("rouge_l",)),
    "cider_d": (CiderD, ("cider_d",)),
    "meteor_nltk": (MeteorNltk, ("meteor_nltk",)),
}
DIRECTIONS: dict[str, Direction] = {n: "higher" for _, names in _BUILT_IN.values() for n in names}
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
        chosen = tuple(_BUILT_IN if metrics is None else metrics)
        self._own = [metric for metric in chosen if isinstance(metric, Metric)]
        wanted = _wanted([metric for metric in chosen if not isinstance(metric, Metric)])
        self.notes = self._notes(wanted)
        if "meteor_nltk" in wanted and not wordnet_found():
            del wanted["meteor_nltk"]
        tokens = [[tokens_of(caption) for caption in image] for image in self._references.values()]
        self._metrics = [(_BUILT_IN[family][0](tokens), names) for family, names in wanted.items()]

    @property
    def directions(self) -> dict[str, Direction]:
        """Every score that a call gives -> the direction in which it gets better.

        Example:
            >>> CaptionScorer([["a dog"]], metrics=["bleu_4"]).directions
            {'bleu_4': 'higher'}
        """
        names = {name: DIRECTIONS[name] for _, wanted in self._metrics for name in wanted}
        return names | {name: way for own in self._own for name, way in own.directions.items()}

    def __call__(self, hypotheses: Captions) -> Scores:
        """Score one caption an image.

        Args:
            hypotheses: Image -> caption, by the same ids as the references; or a list in their
                order where they were a list. "" is a caption and scores 0.

        Raises:
            DataError: ids that do not match; the message lists the first ones.
        """
        captions = align(hypotheses, self._references)
        tokens = [tokens_of(caption) for caption in captions]
        results: dict[str, tuple[float, Any]] = {}
        for metric, names in self._metrics:
            computed = metric(tokens)
            results.update({name: computed[name] for name in names})
        for own in self._own:
            results.update(self._call(own, captions))
        return Scores(
            corpus={name: float(corpus) for name, (corpus, _) in results.items()},
            per_image={name: self._by_image(name, each) for name, (_, each) in results.items()},
            notes=self.notes,
        )

    def _notes(self, wanted: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        alone = "cider_d" in wanted and len(self._references) == 1
        silent = "meteor_nltk" in wanted and not wordnet_found()
        return (_ONE_IMAGE,) * alone + (HOW_TO_GET_WORDNET,) * silent

    def _call(self, metric: Metric, captions: Sequence[Caption]) -> dict[str, tuple[float, Any]]:
        references = {i: [as_text(c) for c in each] for i, each in self._references.items()}
        hypotheses = dict(zip(references, map(as_text, captions), strict=True))
        results = dict(metric.function(references, hypotheses))
        if set(results) != set(metric.directions):
            raise DataError(
                f"The metric {metric.function!r} gave {sorted(results)} but its directions are "
                f"of {sorted(metric.directions)}; give every score its direction."
            )
        return results

    def _by_image(self, name: str, scores: Any) -> dict[Any, float]:
        listed = not isinstance(scores, Mapping)
        items = dict(zip(self._references, scores, strict=False) if listed else scores)
        if len(scores) != len(self._references) or set(items) != set(self._references):
            raise DataError(
                f"'{name}' has scores of {len(scores)} images; expected one for each of the "
                f"{len(self._references)} images, by the same ids or in their order."
            )
        return {image: float(items[image]) for image in self._references}


def _wanted(names: Iterable[str]) -> dict[str, list[str]]:
    """Metric -> those of its scores that are asked for."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        for metric, (_, scores) in _BUILT_IN.items():
            if name == metric or name in scores:
                found = wanted.setdefault(metric, [])
                found += [s for s in ([name] if name in scores else scores) if s not in found]
                break
        else:
            raise UnknownName(f"No metric '{name}'. {suggest(name, [*_BUILT_IN, *DIRECTIONS])}")
    return wanted
