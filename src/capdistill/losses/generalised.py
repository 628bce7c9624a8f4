"""Other divergences between the next-token distributions: reverse KL and Jensen-Shannon."""

from __future__ import annotations

from torch import Tensor

from capdistill.errors import require_number
from capdistill.losses.base import Schedule
from capdistill.losses.divergence import jensen_shannon_divergence, reverse_kl_divergence
from capdistill.losses.token import LogitsLoss
from capdistill.outputs import Batch


class ReverseKD(LogitsLoss):
    """Move the student to words that the teacher finds likely, by the reverse KL divergence.

    KL(student || teacher) punishes probability on words that the teacher excludes, and lets the
    student leave out words that the teacher also finds likely: a small model keeps to one good
    continuation instead of spreading over all. The term is scaled by T².

    Example:
        >>> loss = ReverseKD(temperature=1.0)
        >>> sorted(loss.needs), loss.per
        (['logits'], 'token')

    Args:
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ.

    Source:
        Gu et al. (2024), MiniLLM, section 2; on the words of the references instead of sampled
        ones.
    """

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(student || teacher)."""
        return reverse_kl_divergence(student, teacher, batch.target_mask, temperature)


class JensenShannonKD(LogitsLoss):
    """Match the student's next-token distribution by the generalised Jensen-Shannon divergence.

    For 0 < beta < 1 it is beta KL(teacher || M) + (1 - beta) KL(student || M) with
    M = beta teacher + (1 - beta) student, as published. It goes to 0 with beta, and with 1 - beta:
    divided by beta it approaches the forward KL of `TokenKD` for beta -> 0, divided by 1 - beta the
    reverse KL of `ReverseKD` for beta -> 1. `beta=0` and `beta=1` are these two limits. The term is
    scaled by T².

    Example:
        >>> JensenShannonKD(beta=0.1)
        JensenShannonKD(beta=0.1, temperature=4.0)

    Args:
        beta: Share of the teacher in M, 0 to 1.
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: beta is not in [0, 1], or T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ.

    Source:
        Agarwal et al. (2024), On-Policy Distillation of Language Models (GKD), section 2.
    """

    def __init__(self, beta: float = 0.5, temperature: Schedule = 4.0) -> None:
        super().__init__(temperature)
        self.beta = require_number("JensenShannonKD: beta", beta, 0, 1)

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """The divergence with share `beta` of the teacher."""
        mask = batch.target_mask
        return jensen_shannon_divergence(student, teacher, mask, self.beta, temperature)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"beta={self.beta}, {super().extra_repr()}"
