"""How varied captions are, and whether they are well: what no comparison with references shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from capdistill.errors import DataError
from capdistill.metrics.base import Caption, Captions, tokens_of, words

Words = tuple[str, ...]


@dataclass(frozen=True)
class Diversity:
    """What `diversity` found. Shares are of all captions, 0 where there is none.

    Args:
        captions: Number of captions.
        words: Words in all captions together.
        vocabulary: Different words.
        mean_length: Words a caption.
        distinct_1: Different words over words.
        distinct_2: Different pairs of neighbouring words over words.
        distinct_captions: Different captions over captions.
        repeats: Share of captions in which a pair of neighbouring words stands twice.
        empty: Share of captions without a word.
        novel: Share of captions with words that are no training caption; None where not known.
        unfinished: Share of captions cut at the length limit; None where not known.
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
    novel: float | None = None
    unfinished: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures by name, for `json.dump`."""
        return asdict(self)


def diversity(
    hypotheses: Captions,
    training_captions: Iterable[Caption] | None = None,
    finished: Mapping[Any, bool] | Sequence[bool] | None = None,
) -> Diversity:
    """Count how varied captions are, and how many are empty, repetitive or cut off.

    Example:
        >>> found = diversity(
        ...     {"1": "A dog runs.", "2": "a dog runs", "3": "a red car and a red bus", "4": ""},
        ...     training_captions=["A dog runs ."],
        ... )
        >>> found.vocabulary, found.distinct_captions, found.repeats, found.empty, found.novel
        (7, 0.75, 0.25, 0.25, 0.25)

    Args:
        hypotheses: One caption an image, by image or as a list. A caption is a string, or a list
            of tokens, which are taken as they are. Words are those of `ptb_tokenize`.
        training_captions: What the model was trained on; novelty is against these.
        finished: Which captions ended by themselves, by the same ids or in the same order.

    Raises:
        DataError: captions of another type, or `finished` of other captions.

    Source:
        Li et al. (2016), "A Diversity-Promoting Objective Function for Neural Conversation
        Models", section 5: distinct-1 and distinct-2, both over the number of words. They fall
        as captions are added, so compare them for the same images only.
        van Miltenburg, Elliott and Vossen (2018), "Measuring the Diversity of Automatic Image
        Descriptions": length, vocabulary (types) and the share of novel captions. Welleck et al.
        (2020), "Neural Text Generation with Unlikelihood Training", count repeated n-grams over
        all of them; `repeats` is the share of captions that have one.
    """
    said = [_words(caption) for caption in _listed(hypotheses, "hypotheses")]
    pairs = [list(pairwise(each)) for each in said]
    seen = None if training_captions is None else _known(training_captions)
    ended = None if finished is None else _flags(finished, hypotheses)
    total, kinds = sum(map(len, said)), {word for each in said for word in each}
    return Diversity(
        captions=len(said),
        words=total,
        vocabulary=len(kinds),
        mean_length=_share(total, len(said)),
        distinct_1=_share(len(kinds), total),
        distinct_2=_share(len({pair for each in pairs for pair in each}), total),
        distinct_captions=_share(len(set(said)), len(said)),
        repeats=_share(sum(len(set(each)) < len(each) for each in pairs), len(said)),
        empty=_share(said.count(()), len(said)),
        novel=None if seen is None else _share(sum(s not in seen for s in said if s), len(said)),
        unfinished=None if ended is None else _share(ended.count(False), len(said)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _words(caption: Caption) -> Words:
    return tuple(words(tokens_of(caption)))


def _known(training_captions: Iterable[Caption]) -> set[Words]:
    return {_words(caption) for caption in _listed(training_captions, "training_captions")}


def _listed(captions: Any, name: str) -> list[Caption]:
    if isinstance(captions, str):
        raise DataError(f"diversity: {name} are the string {captions!r}; put it into a list.")
    return list(captions.values() if isinstance(captions, Mapping) else captions)


def _flags(finished: Mapping[Any, bool] | Sequence[bool], captions: Captions) -> list[bool]:
    both = isinstance(finished, Mapping) and isinstance(captions, Mapping)
    same = set(finished) == set(captions) if both else len(finished) == len(captions)
    if not same or isinstance(finished, Mapping) != isinstance(captions, Mapping):
        raise DataError(
            f"diversity: finished is a {type(finished).__name__} of {len(finished)}, hypotheses a "
            f"{type(captions).__name__} of {len(captions)}. Give both by the same ids, or both "
            "as lists in one order."
        )
    return [bool(flag) for flag in _listed(finished, "finished")]
