"""Score captions against references that are prepared once, as training and evaluation do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from capdistill.errors import ConfigError, DataError, UnknownName, shortened, suggest
from capdistill.metrics import meteor15
from capdistill.metrics.base import (
    Caption,
    Captions,
    Direction,
    Metric,
    Metrics,
    References,
    Results,
    Scores,
    Tokens,
    align,
    align_many,
    checked_caption,
    first,
    listed_metrics,
    prepare,
    score_weights,
    tokens_of,
)
from capdistill.metrics.bleu_rouge_meteor import Bleu, MeteorNltk, RougeL
from capdistill.metrics.cider import CiderD, DocumentFrequencies
from capdistill.metrics.meteor15 import Meteor15
from capdistill.metrics.ngram_counts import Floats, ReferenceNgrams

_ONE_IMAGE = (
    "cider_d is 0 for a single image whatever the caption: its document frequencies are counted "
    "over the images. Score several images together, or give document_frequencies."
)
_NO_PARAPHRASES = (
    "meteor_1_5_nopara replaces meteor_1_5, because there is no table of paraphrases. "
    "`pip install capdistill[coco]` brings it, or CAPDISTILL_METEOR_PARAPHRASES names the file."
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
        references: Image -> its references; or (image, references) pairs; or a list with the
            references of each image. A caption is a string, or a list of tokens, which are taken
            as they are.
        metrics: Which to compute: "bleu", "rouge_l", "cider_d", "meteor_nltk", "meteor_1_5", or a
            score's own name such as "bleu_4", or your own `Metric`; one or several. None is all
            the built-in ones.
            "meteor_1_5" becomes "meteor_1_5_nopara" without a paraphrase table.
        document_frequencies: Document frequencies for CIDEr-D; None counts them in `references`.

    Raises:
        DataError: no image, an image given twice or without a reference, or a caption of another
            type.
        UnknownName: an unknown metric; the message suggests the nearest name.
        ConfigError: metrics of another type, or two that give one score.
    """

    def __init__(
        self,
        references: References,
        *,
        metrics: Metrics | None = None,
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        self._references = prepare(references)
        self._places = {image: place for place, image in enumerate(self._references)}
        self._wanted, self._own, names = resolve_metrics(metrics)
        self.notes = self._notes(names, document_frequencies)
        tokens = [[tokens_of(caption) for caption in image] for image in self._references.values()]
        shared = any(metric in self._wanted for metric in ON_NGRAMS)
        known = document_frequencies.ids if document_frequencies else None
        self._ngrams = ReferenceNgrams(tokens, known) if shared else None
        self._metrics = {
            metric: make(metric, tokens, self._ngrams, document_frequencies)
            for metric in self._wanted
        }
        self._collected: dict[Any, tuple[Caption, Tokens]] = {}

    @property
    def directions(self) -> dict[str, Direction]:
        """Every score that a call gives -> the direction in which it gets better.

        Example:
            >>> CaptionScorer([["a dog"]], metrics=["bleu_4"]).directions
            {'bleu_4': 'higher'}
        """
        names = [name for wanted in self._wanted.values() for name in wanted]
        found = {name: DIRECTIONS[name] for name in names}
        return found | {name: way for own in self._own for name, way in own.directions.items()}

    def __call__(self, hypotheses: Captions) -> Scores:
        """Score one caption per image.

        Args:
            hypotheses: Image -> caption, or (image, caption) pairs, by the same ids as the
                references; or a list in their order where they were a list. "" is a caption and
                scores 0.

        Raises:
            DataError: ids that do not match or come twice (the message lists the first ones), or
                a caption that is not text.
        """
        captions = align(hypotheses, self._references)
        return self._score(captions, [tokens_of(caption) for caption in captions])

    def update(self, hypotheses: Mapping[Any, Caption]) -> None:
        """Add the captions of some images; `compute` scores them once all are there.

        Example:
            >>> scorer = CaptionScorer({"1": ["a dog"], "2": ["a car"]}, metrics=["rouge_l"])
            >>> for batch in ({"2": "a car"}, {"1": "a dog"}):
            ...     scorer.update(batch)
            >>> scorer.compute()["rouge_l"]
            1.0

        Args:
            hypotheses: Image -> caption. If the references were a list, an image is its index.

        Raises:
            DataError: an image without references, one that has its caption already, or a
                caption that is not text; then none of these captions is taken.
        """
        if not isinstance(hypotheses, Mapping):
            raise DataError(
                f"update: a {type(hypotheses).__name__} was given; expected {{image: caption}}, "
                "because a list does not name the images."
            )
        foreign = [image for image in hypotheses if image not in self._references]
        twice = [image for image in hypotheses if image in self._collected]
        if foreign or twice:
            raise DataError(
                f"update: without references: {first(foreign)}. Captioned already: "
                f"{first(twice)}. Give each image of the references one caption; reset() starts "
                "over."
            )
        checked = {image: checked_caption(text, image) for image, text in hypotheses.items()}
        self._collected |= {image: (text, tokens_of(text)) for image, text in checked.items()}

    def compute(self) -> Scores:
        """Score the captions that `update` added; they stay until `reset`.

        Raises:
            DataError: images without a caption; the message lists the first ones.
        """
        missing = [image for image in self._references if image not in self._collected]
        if missing:
            raise DataError(
                f"compute: {len(missing)} of {len(self._references)} images have no caption yet: "
                f"{first(missing)}. Give them to update(); '' is a caption."
            )
        pairs = [self._collected[image] for image in self._references]
        return self._score([caption for caption, _ in pairs], [tokens for _, tokens in pairs])

    def reset(self) -> None:
        """Drop the captions that `update` added; the references stay."""
        self._collected = {}

    def rewards(
        self,
        image_ids: Sequence[Any],
        captions: Sequence[Caption],
        score: str | Mapping[str, float] = "cider_d",
    ) -> Floats:
        """Score any number of captions of any of the images, each caption by itself.

        The values are those that a call gives in `per_image`; strings are split by the rules of
        the Penn Treebank here too.

        Example:
            >>> references = {"1": ["a dog runs"], "2": ["a red car"]}
            >>> scorer = CaptionScorer(references, metrics=["bleu", "cider_d"])
            >>> scorer.rewards(["2", "1", "1"], ["a car", "a dog runs", ""]).round(2).tolist()
            [1.74, 7.5, 0.0]
            >>> scorer.rewards(["1"], ["a dog"], {"cider_d": 0.1, "bleu_1": 1}).round(2).tolist()
            [0.96]

        Args:
            image_ids: The image of each caption, by the ids of the references (by its index if
                they were a list); an image may come any number of times.
            captions: The caption of each of `image_ids`; "" is a caption.
            score: A score of this scorer, or score -> weight for a weighted sum. A score that
                gets better when it gets lower needs a negative weight. Your own metric sees every
                caption as the only one of an image.

        Raises:
            DataError: ids without references, more captions than ids, or a caption that is no text.
            UnknownName: a score that this scorer does not compute.
            ConfigError: no score, or a weight that is no finite number.
        """
        weights = score_weights(score, self.directions)
        given = align_many(captions, image_ids, self._references)
        found = self._single_scores(given, image_ids, weights) if given else {}
        terms = [weights[name] * np.array(found[name]) for name in weights if given]
        return sum(terms, start=np.zeros(len(given)))

    def _single_scores(
        self, captions: Sequence[Caption], image_ids: Sequence[Any], names: Mapping[str, float]
    ) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        tokens = [tokens_of(caption) for caption in captions]
        images = np.array([self._places[image] for image in image_ids], np.int64)
        counted = self._ngrams.count(tokens, images) if self._ngrams else None
        for metric, scores in self._wanted.items():
            if names.keys() & {*scores}:
                given = (counted,) if metric in ON_NGRAMS else (tokens, images)
                found |= {name: each for name, (_, each) in self._metrics[metric](*given).items()}
        for own in self._own:
            if names.keys() & own.directions.keys():
                references = {n: self._references[image] for n, image in enumerate(image_ids)}
                scored = own.scores(references, dict(enumerate(captions)))
                found |= {name: list(each.values()) for name, (_, each) in scored.items()}
        return found

    def _score(self, captions: Sequence[Caption], tokens: Sequence[Tokens]) -> Scores:
        ngrams = self._ngrams.count(tokens) if self._ngrams else None
        corpus: dict[str, float] = {}
        per_image: dict[str, dict[Any, float]] = {}
        counts = {}
        for name, scores in self._wanted.items():
            metric, given = self._metrics[name], ngrams if name in ON_NGRAMS else tokens
            if isinstance(metric, (Bleu, Meteor15)):
                counts[name] = metric.counts(given)  # type: ignore[arg-type]
                computed = metric.scores(counts[name])
            else:
                computed = metric(given)
            for score in scores:
                corpus[score], each = computed[score]
                per_image[score] = dict(zip(self._references, each, strict=True))
        for own in self._own:
            by_image = dict(zip(self._references, captions, strict=True))
            for score, found in own.scores(self._references, by_image).items():
                corpus[score], per_image[score] = found
        return Scores(corpus, per_image, self.notes, counts)

    def _notes(
        self, names: Sequence[str], frequencies: DocumentFrequencies | None
    ) -> tuple[str, ...]:
        alone = "cider_d" in self._wanted and len(self._references) == 1 and frequencies is None
        without = "meteor_1_5" in names and "meteor_1_5" not in self._wanted
        return (_ONE_IMAGE,) * alone + (_NO_PARAPHRASES,) * without


Prepared = Callable[..., Results]

SCORES: dict[str, tuple[str, ...]] = {
    "bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4"),
    "rouge_l": ("rouge_l",),
    "cider_d": ("cider_d",),
    "meteor_nltk": ("meteor_nltk",),
    "meteor_1_5": ("meteor_1_5",),
    "meteor_1_5_nopara": ("meteor_1_5_nopara",),
}
"""Every built-in metric -> its scores."""

DIRECTIONS: dict[str, Direction] = {score: "higher" for each in SCORES.values() for score in each}
"""Every built-in score -> the direction in which it gets better."""

ON_NGRAMS = ("bleu", "cider_d")
"""Metrics that read counted n-grams instead of tokens."""


def resolve_metrics(
    metrics: Metrics | None,
) -> tuple[dict[str, list[str]], list[Metric], list[str]]:
    """Check the option `metrics`: built-in ones with their scores, your own, the names as given.

    Raises:
        UnknownName: an unknown metric; the message suggests the nearest name.
        ConfigError: metrics of another type, or two that give one score.
    """
    listed = listed_metrics(metrics)
    if listed is None:
        return select(None), [], []
    names, own = [], list[Metric]()
    for metric in listed:
        if isinstance(metric, Metric):
            own.append(metric)
        elif isinstance(metric, str):
            names.append(metric)
        else:
            raise ConfigError(
                f"metrics: {shortened(metric)} is a {type(metric).__name__}; expected a name, or "
                "Metric(function, {'name of its score': 'higher'}) for your own metric."
            )
    scores = [score for metric in own for score in metric.directions]
    twice = [s for n, s in enumerate(scores) if s in DIRECTIONS or s in scores[:n]]
    if twice:
        raise ConfigError(
            f"metrics: two metrics give a score called '{twice[0]}'. Rename the "
            "score of your own metric."
        )
    return select(names), own, names


def select(names: Iterable[str] | None) -> dict[str, list[str]]:
    """Metric -> its requested scores; None is all that can be computed here.

    METEOR 1.5 becomes its variant without paraphrases if their table is not installed.

    Example:
        >>> select(["bleu_4", "rouge_l"])
        {'bleu': ['bleu_4'], 'rouge_l': ['rouge_l']}

    Raises:
        UnknownName: an unknown metric; the message suggests the nearest name.
    """
    wanted: dict[str, list[str]] = {}
    for name in list(SCORES)[:-1] if names is None else names:
        metric = _metric_of(name)
        scores = [name] if name in SCORES[metric] else SCORES[metric]
        if metric == "meteor_1_5" and meteor15.find_paraphrases() is None:
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
    return Meteor15(tokens, meteor15.find_paraphrases() if metric == "meteor_1_5" else None)


def _metric_of(name: str) -> str:
    for metric, scores in SCORES.items():
        if name == metric or name in scores:
            return metric
    raise UnknownName(f"No metric '{name}'. {suggest(name, dict.fromkeys([*SCORES, *DIRECTIONS]))}")


def bleu(references: References, hypotheses: Captions) -> Scores:
    """BLEU-1 to 4 of one caption per image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(bleu({"1": ["a dog runs"]}, {"1": "a dog ran"})["bleu_2"], 4)
        0.5774
    """
    return CaptionScorer(references, metrics=["bleu"])(hypotheses)


def rouge_l(references: References, hypotheses: Captions) -> Scores:
    """ROUGE-L of one caption per image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(rouge_l([["a dog runs"]], ["a dog"])["rouge_l"], 4)
        0.7722
    """
    return CaptionScorer(references, metrics=["rouge_l"])(hypotheses)


def cider_d(
    references: References,
    hypotheses: Captions,
    *,
    document_frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """CIDEr-D of one caption per image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(cider_d([["a dog runs"], ["a red car"]], ["a dog runs", "a red"])["cider_d"], 3)
        5.493
    """
    scorer = CaptionScorer(
        references, metrics=["cider_d"], document_frequencies=document_frequencies
    )
    return scorer(hypotheses)


def meteor_nltk(references: References, hypotheses: Captions) -> Scores:
    """METEOR as NLTK computes it; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(meteor_nltk([["a dog runs"]], ["a dog runs"])["meteor_nltk"], 4)
        0.9815
    """
    return CaptionScorer(references, metrics=["meteor_nltk"])(hypotheses)


def meteor_1_5(references: References, hypotheses: Captions, *, paraphrases: bool = True) -> Scores:
    """METEOR 1.5 of one caption per image; arguments and errors as `CaptionScorer`'s.

    Without paraphrases, or if their table is not installed, the score is "meteor_1_5_nopara".

    Example:
        >>> dict(meteor_1_5([["a dog runs"]], ["a dog runs"], paraphrases=False))
        {'meteor_1_5_nopara': 1.0}
    """
    name = "meteor_1_5" if paraphrases else "meteor_1_5_nopara"
    return CaptionScorer(references, metrics=[name])(hypotheses)
