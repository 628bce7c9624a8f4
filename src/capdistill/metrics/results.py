"""What scoring gives, and how a user adds a metric of his own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capdistill.errors import ConfigError, UnknownName, suggest

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
