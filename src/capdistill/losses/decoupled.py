"""Decoupled distillation: the target word and the other words weighted apart."""

from __future__ import annotations

from torch import Tensor

from capdistill.losses.base import Schedule, check_factors
from capdistill.losses.divergence import decoupled_divergence
from capdistill.losses.token import LogitsLoss
from capdistill.outputs import Batch


class DecoupledKD(LogitsLoss):
    """Match the probability of the target word, and apart from it the distribution over the others.

    KL(teacher || student) = TCKD + (1 - p) NCKD, where p is the teacher's probability of the target
    word: what a confident teacher knows about the other words hardly counts. Here the sum is
    alpha TCKD + beta NCKD, scaled by T². The targets are those of the batch.

    Example:
        >>> DecoupledKD(beta=2.0)
        DecoupledKD(alpha=1.0, beta=2.0, temperature=4.0)

    Args:
        alpha: Factor >= 0 of TCKD, the KL divergence of (target, all others).
        beta: Factor >= 0 of NCKD, the KL divergence over the others, renormalised. The default is
            that of the paper for CIFAR-100; for ImageNet it is 0.5 with T = 1. With 8 the term is
            several times as large as `TokenKD`: choose its weight accordingly.
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: a factor is negative, both are 0, or T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ.

    Source:
        Zhao et al. (2022), Decoupled Knowledge Distillation, section 3.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: Schedule = 4.0) -> None:
        super().__init__(temperature)
        self.alpha, self.beta = check_factors("DecoupledKD", alpha=alpha, beta=beta)

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """alpha TCKD + beta NCKD."""
        return decoupled_divergence(
            student,
            teacher,
            batch.targets,
            batch.target_mask,
            self.alpha,
            self.beta,
            temperature,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"alpha={self.alpha}, beta={self.beta}, {super().extra_repr()}"
