"""The errors a user can meet. Each says what was given, what was expected and what to do.

They know nothing of the rest of the package, and every part of it may raise them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError


class CapdistillError(Exception):
    """Base of every error that capdistill raises on purpose.

    Example:
        >>> issubclass(DataError, CapdistillError) and issubclass(DataError, ValueError)
        True
    """


class ConfigError(CapdistillError, ValueError):
    """An option, a name or a combination of options that cannot work."""


class UnknownName(ConfigError, KeyError):
    """A name that no registry, preset or metric has; the message lists those there are."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class IncompatibleModels(CapdistillError, ValueError):
    """Teacher and student, or a model and a loss, that do not fit each other."""


class PluginError(CapdistillError, ImportError):
    """A plugin that cannot be loaded; names its distribution and the cause."""


class MissingExtra(CapdistillError, ImportError):
    """A part that needs an optional dependency; names the extra that installs it."""


class CheckpointError(CapdistillError, RuntimeError):
    """A file of weights or of training state that is truncated, foreign or does not fit."""


class DataError(CapdistillError, ValueError):
    """An image, a caption file or a data set that cannot be used; names file and line."""


class NotFiniteLoss(CapdistillError, FloatingPointError):
    """A loss that became NaN or infinite in training; names the step and the term."""


def suggest(name: str, available: Iterable[str]) -> str:
    """End an error about an unknown name: the nearest match, then all names there are.

    Example:
        >>> suggest("lsmt", ["lstm", "transformer"])
        "Did you mean 'lstm'? Available: lstm, transformer."
    """
    names = sorted(available)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Available: {', '.join(names) if names else '(none)'}."


C = TypeVar("C", bound=BaseModel)


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
        ConfigError: an unknown option, with the nearest one, or a value that cannot be.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise refusal(cls, error, what) from error


def refusal(cls: type[BaseModel], error: ValidationError, what: str) -> ConfigError:
    """What pydantic found, in our words."""
    return ConfigError(f"{what}: " + "\n".join(_explain(cls, each) for each in error.errors()))


def _explain(cls: type[BaseModel], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = suggest(name, cls.model_fields)
        return f"there is no option '{name}' (given: {problem['input']!r}). {known}"
    if problem["type"] == "missing":
        return f"option '{name}' must be given."
    if problem["type"] == "value_error" and not name:
        return str(problem["ctx"]["error"])
    return f"option '{name}' was given {problem['input']!r}: {problem['msg']}."
