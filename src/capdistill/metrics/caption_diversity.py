"""Diversity of captions, and how many are empty, repetitive or cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from capdistill.errors import DataError, shortened
from capdistill.metrics.base import (
    Caption,
    Captions,
    by_image,
    checked,
    checked_caption,
    tokens_of,
    words,
)

Words = tuple[str, ...]

_ARTICLES = ("a", "an", "the", "its", "their")
_PREPOSITIONS = ("with", "without", "in", "on", "at", "of", "to", "for", "from", "by", "into")
_PLACES = ("onto", "upon", "near", "before", "after", "behind", "beside", "between", "through")
_LINKS = ("and", "or", "while", "as", "is", "are", "am", "was", "were", "be")
_NO_ENDINGS = {*_ARTICLES, *_PREPOSITIONS, *_PLACES, *_LINKS}


@dataclass(frozen=True)
class Diversity:
    """The result of `diversity`. Shares are of all captions; 0 without captions.

    Args:
        captions: Number of captions.
        words: Words in all captions together.
        vocabulary: Different words.
        mean_length: Words per caption.
        distinct_1: Different words over words.
        distinct_2: Different pairs of neighbouring words over words.
        distinct_captions: Different captions over captions.
        repeats: Share of captions with a pair of neighbouring words that occurs twice.
        empty: Share of captions without a word.
        cut_short: Share of captions that end on an article, a preposition or a form of "to be", as
            captions that were optimised for a score may.
        novel: Share of captions with words that are not training captions; None if unknown.
        unfinished: Share of captions cut at the length limit; None if unknown.
    """

    captions: int
    words: int
    vocabulary: int
    mean_length: float
    distinct_1: float
    distinct_2: float
    distinct_captions: float
    repeats: float
    empty: float
    cut_short: float
    novel: float | None = None
    unfinished: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The values by name, for `json.dump`."""
        return asdict(self)


def diversity(
    hypotheses: Captions,
    training_captions: Iterable[Caption] | None = None,
    finished: Mapping[Any, bool] | Sequence[bool] | None = None,
) -> Diversity:
    """Measure the diversity of captions, and how many are empty, repetitive or cut off.

    Example:
        >>> found = diversity(
        ...     {"1": "A dog runs.", "2": "a dog runs", "3": "a red car and a red bus", "4": ""},
        ...     training_captions=["A dog runs ."],
        ... )
        >>> found.vocabulary, found.distinct_captions, found.repeats, found.empty, found.novel
        (7, 0.75, 0.25, 0.25, 0.25)

    Args:
        hypotheses: One caption per image: a mapping by image, (image, caption) pairs or a list. A
            caption is a string, or a list of tokens, which are taken as they are. Words are the
            tokens of `ptb_tokenize`.
        training_captions: The captions the model was trained on; the others are novel.
        finished: Which captions reached their end token, by the same ids or in the same order.

    Raises:
        DataError: captions that are not text, an image given twice, or `finished` for other
            captions.

    Source:
        Li et al. (2016), "A Diversity-Promoting Objective Function for Neural Conversation
        Models", for distinct-1 and distinct-2, both over the number of words. They fall as
        captions are added, so compare them for the same images only.
        van Miltenburg, Elliott and Vossen (2018), "Measuring the Diversity of Automatic Image
        Descriptions": length, vocabulary (types) and the share of novel captions. Welleck et al.
        (2020), "Neural Text Generation with Unlikelihood Training", count repeated n-grams over
        all of them; `repeats` is the share of captions that have one.
    """
    captions = by_image(hypotheses, "diversity: the captions")
    generated = [_words(checked_caption(text, image)) for image, text in captions.items()]
    pairs = [list(pairwise(each)) for each in generated]
    seen = None if training_captions is None else _known(training_captions)
    ended = None if finished is None else _flags(finished, hypotheses, captions)
    total, kinds = sum(map(len, generated)), {word for each in generated for word in each}
    return Diversity(
        captions=len(generated),
        words=total,
        vocabulary=len(kinds),
        mean_length=_share(total, len(generated)),
        distinct_1=_share(len(kinds), total),
        distinct_2=_share(len({pair for each in pairs for pair in each}), total),
        distinct_captions=_share(len(set(generated)), len(generated)),
        repeats=_share(sum(len(set(each)) < len(each) for each in pairs), len(generated)),
        empty=_share(generated.count(()), len(generated)),
        cut_short=_share(
            sum(each[-1] in _NO_ENDINGS for each in generated if each), len(generated)
        ),
        novel=None if seen is None else _novel(generated, seen),
        unfinished=None if ended is None else _share(ended.count(False), len(generated)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _words(caption: Caption) -> Words:
    return tuple(words(tokens_of(caption)))


def _novel(generated: Sequence[Words], seen: set[Words]) -> float:
    return _share(sum(words not in seen for words in generated if words), len(generated))


def _known(training_captions: Iterable[Caption]) -> set[Words]:
    if isinstance(training_captions, (str, bytes)) or not isinstance(training_captions, Iterable):
        raise DataError(
            f"diversity: training_captions are {shortened(training_captions)}; expected a list of "
            "captions."
        )
    listed = (
        training_captions.values() if isinstance(training_captions, Mapping) else training_captions
    )
    return {
        _words(checked(caption, f"Training caption {number}"))
        for number, caption in enumerate(listed, 1)
    }


def _flags(finished: Any, hypotheses: Any, captions: Mapping[Any, Caption]) -> list[bool]:
    keyed = isinstance(finished, Mapping)
    if keyed == isinstance(hypotheses, Mapping) and len(finished) == len(captions):
        if not keyed:
            return [bool(flag) for flag in finished]
        if set(finished) == set(captions):
            return [bool(finished[image]) for image in captions]
    raise DataError(
        f"diversity: finished is a {type(finished).__name__} of {len(finished)}, hypotheses a "
        f"{type(hypotheses).__name__} of {len(captions)}. Give both by the same ids, or both "
        "as lists in one order."
    )
