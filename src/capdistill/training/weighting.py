"""Weights of the terms that adapt while training: by uncertainty or by loss ratios.

The weight of a term in a step is its base weight (a number, or a schedule) times a factor that the
method computes. All factors begin at 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, require_int, require_number, shortened

_ROUNDING = 1e-4  # how far below 0 a divergence may come out


class Weighting(nn.Module):
    """Base class: factors of the terms, and what a method learns or observes for them.

    Its parameters are trained in a group of their own ("weighting"), without weight decay and
    clipping. Buffers and parameters are saved with the run.

    Args:
        weights: Base weights by term, as `Distiller` takes them.

    Attributes:
        names: Terms that are built, in their order; known after `build`.
        learning_rate: Peak learning rate of the parameters.
    """

    kind: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    learning_rate: float = 0.0

    def __init__(self, weights: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not (weights is None or isinstance(weights, Mapping)):
            raise ConfigError(
                f"{type(self).__name__}: weights={shortened(weights)} was given. Expected base "
                'weights by term, such as {"ce": 0.3, "token": 0.7}, or None for the defaults.'
            )
        self.base: dict[str, Any] = dict(weights or {})
        self.names: tuple[str, ...] = ()

    def build(self, names: Sequence[str], student: nn.Module) -> None:
        """Create parameters and buffers for the terms, once.

        Raises:
            ConfigError: it is part of another trainer.
        """
        if self.names:
            raise ConfigError(
                f"weights: this {type(self).__name__} belongs to another trainer. Make a new one "
                "for each."
            )
        self.names = tuple(names)

    def start_step(self, step: int, epoch: int, scale: float) -> None:
        """Prepare the factors of a step.

        Args:
            step: Optimizer steps done.
            epoch: Epochs done.
            scale: By which the loss is multiplied for its backward pass.
        """

    @abstractmethod
    def factors(self) -> Tensor | list[float]:
        """(K,) the factors of the terms in the order of `names`; with gradients if learned."""

    def penalty(self, base: Mapping[str, float], present: Sequence[str]) -> Tensor | float:
        """What is added to the loss once per step, for the terms that are present in it."""
        return 0.0

    def observe(self, means: Mapping[str, Tensor], student: nn.Module) -> None:
        """Measure the terms of a micro-batch before its backward pass.

        Args:
            means: Each term's sum over the micro-batch, divided by its count over the step.
            student: The captioner that is trained.
        """

    def measure(self, add: Callable[[Tensor], Tensor]) -> None:
        """Set gradients from what was observed in the micro-batches of a step.

        Args:
            add: Sums a tensor over the processes that train together.
        """

    def end_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Measure the terms of a whole step after it.

        Raises:
            ConfigError: a term is negative: its weight would grow without limit.
        """
        for name in self.names:
            mean = sums.get(name, 0.0) / (counts[name] or 1.0)
            if mean < -_ROUNDING:
                raise ConfigError(
                    f"weights: the term '{name}' is {mean:.4g} in this step, but "
                    f"{type(self).__name__} balances terms >= 0. Give plain weights."
                )

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)

    def as_data(self) -> dict[str, Any]:
        """Name and options, as a run file has them beside the base weights."""
        return {"name": self.kind, **{name: getattr(self, name) for name in self.options}}


class Uncertainty(Weighting):
    """Weigh every term by a learned uncertainty: a noisy term counts less.

    The loss of a step is `sum_i w_i (exp(-s_i) L_i + s_i)` with the base weights w_i, the mean
    terms L_i and one learned number s_i per term, the log-variance. It begins at s_i = 0, with the
    base weights. For a constant term the optimum is exp(s_i) = L_i, where each term contributes
    w_i.

    Example:
        >>> weighting = Uncertainty({"ce": 0.3, "token": 0.7})
        >>> weighting.build(["ce", "token"], nn.Linear(1, 1))
        >>> weighting.log_variance.data = torch.tensor([0.0, 1.0])
        >>> [round(factor, 3) for factor in weighting.factors().tolist()]
        [1.0, 0.368]

    Args:
        weights: Base weights w_i.
        learning_rate: Peak learning rate of s; it follows the schedule of the others.

    Source:
        Kendall, Gal, Cipolla (2018), Multi-task learning using uncertainty to weigh losses,
        equation 7, with s = log sigma^2 and the same form for every term.
    """

    kind = "uncertainty"
    options = ("learning_rate",)

    def __init__(
        self, weights: Mapping[str, Any] | None = None, learning_rate: float = 0.01
    ) -> None:
        super().__init__(weights)
        self.learning_rate = require_number("Uncertainty: learning_rate", learning_rate, above=0)

    def build(self, names: Sequence[str], student: nn.Module) -> None:
        """One s per term."""
        super().build(names, student)
        self.log_variance = nn.Parameter(torch.zeros(len(names)))

    def factors(self) -> Tensor:
        """exp(-s)."""
        return torch.exp(-self.log_variance)

    def penalty(self, base: Mapping[str, float], present: Sequence[str]) -> Tensor | float:
        """`sum_i w_i s_i`; a term that is absent in a step leaves its s as it is."""
        terms = zip(self.names, self.log_variance, strict=True)
        return sum((base[name] * s for name, s in terms if name in present), 0.0)


class LossRatio(Weighting):
    """Weigh every term by how slowly it falls: dynamic weight averaging.

    The factors are `K softmax(r / temperature)` over the K terms, where r_i is the mean of term i
    in the last window over its mean in the window before. Until two windows are complete, and for
    terms without a value in them, they are 1.

    Example:
        >>> weighting = LossRatio({"ce": 1.0, "token": 1.0}, temperature=1.0, every=1)
        >>> weighting.build(["ce", "token"], nn.Linear(1, 1))
        >>> for step, (ce, token) in enumerate([(4.0, 2.0), (2.0, 2.0)]):
        ...     weighting.start_step(step, 0, 1.0)
        ...     weighting.end_step({"ce": ce, "token": token}, {"ce": 1.0, "token": 1.0})
        >>> weighting.start_step(2, 0, 1.0)
        >>> [round(factor, 3) for factor in weighting.factors()]  # 2 softmax(0.5, 1)
        [0.755, 1.245]

    Args:
        weights: Base weights.
        temperature: T > 0; the larger it is, the more equal are the factors.
        every: Steps per window; None takes epochs. In a loop of your own, set `trainer.epoch`.

    Source:
        Liu, Johns, Davison (2019), End-to-end multi-task learning with attention, equation 7.
    """

    kind = "loss_ratio"
    options = ("temperature", "every")
    sums: Tensor
    counts: Tensor
    last: Tensor
    before: Tensor
    window: Tensor

    def __init__(
        self,
        weights: Mapping[str, Any] | None = None,
        temperature: float = 2.0,
        every: int | None = None,
    ) -> None:
        super().__init__(weights)
        self.temperature = require_number("LossRatio: temperature", temperature, above=0)
        self.every = None if every is None else require_int("LossRatio: every", every, minimum=1)

    def build(self, names: Sequence[str], student: nn.Module) -> None:
        """Sums and counts of this window, and the means of the two before it; 0 if unknown."""
        super().build(names, student)
        for name in ("sums", "counts", "last", "before"):
            self.register_buffer(name, torch.zeros(len(names), dtype=torch.float64))
        self.register_buffer("window", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossRatio:
        """Stay on the CPU in float64: nothing here is worth waiting for a device."""
        return self

    def start_step(self, step: int, epoch: int, scale: float) -> None:
        """Begin a new window if this is its first step."""
        window = epoch if self.every is None else step // self.every
        if window == int(self.window):
            return
        self.before.copy_(self.last)
        self.last.copy_(self.sums / self.counts.clamp(min=1e-12))  # 0 for a term without a value
        self.sums.zero_()
        self.counts.zero_()
        self.window.fill_(window)

    def factors(self) -> list[float]:
        """The softmax of the ratios."""
        known = (self.last > 0) & (self.before > 0)
        ratios = self.last / self.before.clamp(min=1e-12) / self.temperature
        shares = ratios.masked_fill(~known, -math.inf).softmax(0)
        factors: list[float] = torch.where(known, known.sum() * shares, 1.0).tolist()
        return factors

    def end_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Add the terms to the window."""
        super().end_step(sums, counts)
        for place, name in enumerate(self.names):
            self.sums[place] += sums.get(name, 0.0)
            self.counts[place] += counts[name]
