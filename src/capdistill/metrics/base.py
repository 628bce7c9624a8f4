"""References and captions as users give them: dicts or lists, strings or tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from capdistill.errors import ConfigError, DataError, UnknownName, suggest
from capdistill.metrics.ptb import ptb_tokenize

Caption = str | Sequence[str]
Captions = Mapping[Any, Caption] | Sequence[Caption]
References = Mapping[Any, Sequence[Caption]] | Sequence[Sequence[Caption]]
_SHOWN = 5


def prepare(references: References) -> dict[Any, list[Caption]]:
    """References by image (0, 1, ... where a list was given), each image with at least one."""
    items = dict(references if isinstance(references, Mapping) else enumerate(references))
    if not items:
        raise DataError("No references: give at least one image with one reference caption.")
    for image, captions in items.items():
        if isinstance(captions, str):
            raise DataError(
                f"References of image {image!r} are the string {captions!r}; expected a list of "
                "captions. Put it into a list."
            )
    without = [image for image, captions in items.items() if not len(captions)]
    if without:
        raise DataError(
            f"{len(without)} images have no reference caption: {first(without)}. Give each "
            "image at least one, or leave it out."
        )
    return {image: list(captions) for image, captions in items.items()}


def align(captions: Captions, images: Collection[Any]) -> list[Caption]:
    """The captions in the order of `images`; every image has one and there are no others."""
    items = dict(captions if isinstance(captions, Mapping) else enumerate(captions))
    missing = [image for image in images if image not in items]
    foreign = [image for image in items if image not in images]
    if missing or foreign:
        raise DataError(
            f"Captions and references are not of the same images: {len(items)} captions, "
            f"{len(images)} images with references. Without a caption: {first(missing)}. "
            f"Without references: {first(foreign)}. Give one caption for each image, by the same "
            "ids as the references (or both as lists in one order); '' is a caption."
        )
    return [items[image] for image in images]


def tokens_of(caption: Caption) -> Tokens:
    """Tokens of a string by the PTB rules; tokens as they are."""
    if isinstance(caption, str):
        return ptb_tokenize(caption)
    tokens = list(_strings(caption))
    spaced = [token for token in tokens if " " in token]
    if spaced:
        raise DataError(
            f"The token {spaced[0]!r} has a space in it. Give a caption as one string, or as a "
            "list of tokens; one image takes one caption."
        )
    return tokens


def as_text(caption: Caption) -> str:
    """A string as it is; tokens joined by spaces."""
    return caption if isinstance(caption, str) else " ".join(_strings(caption))


def _strings(caption: Sequence[str]) -> Sequence[str]:
    if isinstance(caption, Sequence) and all(isinstance(token, str) for token in caption):
        return caption
    raise DataError(f"A caption is {caption!r}; expected a string or a list of tokens.")


def first(images: Sequence[Any]) -> str:
    """The first few ids, for a message."""
    shown = ", ".join(repr(image) for image in images[:_SHOWN])
    return f"{shown}, ... ({len(images)})" if len(images) > _SHOWN else shown or "none"


Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A metric of the user's own.

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
        ConfigError: no name, or a direction that is neither.
    """

    function: Callable[[dict[Any, list[str]], dict[Any, str]], Mapping[str, tuple[float, Any]]]
    directions: Mapping[str, Direction]

    def __post_init__(self) -> None:
        wrong = {n: d for n, d in self.directions.items() if d not in ("higher", "lower")}
        if wrong or not self.directions:
            raise ConfigError(
                f"Metric: directions are {dict(self.directions)!r}; give every score that the "
                "function returns a name and 'higher' or 'lower', whichever is better."
            )


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
        notes: What a reader of the figures must know: a metric that could not be computed and
            how to get it, a figure that means nothing here.
    """

    corpus: Mapping[str, float]
    per_image: Mapping[str, Mapping[Any, float]]
    notes: tuple[str, ...] = ()

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
