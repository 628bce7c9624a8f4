"""Options of decoding on the command line, made from the fields of `GenerationConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args, get_origin

from capdistill.generation.config import GenerationConfig

_HELP = {
    "beam_size": "hypotheses kept an image; 1 is greedy",
    "max_length": "tokens a caption at most",
    "min_length": "words a caption at least",
    "length_normalisation": "how length counts when hypotheses are ranked: none, average or gnmt",
    "length_penalty": "its exponent; larger prefers longer captions",
    "early_stopping": "when beams stop: true, false or never",
    "num_return": "hypotheses given back an image",
    "no_repeat_ngram": "no so many tokens in a row twice",
    "banned_words": "words that are never said",
    "allow_unknown": "let the unknown token be said",
    "not_last": "words that no caption ends on, or function_words",
    "prefix": "words that every caption begins with",
    "sample": "draw words by chance",
    "temperature": "of the draws",
    "top_k": "draw from the k most probable words",
    "top_p": "draw from the fewest words with this share of the probability",
    "seed": "of the draws",
    "beam_groups": "groups of beams that avoid each other's words",
    "diversity_penalty": "how much they do",
}


def add_generation_options(
    parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> argparse._ArgumentGroup:
    """An option for every field of `GenerationConfig`, of the same name.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> group = add_generation_options(parser)
        >>> generation_values(parser.parse_args(["--beam-size", "3", "--early-stopping", "never"]))
        {'beam_size': 3, 'early_stopping': 'never'}

    Args:
        parser: Of a command.
        without: Fields that are left to other options of the command.
    """
    group = parser.add_argument_group("decoding")
    for name, field in GenerationConfig.model_fields.items():
        if name not in without:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, dest=name, help=_HELP[name], **_reading(field.annotation))
    return group


def generation_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `GenerationConfig`; {} where none was."""
    values = {
        name: _not_last(value) if name == "not_last" else value
        for name in GenerationConfig.model_fields
        if (value := getattr(options, name, None)) is not None
    }
    return values


def _reading(annotation: Any) -> dict[str, Any]:
    """How a field is read: a switch, a choice, several words, or one value."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(annotation) is Literal:
        return {"choices": kinds}
    if bool in kinds:
        return {"type": _true_false_or_word, "metavar": "WHEN"}
    if any(get_origin(kind) is tuple for kind in (*kinds, annotation)):
        return {"nargs": "+", "metavar": "WORD"}
    kind: Callable[[str], Any] = kinds[0]
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}


def _true_false_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _not_last(words: list[str]) -> list[str] | str:
    return "function_words" if words == ["function_words"] else words
