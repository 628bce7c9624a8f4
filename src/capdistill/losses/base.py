"""The contract of a distillation loss: two outputs in, one sum out.

To write a loss, subclass `DistillationLoss`. The trainer divides, weights and adds the sums.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.outputs import OUTPUTS, Batch, CaptionerOutput, ModelSpec


class DistillationLoss(nn.Module):
    """One place where the student learns from the teacher.

    `forward` returns the **sum over tokens (or images) of the mean over width**; the trainer
    divides it once by `count` over the whole effective batch, so that padding, splitting and
    spreading a batch change nothing. `capdistill.testing.check_loss` tests a loss of your own.

    Attributes:
        needs: What must be computed, a subset of {"logits", "features", "hidden", "attention"}.
        per: "token" (valid target tokens are counted) or "image"; ignored where `count` is
            overridden.
        couples_batch: True for losses that look across the images of a batch. Splitting a batch
            changes them: with `accumulation_steps` they see one micro-batch at a time, and over
            several processes the images of one rank.

    Raises:
        ConfigError: (when the class is made, or the attribute set) `needs` or `per` is invalid.
    """

    needs: frozenset[str] = frozenset({"logits"})
    per: Literal["token", "image"] = "token"
    couples_batch: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _DECLARED & vars(cls).keys():
            if not hasattr(vars(cls)[name], "__get__"):  # a property is computed for each loss
                setattr(cls, name, _declared(cls, name, vars(cls)[name]))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(
            name, _declared(type(self), name, value) if name in _DECLARED else value
        )

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Create projectors, once, before the optimizer; refuse models that do not fit.

        Raises:
            IncompatibleModels: student and teacher lack what the loss needs.
        """

    def count(self, batch: Batch) -> float:
        """How many things the sum runs over."""
        return float(batch.target_mask.sum()) if self.per == "token" else float(batch.num_images)

    @abstractmethod
    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Scalar float32 sum; gradients reach the student and the projectors only."""


_DECLARED = {"needs", "per", "couples_batch"}


def _declared(cls: type[DistillationLoss], name: str, value: Any) -> Any:
    """The value of an attribute that the trainer relies on, once it is checked."""
    where = f"The loss {cls.__name__}: {name} = {value!r}"
    if name == "couples_batch":
        if not isinstance(value, bool):
            raise ConfigError(f"{where}; expected True or False.")
        return value
    if name == "per":
        if cls.count is DistillationLoss.count and value not in ("token", "image"):
            hint = suggest(str(value), ("image", "token"))
            raise ConfigError(
                f"{where} is unknown. {hint} For anything else override count(batch)."
            )
        return value
    if isinstance(value, str) or not isinstance(value, (set, frozenset, tuple, list)):
        raise ConfigError(f'{where} is no set of names. Write needs = frozenset({{"logits"}}).')
    for need in value:
        if need not in OUTPUTS:
            raise ConfigError(
                f"{where}: there is no output {need!r}. {suggest(str(need), OUTPUTS)}"
            )
    return frozenset(value)


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
            f"Return {what} from the {model}, and declare it in its spec."
        )
    return value


def not_built(loss: str) -> ConfigError:
    """The error for a loss that is called before `build`."""
    return ConfigError(
        f"{loss} was called before build(student_spec, teacher_spec), which makes its projection. "
        "Distiller does so; in a loop of your own call loss.build(student.spec(), teacher.spec())."
    )
