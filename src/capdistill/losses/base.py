"""The contract of a distillation loss: two outputs in, one sum out.

Whoever writes a loss subclasses `DistillationLoss`; the trainer divides, weights and adds.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor, nn

from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class DistillationLoss(nn.Module):
    """One place where the student learns from the teacher.

    `forward` returns the **sum over tokens (or images) of the mean over width**; the trainer
    divides it once by `count` over the whole effective batch, so that padding, splitting and
    spreading a batch change nothing.

    Attributes:
        needs: What must be computed, a subset of {"logits", "features", "hidden", "attention"}.
        per: "token" (valid target tokens are counted) or "image".
        couples_batch: True for losses that look across the batch: they are exempt from the law
            that splitting a batch changes nothing.
    """

    needs: frozenset[str] = frozenset({"logits"})
    per: Literal["token", "image"] = "token"
    couples_batch: bool = False

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Create projectors, once, before the optimizer; say what does not fit.

        Raises:
            IncompatibleModels: student and teacher lack what the loss needs.
        """

    def count(self, batch: Batch) -> float:
        """How many things the sum runs over."""
        return float(batch.target_mask.sum()) if self.per == "token" else float(batch.num_images)

    @abstractmethod
    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Scalar float32 sum; gradients reach the student and the projectors only."""
