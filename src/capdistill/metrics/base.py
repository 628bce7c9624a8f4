"""Shared parts of metrics: captions as users give them, tokens, scores, your own metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from capdistill.errors import (
    ConfigError,
    DataError,
    UnknownName,
    require_number,
    require_text,
    shortened,
    suggest,
)
from capdistill.metrics.ptb import ptb_tokenize

Item = TypeVar("Item")
Caption = str | Sequence[str]
Captions = Mapping[Any, Caption] | Iterable[tuple[Any, Caption]] | Sequence[Caption]
References = (
    Mapping[Any, Sequence[Caption]]
    | Iterable[tuple[Any, Sequence[Caption]]]
    | Sequence[Sequence[Caption]]
)
_SHOWN = 5
_WAYS = ("higher", "lower")  # in which a score gets better


def _is_pair_of_references(item: Any) -> bool:
    return _is_pair(item) and isinstance(item[0], (str, int)) and isinstance(item[1], (list, tuple))


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2


def _is_pair_by_number(item: Any) -> bool:
    return _is_pair(item) and isinstance(item[0], int)  # a pair of strings is a tokenised caption


def prepare(references: References) -> dict[Any, list[Caption]]:
    """Check references and order them by image: 0, 1, ... for a list without ids.

    Raises:
        DataError: no image, an image given twice or without a reference, or a reference that is
            neither text nor a list of tokens.
    """
    items = by_image(references, "The references", _is_pair_of_references)
    if not items:
        raise DataError("No references: give at least one image with one reference caption.")
    for image, captions in items.items():
        if isinstance(captions, (str, bytes, Mapping)) or not isinstance(captions, Iterable):
            kind = "the string " if isinstance(captions, str) else ""
            raise DataError(
                f"The references of image {image!r} are {kind}{shortened(captions)}; expected a "
                "list of captions. Put a single caption into a list."
            )
        items[image] = [
            checked(caption, f"Reference {number} of image {image!r}")
            for number, caption in enumerate(captions, 1)
        ]
    without = [image for image, captions in items.items() if not captions]
    if without:
        raise DataError(
            f"{len(without)} images have no reference caption: {first(without)}. Give each "
            "image at least one, or leave it out."
        )
    return items


def align(captions: Captions, images: Collection[Any]) -> list[Caption]:
    """Check captions and put them into the order of `images`: one for every image, no others.

    Raises:
        DataError: images that do not match or are given twice, or a caption that is neither text
            nor a list of tokens.
    """
    numbered = list(images) == list(range(len(images)))
    items = by_image(captions, "The captions", _is_pair_by_number if numbered else _is_pair)
    missing = [image for image in images if image not in items]
    foreign = [image for image in items if image not in images]
    if missing or foreign:
        raise DataError(
            f"Captions and references are not of the same images: {len(items)} captions, "
            f"{len(images)} images with references. Without a caption: {first(missing)}. "
            f"Without references: {first(foreign)}. Give one caption for each image, by the same "
            "ids as the references (or both as lists in one order); '' is a caption."
        )
    return [checked_caption(items[image], image) for image in images]


def align_many(
    captions: Sequence[Caption], image_ids: Sequence[Any], images: Collection[Any]
) -> list[Caption]:
    """Check captions of which each belongs to any of `images`, by its id.

    Raises:
        DataError: more or fewer captions than ids, an id that is not in `images`, or a caption
            that is neither text nor a list of tokens.
    """
    for what, given in {"captions": captions, "image ids": image_ids}.items():
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__"):
            raise DataError(f"The {what} are {shortened(given)}; expected a list of them.")
    foreign = [image for image in dict.fromkeys(image_ids) if image not in images]
    if foreign or len(image_ids) != len(captions):
        raise DataError(
            f"{len(captions)} captions with {len(image_ids)} image ids. Without references: "
            f"{first(foreign)}. Give each caption the id of an image that has references."
        )
    return [checked_caption(c, image) for c, image in zip(captions, image_ids, strict=True)]


def score_weights(score: Any, directions: Mapping[str, Any]) -> dict[str, float]:
    """A score, or scores with weights, as a mapping.

    Args:
        score: A name, or name -> weight.
        directions: The scores that there are.

    Raises:
        UnknownName: there is no such score.
        ConfigError: no score, or a weight that is no finite number.
    """
    weights = {score: 1.0} if isinstance(score, str) else score
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            f"rewards: score={shortened(score)} was given; expected a score such as 'cider_d', or "
            "scores with weights such as {'cider_d': 1.0, 'bleu_4': 0.5}."
        )
    for name, weight in weights.items():
        if name not in directions:
            raise UnknownName(f"rewards: no score '{name}'. {suggest(str(name), directions)}")
        require_number(f"rewards: the weight of '{name}'", weight)
    return dict(weights)


def checked_caption(caption: Any, image: Any) -> Caption:
    """The caption of an image: text, or a list of tokens.

    Raises:
        DataError: it is neither; the message names the image.
    """
    return checked(caption, f"The caption of image {image!r}")


def by_image(
    given: Any, what: str, is_pair: Callable[[Any], bool] = _is_pair_by_number
) -> dict[Any, Any]:
    """Items by image: of a mapping, of (image, item) pairs, or of a list numbered from 0.

    Raises:
        DataError: it is none of these, or an image comes twice in the pairs.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise DataError(
            f"{what} are {shortened(given)} ({type(given).__name__}); expected a mapping by image, "
            "or a list with one entry per image."
        )
    items = list(given)
    if not all(map(is_pair, items)):
        return dict(enumerate(items))
    found: dict[Any, Any] = {}
    for image, item in items:
        if image in found:
            raise DataError(f"{what} have image {image!r} twice. Give each image one entry.")
        found[image] = item
    return found


def checked(caption: Any, where: str) -> Caption:
    """A caption: text, or a list of tokens.

    Raises:
        DataError: it is neither; the message begins with `where`.
    """
    if isinstance(caption, (str, bytes, bytearray)) or not isinstance(caption, Sequence):
        return require_text(caption, where)
    for token in caption:
        if not isinstance(token, str):
            raise DataError(
                f"{where} is {shortened(caption)}, with the token {shortened(token)} "
                f"({type(token).__name__}); expected a string or a list of tokens."
            )
        if " " in token:
            raise DataError(
                f"{where}: the token {shortened(token)} has a space in it. Give a caption as one "
                "string or as a list of tokens; one image has one caption."
            )
    return caption


def tokens_of(caption: Caption) -> Tokens:
    """Tokens of a string by the rules of the Penn Treebank; a list of tokens unchanged."""
    return ptb_tokenize(caption) if isinstance(caption, str) else list(caption)


def as_text(caption: Caption) -> str:
    """A string unchanged; tokens joined by spaces."""
    return caption if isinstance(caption, str) else " ".join(caption)


def first(images: Sequence[Any]) -> str:
    """The first few ids, for a message."""
    shown = ", ".join(repr(image) for image in images[:_SHOWN])
    return f"{shown}, ... ({len(images)})" if len(images) > _SHOWN else shown or "none"


Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """Your own metric.

    Example:
        >>> def words(references, hypotheses):
        ...     counts = {image: len(text.split()) for image, text in hypotheses.items()}
        ...     return {"words": (sum(counts.values()) / len(counts), counts)}
        >>> from capdistill.metrics import CaptionScorer
        >>> metric = Metric(words, {"words": "lower"})
        >>> CaptionScorer({"a": ["a dog"]}, metrics=["bleu", metric])({"a": "a dog"})["words"]
        2.0

    Args:
        function: `(references, hypotheses) -> {name: (corpus, per image)}`. It gets raw text,
            {image: [text, ...]} and {image: text}; per image is a mapping by image, or a list
            in the order of `hypotheses`.
        directions: Each name that `function` gives -> "higher" or "lower", whichever is better.

    Raises:
        ConfigError: no name, one that is not text, or a direction that is neither.
    """

    function: Callable[[dict[Any, list[str]], dict[Any, str]], Mapping[str, tuple[float, Any]]]
    directions: Mapping[str, Direction]

    def __post_init__(self) -> None:
        given = dict(self.directions) if isinstance(self.directions, Mapping) else {}
        named = all(isinstance(name, str) and name for name in given)
        if not given or not named or any(way not in _WAYS for way in given.values()):
            raise ConfigError(
                f"Metric: directions are {self.directions!r}; give every score that the "
                "function returns a name and 'higher' or 'lower', whichever is better."
            )

    def scores(
        self, references: Mapping[Any, Sequence[Caption]], hypotheses: Mapping[Any, Caption]
    ) -> dict[str, tuple[float, dict[Any, float]]]:
        """Call the function and check its result: name -> corpus score, image -> score.

        Raises:
            DataError: other scores than it declares, or not of all images.
        """
        texts = {image: [as_text(c) for c in each] for image, each in references.items()}
        found = self.function(texts, {image: as_text(hypotheses[image]) for image in texts})
        if set(found) != set(self.directions):
            raise DataError(
                f"The metric {self.function!r} returned the scores {sorted(found)}, but it "
                f"declares directions for {sorted(self.directions)}. Declare one for each score."
            )
        return {name: (float(v), _each(name, each, texts)) for name, (v, each) in found.items()}


def _each(name: str, scores: Any, images: Collection[Any]) -> dict[Any, float]:
    listed = not isinstance(scores, Mapping)
    items = dict(zip(images, scores, strict=False) if listed else scores)
    if len(scores) != len(images) or set(items) != set(images):
        raise DataError(
            f"The metric's '{name}' has scores of {len(scores)} images; expected one for each "
            f"of the {len(images)} images, by the same ids or in their order."
        )
    return {image: float(items[image]) for image in images}


Metrics = str | Metric | Iterable[str | Metric]  # one, names separated by commas, or several


def listed_metrics(metrics: Metrics | None) -> list[str | Metric] | None:
    """The option `metrics` as a list: one metric, several, or names separated by commas.

    Example:
        >>> listed_metrics("bleu"), listed_metrics("bleu, cider_d"), listed_metrics(("bleu",))
        (['bleu'], ['bleu', 'cider_d'], ['bleu'])

    Raises:
        ConfigError: text without a name, or another type.
    """
    if metrics is None:
        return None
    if isinstance(metrics, Metric):
        return [metrics]
    given = metrics.replace(",", " ").split() if isinstance(metrics, str) else metrics
    mistaken = isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable)
    if mistaken or (isinstance(metrics, str) and not given):
        raise ConfigError(
            f"metrics={shortened(metrics)} was given; expected a name such as 'bleu', a list such "
            "as ['bleu', 'cider_d'], or None for all."
        )
    return list(given)


@dataclass(frozen=True)
class Scores(Mapping[str, float]):
    """Corpus scores by name, in a fixed order, with the scores of each image.

    Example:
        >>> from capdistill.metrics import CaptionScorer
        >>> scores = CaptionScorer({"a": ["a dog"]}, metrics=["rouge_l"])({"a": "a dog"})
        >>> dict(scores), scores.per_image["rouge_l"]["a"]
        ({'rouge_l': 1.0}, 1.0)

    Args:
        corpus: name -> score of all images together.
        per_image: name -> image -> score.
        notes: Remarks needed to interpret the figures, such as a metric that could not be computed,
            or a figure that is meaningless here.
        counts: Metric -> whole numbers of each image, (I, S), whose sums over a sample of the
            images give the sample's score; for BLEU and METEOR 1.5.
    """

    corpus: Mapping[str, float]
    per_image: Mapping[str, Mapping[Any, float]]
    notes: tuple[str, ...] = ()
    counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> float:
        if name not in self.corpus:
            raise UnknownName(f"No score '{name}'. {suggest(name, self.corpus)}")
        return self.corpus[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.corpus)

    def __len__(self) -> int:
        return len(self.corpus)

    def __contains__(self, name: object) -> bool:
        return name in self.corpus

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4f}" for name, value in self.corpus.items())
        return f"Scores({shown})"


ORDER = 4
Tokens = Sequence[str]
Ngram = tuple[str, ...]
Result = tuple[float, list[float]]  # corpus score, one score per image
Results = dict[str, Result]


def of_images(references: Sequence[Item], images: Iterable[int] | None) -> Sequence[Item]:
    """The references of each image, by its place; None is every image once, in order."""
    return references if images is None else [references[image] for image in images]


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
