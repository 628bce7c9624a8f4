"""The contract of a distillation loss: two outputs in, one sum out.

To write a loss, subclass `DistillationLoss`. The trainer divides, weights and adds the sums.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels, require_number, suggest
from capdistill.losses.schedules import named_schedule
from capdistill.outputs import OUTPUTS, Batch, CaptionerOutput, ModelSpec


class DistillationLoss(nn.Module):
    """Base class of distillation losses.

    `forward` returns the **sum over tokens (or images) of the mean over width**; the trainer
    divides it once by `count` over the whole effective batch. Padding or splitting a batch
    therefore changes nothing. `capdistill.testing.check_loss` tests your own loss.

    Attributes:
        needs: Outputs that the models must compute, a subset of {"logits", "features", "hidden",
            "attention"}.
        per: "token" (valid target tokens are counted) or "image"; ignored if `count` is overridden.
        couples_batch: True for losses that look across the images of a batch. Splitting a batch
            changes them: with `accumulation_steps` they see one micro-batch at a time, and over
            several processes the images of one rank.
        from_teacher: False for a term that reads no teacher: `forward` may be given None as the
            teacher's output.
        across_vocabularies: True for a loss on words whose teacher may have another vocabulary: it
            is then given the teacher's output for the teacher's own ids of the captions.
        teacher: Name of the teacher that the loss reads, where there are several; set by
            `{"name": "feature", "teacher": "lite2"}`, too, or by its place: `"teacher": 0`.
        progress: Share of the run that is done, 0 to 1, for schedules; the trainer sets it before
            each forward pass.
        was_trained: Whether a trainer has made steps with it; the trainer sets it.

    Raises:
        ConfigError: (when the class is defined or the attribute is set) `needs` or `per` is
            invalid.
    """

    needs: frozenset[str] = frozenset({"logits"})
    per: Literal["token", "image"] = "token"
    couples_batch: bool = False
    from_teacher: bool = True
    across_vocabularies: bool = False
    teacher: str | None = None
    progress: float = 0.0
    was_trained: bool = False

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
        """Create projectors, once, before the optimizer; reject models that do not fit.

        Raises:
            IncompatibleModels: student and teacher lack what the loss needs.
        """

    def count(self, batch: Batch) -> float:
        """Number of valid tokens, or of images, that the sum runs over."""
        return float(batch.target_mask.sum()) if self.per == "token" else float(batch.num_images)

    def settings(self, progress: float) -> dict[str, float]:
        """Numbers that a schedule of this loss moves, by name, at `progress`: for the history."""
        return {}

    @abstractmethod
    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Scalar float32 sum; gradients reach the student and the projectors only."""


_DECLARED = {"needs", "per", "couples_batch", "from_teacher", "across_vocabularies"}


def _declared(cls: type[DistillationLoss], name: str, value: Any) -> Any:
    """Check the value of an attribute that the trainer relies on, and return it."""
    where = f"The loss {cls.__name__}: {name} = {value!r}"
    if name in ("couples_batch", "from_teacher", "across_vocabularies"):
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
        raise ConfigError(f'{where} is not a set of names. Write needs = frozenset({{"logits"}}).')
    for need in value:
        if need not in OUTPUTS:
            raise ConfigError(
                f"{where}: there is no output {need!r}. {suggest(str(need), OUTPUTS)}"
            )
    return frozenset(value)


Schedule = float | tuple[float, float] | Callable[[float], float]


def check_schedule(what: str, value: Any, *, positive: bool = False) -> Schedule:
    """A number that may change over a run, as it was given by a user or a run file.

    Example:
        >>> check_schedule("TokenKD: temperature", [8, 2], positive=True)
        (8.0, 2.0)

    Args:
        what: Beginning of the message.
        value: A number, a pair (first, last) that is interpolated linearly over the run, a
            function of the run's progress in [0, 1], or a schedule as data (`named_schedule`).
        positive: Whether 0 is invalid.

    Raises:
        ConfigError: it is none of these, or a number is negative or not finite.
    """
    if isinstance(value, Mapping):
        made = named_schedule(what, value, positive=positive)
        return made if any(made.values) else 0.0
    if callable(value):
        return value  # type: ignore[no-any-return]
    pair = isinstance(value, (tuple, list))
    values = tuple(value) if pair else (value,)
    real = all(isinstance(each, Real) and not isinstance(each, bool) for each in values)
    fits = real and len(values) == (2 if pair else 1)
    if not fits or not all(_is_allowed(each, positive) for each in values):
        raise ConfigError(
            f"{what} is {value!r}; give a finite number {'> 0' if positive else '>= 0'}, a pair "
            "(first, last) of them, a function of the run's progress, or a schedule such as "
            '{"schedule": "cosine", "first": 1.0, "last": 0.1}.'
        )
    return (float(values[0]), float(values[1])) if pair else float(values[0])


def scheduled(what: str, schedule: Schedule, progress: float, *, positive: bool = False) -> float:
    """The value of a checked schedule at `progress` (0 to 1) of the run.

    Example:
        >>> scheduled("TokenKD: temperature", (8.0, 2.0), progress=0.5)
        5.0

    Raises:
        ConfigError: a function returned something else than an allowed number.
    """
    if isinstance(schedule, tuple):
        first, last = schedule
        return first + (last - first) * progress
    if not callable(schedule):
        return schedule
    value: Any = schedule(progress)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not _is_allowed(number, positive):
        raise ConfigError(
            f"{what} gave {value!r} at {progress:.0%} of the run; "
            f"give finite numbers {'> 0' if positive else '>= 0'}."
        )
    return number


def _is_allowed(number: float, positive: bool) -> bool:
    return 0 <= number <= sys.float_info.max and not (positive and number == 0)


def check_factors(loss: str, **factors: float) -> list[float]:
    """The factors of the parts of a loss, in the order given.

    Example:
        >>> check_factors("RelationalKD", distance=1, angle=0)
        [1.0, 0.0]

    Raises:
        ConfigError: one is negative or not finite, or all are 0.
    """
    checked = [require_number(f"{loss}: {name}", value, 0) for name, value in factors.items()]
    if not any(checked):
        raise ConfigError(f"{loss}: {' and '.join(factors)} are 0, so there is nothing to learn.")
    return checked


Given = TypeVar("Given")


class Projector(nn.Linear):
    """A linear layer that runs in the precision of its weights (float32), also under autocast.

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


def same_pair(loss: str, built: object, widths: object) -> bool:
    """Whether the loss is already built for this pair of widths; False if it is not built.

    Projectors are created once: a second build would leave the optimizer with stale parameters.

    Raises:
        ConfigError: the loss was built for models of other widths.
    """
    if built is None:
        return False
    if built != widths:
        raise ConfigError(
            f"{loss} was built for (student, teacher) widths {built} but is now used "
            f"with {widths}. Create a new loss for each pair of models."
        )
    return True


def given(loss: str, what: str, model: str, value: Given | None) -> Given:
    """`value`, an output that the loss needs.

    Raises:
        IncompatibleModels: it is None.
    """
    if value is None:
        raise IncompatibleModels(
            f"{loss} needs {what} from the {model}, but its output has None. "
            f"Return {what} from the {model}, and declare it in its spec."
        )
    return value


def not_built(loss: str) -> ConfigError:
    """The error for a loss that is called before `build`."""
    return ConfigError(
        f"{loss} was called before build(student_spec, teacher_spec), which creates its "
        "projection. Distiller calls it; in your own loop, call "
        "loss.build(student.spec(), teacher.spec())."
    )


def require_specs(loss: str, **specs: object) -> None:
    """Check what a loss is built with, by the role of the model.

    Raises:
        ConfigError: it is not a specification, but a model, for instance.
    """
    for role, spec in specs.items():
        if not isinstance(spec, ModelSpec):
            raise ConfigError(
                f"{loss}.build: {type(spec).__name__} was given as the {role}; expected a "
                "ModelSpec, such as captioner.spec()."
            )
