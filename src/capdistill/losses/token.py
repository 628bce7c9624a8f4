"""Distillation of the next-token distribution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from capdistill.errors import IncompatibleModels
from capdistill.losses.base import (
    DistillationLoss,
    Schedule,
    check_schedule,
    given,
    scheduled,
)
from capdistill.losses.divergence import kl_divergence
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class LogitsLoss(DistillationLoss):
    """Base class of losses on the next-token distributions, softened by a temperature.

    A subclass defines `divergence`; `forward` scales it by T².

    Args:
        temperature: Softening T > 0 applied to both logits (dimensionless): a number, a pair
            (first, last) that is interpolated linearly over the run, or a function of the run's
            progress in [0, 1].

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ; names the first differing entry.
    """

    needs = frozenset({"logits"})
    per = "token"

    def __init__(self, temperature: Schedule = 4.0) -> None:
        super().__init__()
        self.temperature = check_schedule(self._temperature, temperature, positive=True)

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Compare the vocabularies entry by entry.

        Raises:
            IncompatibleModels: they differ in an entry or in size.
        """
        place = first_difference(student.vocabulary, teacher.vocabulary)
        if place is not None:
            raise IncompatibleModels(
                f"{type(self).__name__}: the vocabularies differ at entry {place}: "
                f"{_entry(student, place)}, {_entry(teacher, place)}.\n"
                "Token distillation compares one entry with the same entry: build both models with "
                "one tokenizer, or remove this loss."
            )

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """T² times the sum of the divergence over valid tokens."""
        name = type(self).__name__
        ours = given(name, "logits", "student", student.logits)  # (B, T, V)
        theirs = given(name, "logits", "teacher", teacher.logits)
        now = self._temperature_at(self.progress)
        return now**2 * self.divergence(ours, theirs, batch, now)

    def settings(self, progress: float) -> dict[str, float]:
        """The temperature at `progress`, if it changes over the run."""
        if isinstance(self.temperature, (int, float)):
            return {}
        return {"temperature": self._temperature_at(progress)}

    @abstractmethod
    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """The sum over valid tokens, at one temperature, of logits (B, T, V)."""

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"temperature={self.temperature}"

    def _temperature_at(self, progress: float) -> float:
        return scheduled(self._temperature, self.temperature, progress, positive=True)

    @property
    def _temperature(self) -> str:
        return f"{type(self).__name__}: temperature"


class TokenKD(LogitsLoss):
    """Match the student's next-token distribution to the teacher's.

    Example:
        >>> import torch
        >>> from capdistill.outputs import Batch, CaptionerOutput
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 5, 2]]), mask=torch.ones(1, 3, dtype=torch.bool),
        ...     captions=("dog",), image_ids=("a.jpg",),
        ... )
        >>> def output(scale):
        ...     return CaptionerOutput(scale * torch.eye(2, 6)[None], None, None, None, batch.mask)
        >>> loss = TokenKD(temperature=4.0)
        >>> total = loss(output(1.0), output(4.0), batch)  # sum over valid tokens
        >>> round(float(total / loss.count(batch)), 3)
        0.937

    Args:
        temperature: Softening T > 0 applied to both logits (dimensionless): a number, a pair
            (first, last) that is interpolated linearly over the run, or a function of the run's
            progress in [0, 1]. The term is scaled by T², which keeps the size of its gradient when
            T changes.

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ; names the first differing entry.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(teacher || student)."""
        return kl_divergence(student, teacher, batch.target_mask, temperature)


def first_difference(student: Sequence[str], teacher: Sequence[str]) -> int | None:
    """Index at which two vocabularies first differ, or None; a missing entry is a difference.

    Example:
        >>> first_difference(["a", "b"], ["a", "c"]), first_difference(["a"], ["a", "b"])
        (1, 1)
        >>> first_difference(["a"], ["a"]) is None
        True
    """
    for place, (mine, theirs) in enumerate(zip(student, teacher, strict=False)):
        if mine != theirs:
            return place
    if len(student) == len(teacher):
        return None
    return min(len(student), len(teacher))


def _entry(model: ModelSpec, place: int) -> str:
    size = len(model.vocabulary)
    what = repr(model.vocabulary[place]) if place < size else "no entry"
    return f"'{model.name}' has {what} ({size} entries)"
