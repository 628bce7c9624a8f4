"""Weights of the terms that balance the norms of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, require_int, require_number, suggest
from capdistill.training.weighting import Weighting


class GradNorm(Weighting):
    """Balance the norms of the terms' gradients with respect to shared weights.

    The factors f_i are learned: every `every` steps, G_i = f_i |grad L_i| is compared with
    `mean(G) * r_i^alpha`, where r_i is the relative inverse rate of training, L_i / L_i(0) over
    its mean; f moves along the gradient of `sum_i |G_i - mean(G) r_i^alpha|` (the target is held
    constant), and is scaled to sum to the number of terms. The base weights stay what they
    are: the gradients in force are balanced in their proportions.

    Each measurement costs a backward pass per term, from the terms to the shared weights.

    Example:
        >>> weighting = GradNorm({"ce": 1.0, "token": 1.0}, alpha=0.5)
        >>> weighting.build(["ce", "token"], nn.Linear(1, 1))
        >>> weighting
        GradNorm(alpha=0.5, every=10, shared=None, learning_rate=0.025)

    Args:
        weights: Base weights.
        alpha: Strength of the pull towards equal rates of training, >= 0. With 0, all norms
            become equal.
        every: Steps between two measurements.
        shared: Name of the student's part whose weights are shared, such as "encoder.project".
            By default the last one with a matrix, in the order of the student's parameters, that
            every term reaches: what makes the vector before the vocabulary projection, or the end
            of the encoder if features are compared. Word embeddings are left out.
        learning_rate: Peak learning rate of the factors.

    Raises:
        ConfigError: (at the first step) no trained parameter is reached by all terms.

    Source:
        Chen, Badrinarayanan, Lee, Rabinovich (2018), GradNorm, equations 1 and 2, algorithm 1.
    """

    kind = "gradnorm"
    options = ("alpha", "every", "shared", "learning_rate")
    first: Tensor

    def __init__(
        self,
        weights: Mapping[str, Any] | None = None,
        alpha: float = 1.5,
        every: int = 10,
        shared: str | None = None,
        learning_rate: float = 0.025,
    ) -> None:
        super().__init__(weights)
        self.alpha = require_number("GradNorm: alpha", alpha, minimum=0)
        self.every = require_int("GradNorm: every", every, minimum=1)
        self.learning_rate = require_number("GradNorm: learning_rate", learning_rate, above=0)
        self.shared = shared
        self._due, self._scale = False, 1.0
        self._parameters_shared: list[nn.Parameter] | None = None
        self._gradients: dict[str, list[Tensor]] = {}
        self._means: dict[str, Tensor] = {}

    def build(self, names: Sequence[str], student: nn.Module) -> None:
        """A factor and the first value of each term.

        Raises:
            ConfigError: the student has no part `shared` with trained parameters.
        """
        super().build(names, student)
        self.factor = nn.Parameter(torch.ones(len(names)))
        self.register_buffer("first", torch.zeros(len(names)))  # 0: not known yet
        if self.shared is not None:
            _named_part(student, self.shared)

    def start_step(self, step: int, epoch: int, scale: float) -> None:
        """Measure in this step, or not."""
        self._due, self._scale = step % self.every == 0, scale
        self._gradients, self._means = {}, {}

    def factors(self) -> Tensor:
        """The factors, as constants of the loss."""
        return self.factor.detach()

    def observe(self, means: Mapping[str, Tensor], student: nn.Module) -> None:
        """Add the gradients of a micro-batch."""
        if not self._due:
            return
        means = {name: mean for name, mean in means.items() if mean.requires_grad}
        if self._parameters_shared is None:
            self._parameters_shared = self._find_shared(means, student)
        for name, mean in means.items():
            found = self._gradient(mean, self._parameters_shared)
            before = self._gradients.get(name)
            added = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
            self._gradients[name] = added
            self._means[name] = self._means.get(name, 0.0) + mean.detach().float()

    def end_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Keep the first value of each term; scale the factors to their sum."""
        super().end_step(sums, counts)
        if not self._due:
            return
        means = [sums.get(name, 0.0) / (counts[name] or 1.0) for name in self.names]
        with torch.no_grad():
            self.first.copy_(torch.where(self.first > 0, self.first, self.first.new_tensor(means)))
            self.factor.clamp_(min=1e-3)
            self.factor.mul_(len(self.names) / self.factor.sum())

    def _gradient(self, mean: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of a term, in float32, from a pass at the scale of the loss."""
        found = torch.autograd.grad(
            mean * self._scale, parameters, retain_graph=True, allow_unused=True
        )
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g.float() / self._scale for g, p in pairs]

    @torch.no_grad()
    def measure(self, add: Callable[[Tensor], Tensor]) -> None:
        """The gradient of equation 2 with respect to the factors; absent terms have none."""
        if not self._due:
            return
        zero, shared = self.first.new_zeros(()), self._parameters_shared or []
        none = [torch.zeros_like(parameter) for parameter in shared]
        sums = {n: [add(g) for g in self._gradients.get(n, none)] for n in self.names}
        norms = torch.stack([_norm(sums[name], zero) for name in self.names])
        means = add(torch.stack([self._means.get(name, zero) for name in self.names]))
        present = means > 0
        rates = torch.where(self.first > 0, means / self.first.clamp(min=1e-12), 1.0)
        rates = rates / _mean(rates, present)
        weighted = self.factor * norms
        target = _mean(weighted, present) * rates**self.alpha
        slope = torch.sign(weighted - target) * norms * present
        finite = slope.isfinite().all()  # an overflow in half precision is no measurement
        self.factor.grad = torch.where(finite, slope, 0.0) * self._scale

    def _find_shared(self, means: Mapping[str, Tensor], student: nn.Module) -> list[nn.Parameter]:
        """The weights of the last part that every term reaches, or of the part that was named."""
        if self.shared is None:
            trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        else:
            trained = _named_part(student, self.shared)
        reached = {term: _reached(mean, trained) for term, mean in means.items()}
        common = [name for name in trained if all(name in found for found in reached.values())]
        if not common:
            missing = [term for term, found in reached.items() if not found]
            where = "" if self.shared is None else f" of '{self.shared}'"
            reason = f"; {', '.join(missing)} reach none" if missing else ""
            raise ConfigError(
                f"GradNorm: no trained parameter{where} is reached by all of {', '.join(means)}"
                f"{reason}. Name another part by shared=, leave a term out, or use Uncertainty, "
                "which needs no shared weights."
            )
        if self.shared is None:
            words = {n for n, m in student.named_modules() if isinstance(m, nn.Embedding)}
            matrices = [n for n in common if trained[n].ndim > 1 and _part_of(n) not in words]
            last = _part_of((matrices or common)[-1])
            common = [name for name in common if _part_of(name) == last]
        return [trained[name] for name in common]


def _named_part(student: nn.Module, part: str) -> dict[str, nn.Parameter]:
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    found = {n: p for n, p in trained.items() if n == part or n.startswith(f"{part}.")}
    if not found:
        parts = {_part_of(name) for name in trained}
        raise ConfigError(
            f"GradNorm: the student has no part '{part}' with trained parameters. "
            f"{suggest(str(part), parts)}"
        )
    return found


def _reached(mean: Tensor, trained: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that a term has a gradient for."""
    found = torch.autograd.grad(mean, [*trained.values()], retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def _part_of(name: str) -> str:
    return name.rpartition(".")[0]


def _norm(gradients: Sequence[Tensor], zero: Tensor) -> Tensor:
    if not gradients:
        return zero
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def _mean(values: Tensor, present: Tensor) -> Tensor:
    return (values * present).sum() / present.sum().clamp(min=1)
