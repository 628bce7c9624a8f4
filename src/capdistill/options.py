"""Options to a checked pydantic model, with errors that name the option and the fix."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from capdistill.errors import ConfigError, suggest

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
        ConfigError: an unknown option, with the nearest one, or a value that can not be.
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
