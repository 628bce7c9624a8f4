"""What the losses that compare vectors share: the student -> teacher projection, and its checks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels

Given = TypeVar("Given")


class Projector(nn.Linear):
    """A linear layer that works in its own precision (float32), under autocast too.

    Example:
        >>> Projector(4, 2)(torch.zeros(3, 4, dtype=torch.bfloat16)).dtype
        torch.float32

    Args:
        in_features: The student's width.
        out_features: The teacher's width.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) of any floating type to (..., out_features)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def same_pair(loss: str, built: object, wanted: object) -> bool:
    """False where nothing is built yet, True where the same is asked for again.

    Projectors are made once: another build would leave the optimizer with dead parameters.

    Raises:
        ConfigError: the loss was built for models of other widths.
    """
    if built is None:
        return False
    if built != wanted:
        raise ConfigError(
            f"{loss} was built for (student, teacher) widths {built} and is now given {wanted}. "
            "Create a new loss for each pair of models."
        )
    return True


def given(loss: str, what: str, model: str, value: Given | None) -> Given:
    """`value`, which the loss asked for.

    Raises:
        IncompatibleModels: it is None.
    """
    if value is None:
        raise IncompatibleModels(
            f"{loss} asked the {model} for {what} but its output holds None. "
            f"Return {what} from the {model}, and say so in its spec."
        )
    return value


def not_built(loss: str) -> ConfigError:
    """The error for a loss that is called before `build`."""
    return ConfigError(
        f"{loss} was called before build(student_spec, teacher_spec), which makes its projection. "
        "Distiller does so; in a loop of your own call loss.build(student.spec(), teacher.spec())."
    )
