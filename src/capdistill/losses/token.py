"""Distillation of the next-token distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss, given
from capdistill.losses.divergence import kl_divergence
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class TokenKD(DistillationLoss):
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
        temperature: Softening T > 0 applied to both logits (dimensionless). The term is scaled by
            T², which keeps the size of its gradient when T changes.

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ; names the first differing entry.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """

    needs = frozenset({"logits"})
    per = "token"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(
                f"TokenKD: temperature is {temperature}, but it must be a positive, finite number. "
                "Usual values are 1 to 10."
            )
        self.temperature = temperature

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Compare the vocabularies entry by entry.

        Raises:
            IncompatibleModels: they differ in an entry or in size.
        """
        place = first_difference(student.vocabulary, teacher.vocabulary)
        if place is not None:
            raise IncompatibleModels(
                f"TokenKD: the vocabularies differ at entry {place}: "
                f"{_entry(student, place)}, {_entry(teacher, place)}.\n"
                "Token distillation compares one entry with the same entry: build both models with "
                "one tokenizer, or remove this loss."
            )

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """T² times the sum of KL(teacher || student) over valid tokens."""
        ours = given("TokenKD", "logits", "student", student.logits)  # (B, T, V)
        theirs = given("TokenKD", "logits", "teacher", teacher.logits)
        divergence = kl_divergence(ours, theirs, batch.target_mask, self.temperature)
        return self.temperature**2 * divergence

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"temperature={self.temperature}"


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
