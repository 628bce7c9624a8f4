"""DIST: correlation in place of an exact match of probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capdistill.losses.base import Schedule, check_factors
from capdistill.losses.distances import correlation_distance
from capdistill.losses.divergence import by_autograd, sum_over_rows, valid_rows
from capdistill.losses.token import LogitsLoss
from capdistill.outputs import Batch


class DistKD(LogitsLoss):
    """Let the student's next-token probabilities correlate with the teacher's.

    Two relations are compared by 1 - Pearson's correlation: that among the words at one token
    (inter), and that among the tokens for one word (intra). The student need not reach the exact
    values, which helps if the teacher is much stronger. Where the teacher does not vary, there is
    nothing to match and the distance is 0.

    The sum is that of inter over the valid tokens, plus the number of valid tokens times the mean
    of intra over the vocabulary: divided by the count, both are means, as published. It is scaled
    by T². Intra relates the tokens of a batch (`couples_batch`): padding changes nothing, but over
    several micro-batches the term is the mean of theirs, weighted by their tokens, and intra sees
    the tokens of one at a time. With gamma = 0 splitting a batch changes nothing, and logits are
    read in chunks, as by the other losses on words.

    Example:
        >>> DistKD(gamma=0.5)
        DistKD(beta=1.0, gamma=0.5, temperature=1.0)

    Args:
        beta: Factor >= 0 of inter.
        gamma: Factor >= 0 of intra.
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: a factor is negative, both are 0, or T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ.

    Source:
        Huang et al. (2022), Knowledge Distillation from A Stronger Teacher (DIST).
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: Schedule = 1.0) -> None:
        super().__init__(temperature)
        self.beta, self.gamma = check_factors("DistKD", beta=beta, gamma=gamma)
        self.couples_batch = self.gamma > 0

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """The sum of both distances over the tokens."""
        mask = batch.target_mask
        if not self.gamma:
            return sum_over_rows(by_autograd(self._inter(temperature)), mask, student, teacher)
        mine = (valid_rows(student, mask) / temperature).softmax(-1)  # (n, V)
        with torch.no_grad():
            theirs = (valid_rows(teacher, mask) / temperature).softmax(-1)
        inter = correlation_distance(mine, theirs, 1).sum()
        intra = correlation_distance(mine, theirs, 0).mean()  # over the vocabulary
        return self.beta * inter + self.gamma * len(mine) * intra

    def _inter(self, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The sum of inter over rows (n, V) of the logits; without intra, rows can be split."""

        def value(student: Tensor, teacher: Tensor) -> Tensor:
            mine, theirs = ((each / temperature).softmax(-1) for each in (student, teacher))
            return self.beta * correlation_distance(mine, theirs, 1).sum()

        return value

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"beta={self.beta}, gamma={self.gamma}, {super().extra_repr()}"
