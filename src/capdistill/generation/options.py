"""The options of decoding as keyword arguments, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict


class GreedyOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` that `greedy` takes."""

    min_length: int
    length_normalisation: Literal["none", "average", "gnmt"]
    length_penalty: float
    no_repeat_ngram: int


class IdOptions(GreedyOptions, total=False):
    """Those of a search without a tokenizer, beside its size and its length."""

    early_stopping: bool | Literal["never"]
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    beam_groups: int
    diversity_penalty: float


class SearchOptions(IdOptions, total=False):
    """All fields without `num_return`."""

    beam_size: int
    max_length: int | None
    banned_words: Sequence[str]
    allow_unknown: bool
    not_last: Sequence[str] | Literal["function_words"]
    prefix: str


class GenerationOptions(SearchOptions, total=False):
    """All fields."""

    num_return: int
