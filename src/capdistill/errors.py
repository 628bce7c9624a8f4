"""The errors a user can meet. Each states what was given, what was expected and what to do.

This module imports no other module of the package; every module may raise its errors.
"""

from __future__ import annotations

import ast
import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

__all__ = [
    "CapdistillError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "IncompatibleModels",
    "LossSpike",
    "MissingExtra",
    "NotFiniteLogits",
    "NotFiniteLoss",
    "PluginError",
    "RankFailed",
    "UnknownName",
]


def __dir__() -> list[str]:
    return sorted(__all__)


class CapdistillError(Exception):
    """Base of every error that capdistill raises on purpose.

    Example:
        >>> issubclass(DataError, CapdistillError) and issubclass(DataError, ValueError)
        True
    """


class ConfigError(CapdistillError, ValueError):
    """An option, a name or a combination of options that cannot work."""


class UnknownName(ConfigError, KeyError):
    """A name that no registry, preset or metric has; the message lists the available ones."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class IncompatibleModels(CapdistillError, ValueError):
    """Teacher and student, or a model and a loss, that do not fit each other."""


class PluginError(CapdistillError, ImportError):
    """A plugin that cannot be loaded; names its distribution and the cause."""


class MissingExtra(CapdistillError, ImportError):
    """A feature that needs an optional dependency; names the extra that installs it."""


class CheckpointError(CapdistillError, RuntimeError):
    """A file of weights or training state that is truncated, in another format or does not fit."""


class DataError(CapdistillError, ValueError):
    """An image, a caption file or a data set that cannot be used; names file and line."""


class NotFiniteLoss(CapdistillError, FloatingPointError):
    """A loss that became NaN or infinite in training; names the step, the term and the images."""


class NotFiniteLogits(CapdistillError, FloatingPointError):
    """Logits of a captioner that are NaN or infinite while it captions; names the image."""


class LossSpike(CapdistillError, ArithmeticError):
    """A loss that jumped in training; names the step and the images."""


class RankFailed(CapdistillError, RuntimeError):
    """Another process of a training on several failed; with its message."""


def suggest(name: str, available: Iterable[str]) -> str:
    """End an error about an unknown name: the nearest match, then all names there are.

    Example:
        >>> suggest("lsmt", ["lstm", "transformer"])
        "Did you mean 'lstm'? Available: lstm, transformer."
    """
    names, close = sorted(available), difflib.get_close_matches
    near = close(str(name), names, 1, 0.5) or close(str(name).lower(), names, 1, 0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Available: {', '.join(names) if names else '(none)'}."


def require_int(
    name: str, value: object, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return an option that must be a whole number. A bool, a float and text are not.

    Example:
        >>> require_int("evaluate: batch_size", 32, minimum=1)
        32
        >>> require_int("evaluate: batch_size", "32", minimum=1)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: evaluate: batch_size='32' was given; expected a whole \
number of at least 1.

    Args:
        name: The option, with its function: "evaluate: batch_size".
        value: What was given.
        minimum: The smallest value allowed.
        maximum: The largest value allowed.

    Raises:
        ConfigError: the value has another type, or lies outside the limits.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not _within(value, minimum, maximum):
        raise _not_a_number(name, value, "whole number", minimum, maximum)
    return int(value)  # type: ignore[call-overload, no-any-return]


def require_bool(name: str, value: object) -> bool:
    """Return an option that must be True or False; 1, "yes" and None are not.

    Raises:
        ConfigError: the value has another type.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shortened(value)} was given; expected True or False.")
    return value


def require_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Return an option that must be a finite number. A bool, text, NaN and infinity are not.

    Example:
        >>> require_number("paired_bootstrap: confidence", 0.95, above=0, below=1)
        0.95
        >>> require_number("paired_bootstrap: confidence", 1, above=0, below=1)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: paired_bootstrap: confidence=1 was given; expected a \
number above 0 and below 1.

    Args:
        name: The option, with its function.
        value: What was given.
        minimum: The smallest value allowed.
        maximum: The largest value allowed.
        above: The value must be greater than this.
        below: The value must be less than this.

    Raises:
        ConfigError: the value has another type, is not finite, or lies outside the limits.
    """
    number = as_float(value)
    if (
        not math.isfinite(number)
        or not _within(number, minimum, maximum)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    ):
        raise _not_a_number(name, value, "number", minimum, maximum, above, below)
    return number


def as_float(value: object) -> float:
    """A real number as a float. One that is too large is infinite; a bool and all else is NaN.

    Example:
        >>> as_float(2), as_float(10**400), as_float("2")
        (2.0, inf, nan)
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > cast(Any, 0) else -math.inf


def _within(value: Any, minimum: float | None, maximum: float | None) -> bool:
    return (minimum is None or value >= minimum) and (maximum is None or value <= maximum)


def _not_a_number(
    name: str,
    value: object,
    kind: str,
    minimum: float | None,
    maximum: float | None,
    above: float | None = None,
    below: float | None = None,
) -> ConfigError:
    limits = {"of at least": minimum, "of at most": maximum, "above": above, "below": below}
    words = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
    expected = " ".join(["expected a", kind, " and ".join(words)]).rstrip()
    return ConfigError(f"{name}={shortened(value)} was given; {expected}.")


def require_text(value: object, where: str) -> str:
    """Return a caption that must be text.

    Example:
        >>> require_text("a dog runs", "The caption of image '7'")
        'a dog runs'
        >>> require_text(None, "The caption of image '7'")
        Traceback (most recent call last):
        ...
        capdistill.errors.DataError: The caption of image '7' is None (NoneType); expected a string.

    Args:
        value: What was given.
        where: Description and location of the caption; the error begins with it.

    Raises:
        DataError: the value is not a string, or is a list, dict or bytes printed into one.
    """
    problem = text_problem(value)
    if problem:
        raise DataError(f"{where} is {problem}; expected a string.")
    return value  # type: ignore[return-value]


PRINTED_ENDS = ("]", ")", "}", ">", "'", '"')  # how a value that was printed into a text ends


def text_problem(value: object) -> str:
    """Describe why a value is not the text of a caption; "" if it is.

    Example:
        >>> text_problem("a dog runs"), text_problem(float("nan"))
        ('', 'nan (float)')
        >>> print(text_problem("['a dog', 'a cat']"))
        "['a dog', 'a cat']" (a list printed into a string)
    """
    if not isinstance(value, str):
        return f"{shortened(value)} ({type(value).__name__})"
    kind = _printed_kind(value.strip())
    return f"{shortened(value)} (a {kind} printed into a string)" if kind else ""


def _printed_kind(text: str) -> str:
    """The type of the value that was printed into a text: list, dict, bytes, object; "" if none."""
    if not text.endswith(PRINTED_ENDS):
        return ""
    if re.fullmatch(r"<[\w.]+(?: object)? at 0x[0-9a-fA-F]+>", text):
        return "object"
    called = re.match(r"(array|deque|dict_values|dict_keys|frozenset)\([\[({]", text)
    if called:
        return called[1]
    if not text.startswith(("[", "(", "{", "b'", 'b"')):
        return ""
    try:
        value = ast.literal_eval(re.sub(r"\b(?:nan|null|true|false)\b", "None", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    if isinstance(value, bytes):
        return "bytes"
    parts = value.values() if isinstance(value, dict) else value
    holds_text = isinstance(value, (list, tuple, dict, set)) and any(
        part is None or isinstance(part, (str, list, dict)) for part in parts
    )
    return type(value).__name__ if holds_text else ""


def shortened(value: object, length: int = 80) -> str:
    """The repr of a value for a message, cut where it is long.

    Example:
        >>> shortened("a" * 100, length=12)
        "'aaaaaaaa..."
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


C = TypeVar("C", bound="BaseModel")


def parse(cls: type[C], values: dict[str, Any], what: str) -> C:
    """Options to a checked configuration.

    Example:
        >>> from capdistill.training import TrainConfig
        >>> parse(TrainConfig, {"epoch": 3}, "fit")
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: fit: there is no option 'epoch' (given: 3). \
Did you mean 'epochs'? ...

    Raises:
        ConfigError: an unknown option, with the nearest one, or an invalid value.
    """
    from pydantic import ValidationError

    try:
        return cls(**values)
    except ValidationError as error:
        raise refusal(cls, error, what) from error


def refusal(cls: type[BaseModel], error: ValidationError, what: str) -> ConfigError:
    """The problem that pydantic reports, in the style of our messages."""
    return ConfigError(f"{what}: " + "\n".join(_explain(cls, each) for each in error.errors()))


def _explain(cls: type[BaseModel], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = suggest(str(problem["loc"][-1]), _options_at(cls, problem["loc"][:-1]))
        return f"there is no option '{name}' (given: {problem['input']!r}). {known}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        known = ", ".join(_options_at(cls, problem["loc"]))
        return f"option '{name}' was given {problem['input']!r}: expected an object with {known}."
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        known = suggest(problem["input"], re.findall("'([^']*)'", problem["ctx"]["expected"]))
        return f"option '{name}' was given {problem['input']!r}. {known}"
    if problem["type"] == "missing":
        return f"option '{name}' must be given."
    if problem["type"] == "value_error" and not name:
        return str(problem["ctx"]["error"])
    reason = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return f"option '{name}' was given {problem['input']!r}: {reason}."


def _options_at(cls: Any, path: Iterable[Any]) -> list[str]:
    """The names of the options of a configuration, or of a section within it."""
    for part in path:
        field = getattr(cls, "model_fields", {}).get(part)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        cls = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(cls, "model_fields", {}))


Requirement = tuple[Callable[[Any], bool], str]


def require_attributes(
    kind: str, part: object, contract: str, requirements: Mapping[str, Requirement]
) -> None:
    """Check that a part has the attributes that other code reads from it.

    Example:
        >>> require_attributes("encoder", object(), "Encoder", {"dim": (is_count, "its width")})
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: The encoder object has no attribute 'dim'. An Encoder needs \
it: its width.

    Args:
        kind: Name of the component in messages.
        part: An instance of a user's class.
        contract: Name of the class or protocol it follows.
        requirements: Attribute -> a test of its value, and what is expected.

    Raises:
        ConfigError: one is missing or has another kind of value, or a class or a name was given.
    """
    article = "An" if contract[0] in "AEIOU" else "A"
    if isinstance(part, (type, str)):
        given = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise ConfigError(f"{kind}= was given {given}. {article} {contract} object is expected.")
    owner = type(part).__name__
    for name, (is_valid, expected) in requirements.items():
        try:
            value = getattr(part, name)
        except AttributeError as error:
            raise ConfigError(
                f"The {kind} {owner} has no attribute '{name}'. {article} {contract} needs it: "
                f"{expected}."
            ) from error
        if not is_valid(value):
            raise ConfigError(f"{owner}.{name} is {value!r}; expected {expected}.")


def is_count(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`.

    Example:
        >>> is_count(3), is_count(0), is_count(True), is_count(2.0)
        (True, False, False, False)
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= least  # type: ignore[call-overload]


def are_counts(values: object, length: int | None = None) -> bool:
    """Whether a tuple or list holds positive whole numbers, `length` of them where it is given.

    Example:
        >>> are_counts((7, 7), 2), are_counts((7,), 2), are_counts(())
        (True, False, True)
    """
    if not isinstance(values, (tuple, list)):
        return False
    return all(map(is_count, values)) and length in (None, len(values))
