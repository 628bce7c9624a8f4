"""The base of configurations of training: options are checked as they are given."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from capdistill.errors import as_float


class Options(BaseModel):
    """Options that take no True, text or NaN for a number, and no number for a bool.

    Names may be a list, or text with commas between them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _exact(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation == tuple[str, ...] and isinstance(value, str):
            return tuple(value.replace(",", " ").split())
        kinds = _kinds(annotation)
        if info.field_name == "device" and type(value).__name__ == "device":
            return str(value)  # torch's own
        wanted = "a finite number" if float in kinds else "a whole number"
        if not kinds & {int, float}:
            wanted = "true or false" if bool in kinds else ""
        if isinstance(value, bool) or type(value).__name__ == "bool_":
            value, right = bool(value), bool in kinds
        elif isinstance(value, Integral):
            value, right = int(value), bool(kinds & {int, float})
        elif isinstance(value, Real):
            value = as_float(value)
            right = float in kinds and math.isfinite(value)
        else:
            right = not isinstance(value, str) or str in kinds or value in kinds
        if wanted and not right:
            raise ValueError(f"expected {wanted}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types of a union, and the values of a `Literal`."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return set[Any]().union(*map(_kinds, get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()
