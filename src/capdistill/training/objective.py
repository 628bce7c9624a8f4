"""Student and losses as one trainable module, so that everything that learns is found together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, suggest
from capdistill.losses.base import DistillationLoss
from capdistill.losses.divergence import cross_entropy
from capdistill.outputs import Batch, CaptionerOutput

Weight = float | tuple[float, float] | Callable[[float], float]


class Objective(nn.Module):
    """The terms of a step: cross-entropy, and the distillation losses on the same forward pass.

    All trainable work happens in `forward`; the projectors of the losses are submodules, so that
    optimizer, clipping, checkpoints and `to(device)` see them.

    Args:
        student: The captioner that is trained.
        losses: Built distillation losses by term name.
        weights: Of every term, "ce" among them: a number, a pair (first, last) that is
            interpolated linearly over the run, or a function of the run's progress in [0, 1].
        label_smoothing: Of the cross-entropy term.
    """

    def __init__(
        self,
        student: Captioner,
        losses: Mapping[str, DistillationLoss],
        weights: Mapping[str, Weight],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight != 0}
        check_weights(self.weights, losses)
        self.student = student
        self.losses = nn.ModuleDict({k: loss for k, loss in losses.items() if k in self.weights})
        self.label_smoothing = label_smoothing

    @property
    def need(self) -> frozenset[str]:
        """What the losses need of both models beside logits and features."""
        return frozenset[str]().union(*(loss.needs for _, loss in self._losses()))

    def forward(self, batch: Batch, teacher: CaptionerOutput | None = None) -> dict[str, Tensor]:
        """The sum of every term over the batch, unweighted, float32 scalars."""
        student = self.student(batch, need=self.need)
        sums = {}
        if "ce" in self.weights:
            sums["ce"] = cross_entropy(
                student.logits, batch.targets, batch.target_mask, self.label_smoothing
            )
        for name, loss in self._losses():
            sums[name] = loss(student, teacher, batch)
        return sums

    def _losses(self) -> Iterator[tuple[str, DistillationLoss]]:
        return cast("Iterator[tuple[str, DistillationLoss]]", iter(self.losses.items()))

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each term's sum is divided by."""
        counts = {name: float(loss.count(batch)) for name, loss in self._losses()}
        return {"ce": float(batch.target_mask.sum()), **counts}

    def weight(self, name: str, progress: float) -> float:
        """A term's weight when `progress` (0 to 1) of the run is done."""
        weight = self.weights[name]
        if callable(weight):
            return float(weight(progress))
        if isinstance(weight, tuple):
            first, last = weight
            return first + (last - first) * progress
        return float(weight)


def check_weights(weights: Mapping[str, Weight], losses: Mapping[str, object]) -> None:
    """Every weight has its term, every term its weight, and none is negative.

    Raises:
        ConfigError: otherwise, with the names there are.
    """
    known = ["ce", *losses]
    for name, weight in weights.items():
        if name not in known:
            raise ConfigError(f"weights: there is no term '{name}'. {suggest(name, known)}")
        values = () if callable(weight) else weight if isinstance(weight, tuple) else (weight,)
        if any(not 0 <= value < float("inf") for value in values):
            raise ConfigError(f"weights: '{name}' is {weight}; give finite numbers >= 0.")
    if not weights:
        raise ConfigError("weights: every term is 0, so there is nothing to train.")
