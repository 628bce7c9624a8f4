"""Divergence from a target that is known on some entries of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.losses.divergence import Part, sum_over_rows


def entries_divergence(
    student_logits: Tensor, ids: Tensor, target: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over valid tokens of KL(target || student) on given entries.

    With one more value than entries, the last is that of all other entries together, and the
    student's probabilities of those are added up, too. Otherwise the student's distribution is
    renormalised over the entries. With the teacher's k most probable entries as the target it is
    `top_k_divergence`, without the teacher's other logits.

    Example:
        >>> student, target = torch.zeros(1, 1, 5), torch.tensor([[[0.5, 0.5]]]).log()
        >>> one = torch.tensor([[True]])
        >>> round(float(entries_divergence(student, torch.tensor([[[3]]]), target, one)), 4)
        0.2231

    Args:
        student_logits: (B, T, V).
        ids: (B, T, k) different entries.
        target: (B, T, k) or (B, T, k + 1) log-probabilities.
        mask: (B, T) True where a token is real.
        temperature: T > 0; the student's logits are divided by it.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """
    bucket = target.shape[-1] > ids.shape[-1]

    def part(rows: Tensor, index: Tensor, target: Tensor) -> Part:
        rows = rows.div_(temperature)  # a copy of the logits, which is used up
        chosen = rows.gather(-1, index)  # (n, k)
        if bucket:
            others = rows.scatter_(-1, index, _NEVER)
            top = others.amax(-1, keepdim=True)
            shares = others.softmax(-1)
            rest = top - shares.amax(-1, keepdim=True).log()  # their log-sum-exp
            chosen = torch.cat([chosen, rest], -1)
        mine = F.log_softmax(chosen, -1)
        weight = target.exp()
        gap = (target - mine).masked_fill_(weight == 0, 0)  # 0 * inf would be nan

        def slope() -> Tensor:
            excess = (mine.exp() - weight).div_(temperature)
            if not bucket:
                return torch.zeros_like(rows).scatter_(-1, index, excess)
            return shares.mul_(excess[:, -1:]).scatter_(-1, index, excess[:, :-1])

        return (weight * gap).sum(), slope

    return sum_over_rows(part, mask, student_logits, ids, target)


_NEVER = -1e30  # the logit of an entry that is out of the question; -inf less itself is nan
