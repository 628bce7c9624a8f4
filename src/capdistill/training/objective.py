"""Student and losses as one trainable module, so that everything that learns is found together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, suggest
from capdistill.losses.base import DistillationLoss, given
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
            A term whose weight is 0 throughout is left out.
        label_smoothing: Of the cross-entropy term.

    Attributes:
        at_rest: Modules of the student that stay in evaluation mode: those shared with a teacher.
    """

    def __init__(
        self,
        student: Captioner,
        losses: Mapping[str, DistillationLoss],
        weights: Mapping[str, Weight],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = check_weights(weights, losses)
        self.student = student
        self.losses = nn.ModuleDict({k: loss for k, loss in losses.items() if k in self.weights})
        self.label_smoothing = label_smoothing
        self.at_rest: Sequence[nn.Module] = ()

    @property
    def need(self) -> frozenset[str]:
        """What the losses need of both models beside logits and features."""
        return frozenset[str]().union(*(loss.needs for _, loss in self._losses()))

    def forward(
        self,
        batch: Batch,
        teacher: CaptionerOutput | None = None,
        read: Callable[[Batch, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The sum of every term over the batch, unweighted, float32 scalars.

        Args:
            batch: Its targets are those of the cross-entropy.
            teacher: What it says of the batch.
            read: What the student reads in place of `batch.inputs`; see `Captioner.forward`.
        """
        reading = {} if read is None else {"input_fn": read}
        needed = self.need | {"logits"} if "ce" in self.weights else self.need
        student: CaptionerOutput = self.student(batch, need=needed, **reading)
        sums = {}
        if "ce" in self.weights:
            logits = given("cross-entropy", "logits", "student", student.logits)
            sums["ce"] = cross_entropy(
                logits, batch.targets, batch.target_mask, self.label_smoothing
            )
        for name, loss in self._losses():
            sums[name] = loss(student, teacher, batch)
        return sums

    def train(self, mode: bool = True) -> Objective:
        """As `nn.Module.train`; what is shared with a teacher stays in evaluation mode."""
        super().train(mode)
        for module in self.at_rest:
            module.eval()
        return self

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each term's sum is divided by."""
        tokens = {"ce": float(batch.target_mask.sum())} if "ce" in self.weights else {}
        return {**tokens, **{name: float(loss.count(batch)) for name, loss in self._losses()}}

    def weight(self, name: str, progress: float) -> float:
        """A term's weight when `progress` (0 to 1) of the run is done.

        Raises:
            ConfigError: a function gave what is no weight.
        """
        weight = self.weights[name]
        if isinstance(weight, tuple):
            first, last = weight
            return first + (last - first) * progress
        value = float(weight(progress) if callable(weight) else weight)
        if not 0 <= value < math.inf:
            raise ConfigError(
                f"weights: '{name}' gave {value} at {progress:.0%} of the run; "
                "give finite numbers >= 0."
            )
        return value

    def _losses(self) -> Iterator[tuple[str, DistillationLoss]]:
        return cast("Iterator[tuple[str, DistillationLoss]]", iter(self.losses.items()))


def check_weights(weights: Mapping[str, Any], losses: Mapping[str, object]) -> dict[str, Weight]:
    """The weights of the terms to build: each has its term, none is negative, 0 is left out.

    Example:
        >>> check_weights({"ce": 1, "token": [0.7, 0.1], "hidden": 0.0}, {"token": 1, "hidden": 2})
        {'ce': 1.0, 'token': (0.7, 0.1)}

    Raises:
        ConfigError: otherwise, with the names there are.
    """
    known = ["ce", *losses]
    for name in weights:
        if name not in known:
            raise ConfigError(f"weights: there is no term '{name}'. {suggest(name, known)}")
    checked = {name: _check_weight(name, weight) for name, weight in weights.items()}
    built = {name: weight for name, weight in checked.items() if weight not in (0.0, (0.0, 0.0))}
    if not built:
        raise ConfigError("weights: every term is 0, so there is nothing to train.")
    return built


def _check_weight(name: str, weight: Any) -> Weight:
    if callable(weight):
        return cast(Weight, weight)
    pair = isinstance(weight, (tuple, list))
    try:
        values = tuple(float(value) for value in (weight if pair else (weight,)))
    except (TypeError, ValueError):
        values = ()
    if len(values) != (2 if pair else 1) or not all(0 <= v < math.inf for v in values):
        raise ConfigError(
            f"weights: '{name}' is {weight!r}; give a finite number >= 0, a pair (first, last) of "
            "them, or a function of the run's progress."
        )
    return (values[0], values[1]) if pair else values[0]
