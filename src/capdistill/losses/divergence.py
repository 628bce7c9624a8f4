"""The divergences that the losses use: how far the student is from its target.

They are computed in float32 (float64 stays float64), on valid tokens alone: padding affects neither
value nor gradient, and a batch without a valid token gives 0 with zero gradients. No gradient flows
into the target. Logits are read in chunks of rows, with their gradient (`sum_over_rows`): beside
both, a large vocabulary takes hardly any memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from capdistill.outputs import places

CHUNK = {"cpu": 2**16}  # least numbers in a chunk: what the cache of a CPU holds ...
LARGE_CHUNK = 2**20  # ... and fewer, larger kernels on any other device
CHUNKS = 64  # at most; a chunk takes a few times its size while it is computed


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) of the softened distributions.

    An entry with teacher probability 0 adds nothing: a logit of -inf in the teacher, or in both
    models, is ignored. With -inf in the student alone, the divergence is infinite, as defined.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
        >>> teacher[..., 0] = 2.0
        >>> round(float(kl_divergence(student, teacher, torch.tensor([[True, False]]))), 4)
        0.4744

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        mask: (B, T) True where a token is real.
        temperature: T > 0; both logits are divided by it. The sum is not scaled by T².

    Raises:
        ValueError: the mask does not fit the logits.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """

    def part(student: Tensor, teacher: Tensor) -> Part:
        mine, theirs = (F.log_softmax(each.div_(temperature), -1) for each in (student, teacher))
        return _kl(mine, theirs), lambda: (mine.exp() - theirs.exp_()).div_(temperature)

    return sum_over_rows(part, mask, student_logits, teacher_logits)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (..., C), summed over everything."""
    weight = teacher.exp()
    gap = (teacher - student).masked_fill_(weight == 0, 0)  # 0 * inf would be nan
    return (weight * gap).sum()


def reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over valid tokens of KL(student || teacher) of the softened distributions.

    An entry with student probability 0 adds nothing; -inf in the teacher alone makes it infinite.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)
        >>> teacher[..., 0] = 2.0
        >>> round(float(reverse_kl_divergence(student, teacher, torch.tensor([[True]]))), 4)
        0.4232

    The arguments are those of `kl_divergence`.

    Source:
        Gu et al. (2024), MiniLLM, section 2.
    """

    def part(student: Tensor, teacher: Tensor) -> Part:
        mine, theirs = (F.log_softmax(each.div_(temperature), -1) for each in (student, teacher))
        weight = mine.exp()
        gap = mine.sub_(theirs).masked_fill_(weight == 0, 0)
        return (weight * gap).sum(), lambda: _slope(weight, gap).div_(temperature)

    return sum_over_rows(part, mask, student_logits, teacher_logits)


def _slope(weight: Tensor, gap: Tensor) -> Tensor:
    """The gradient of sum(weight * gap) on the logits whose softmax is `weight` (n, V).

    It is that of a fixed gap: the derivatives of the logarithms in the gap add up to that of
    sum(weight), which is 1.
    """
    return weight * (gap - (weight * gap).sum(-1, keepdim=True))


def jensen_shannon_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over valid tokens of the generalised Jensen-Shannon divergence.

    For 0 < beta < 1 it is beta KL(teacher || M) + (1 - beta) KL(student || M), where
    M = beta teacher + (1 - beta) student. It is bounded, also where one model gives probability 0.
    Divided by beta, it approaches KL(teacher || student) for beta -> 0; divided by 1 - beta,
    KL(student || teacher) for beta -> 1. With beta = 0 and 1 the result is that limit.

    Example:
        >>> student, teacher = torch.tensor([[[0.0, 1e4]]]), torch.tensor([[[1e4, 0.0]]])
        >>> one = torch.tensor([[True]])
        >>> round(float(jensen_shannon_divergence(student, teacher, one)), 4)  # log 2
        0.6931

    Args:
        student_logits, teacher_logits, mask, temperature: As in `kl_divergence`.
        beta: Share of the teacher in M, in [0, 1].

    Source:
        Agarwal et al. (2024), On-Policy Distillation of Language Models, section 2.
    """
    if beta in (0.0, 1.0):
        limit = kl_divergence if beta == 0 else reverse_kl_divergence
        return limit(student_logits, teacher_logits, mask, temperature)

    def part(student: Tensor, teacher: Tensor) -> Part:
        mine, theirs = (each.div_(temperature).softmax(-1) for each in (student, teacher))
        tiny = torch.finfo(mine.dtype).tiny  # 0 * log 0 would be nan
        mixed = theirs.lerp(mine, 1 - beta).clamp_(min=tiny)
        gap = (mine / mixed).clamp_(min=tiny).log_()
        of_teacher = (theirs * (theirs / mixed).clamp_(min=tiny).log_()).sum()
        total = (1 - beta) * (mine * gap).sum() + beta * of_teacher
        return total, lambda: _slope(mine, gap).mul_((1 - beta) / temperature)

    return sum_over_rows(part, mask, student_logits, teacher_logits)


def decoupled_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over valid tokens of alpha TCKD + beta NCKD.

    TCKD is the KL divergence of (target, all others), two probabilities; NCKD that of the
    distributions over the others, renormalised. KL(teacher || student) = TCKD + (1 - p) NCKD, where
    p is the teacher's probability of the target.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 3), torch.tensor([[[2.0, 0.0, 0.0]]])
        >>> target, one = torch.tensor([[0]]), torch.tensor([[True]])
        >>> float(decoupled_divergence(student, teacher, target, one, alpha=0.0))
        0.0

    Args:
        student_logits, teacher_logits, mask, temperature: As in `kl_divergence`.
        targets: (B, T) ids; those outside the mask are never read.
        alpha: Factor of the target term.
        beta: Factor of the term of the other entries.

    Source:
        Zhao et al. (2022), Decoupled Knowledge Distillation, section 3.
    """

    def value(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        mine, theirs = (_split(each / temperature, targets) for each in (student, teacher))
        target_term, other_term = map(_kl, mine, theirs)
        return alpha * target_term + beta * other_term

    index = targets[..., None]
    return sum_over_rows(by_autograd(value), mask, student_logits, teacher_logits, index)


def _split(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, 2) of an entry and all others, and (n, V) among the others."""
    others = logits.scatter(-1, index, -torch.inf)
    top = others.detach().amax(-1, keepdim=True).clamp(min=-1e30)  # -inf - -inf would be nan
    others = others - top
    rest = others.logsumexp(-1, keepdim=True).clamp(min=-1e30)
    odds = logits.gather(-1, index) - top - rest  # log(p / (1 - p)), exact also for p near 1
    return F.logsigmoid(torch.cat([odds, -odds], -1)), others - rest


def top_k_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    k: int,
    temperature: float = 1.0,
    bucket: bool = True,
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) on the teacher's k most probable entries.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 5), torch.tensor([[[2.0, 1.0, 0.0, 0.0, 0.0]]])
        >>> one = torch.tensor([[True]])
        >>> found = [top_k_divergence(student, teacher, one, k) for k in (2, 5)]
        >>> [round(float(each), 4) for each in found]  # the last three are equal
        [0.3711, 0.3711]

    Args:
        student_logits, teacher_logits, mask, temperature: As in `kl_divergence`.
        k: Number of entries; with all V it is `kl_divergence`.
        bucket: Whether the other entries are one more entry, with their whole probability.
            Otherwise they are left out, and both distributions are renormalised over the k.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """
    if k >= teacher_logits.shape[-1]:
        return kl_divergence(student_logits, teacher_logits, mask, temperature)

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        index = teacher.topk(k, sorted=False).indices  # (n, k)
        mine, theirs = (_entries(e / temperature, index, bucket) for e in (student, teacher))
        return _kl(mine, theirs)

    return sum_over_rows(by_autograd(value), mask, student_logits, teacher_logits)


def _entries(logits: Tensor, index: Tensor, bucket: bool) -> Tensor:
    """Log-probabilities (n, k) of the chosen entries, or (n, k + 1) with that of all others."""
    chosen = logits.gather(-1, index)
    if bucket:
        rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, rest], -1)
    return F.log_softmax(chosen, -1)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over valid tokens of the cross-entropy with the target ids.

    Example:
        >>> logits, targets = torch.zeros(1, 2, 4), torch.tensor([[3, 0]])
        >>> round(float(cross_entropy(logits, targets, torch.tensor([[True, False]]))), 4)
        1.3863

    Args:
        logits: (B, T, V).
        targets: (B, T) ids; those outside the mask are never read.
        mask: (B, T) True where a token is real.
        label_smoothing: Share in [0, 1] of each target spread evenly over all V entries.
        weights: (B,) factors of the captions; None is 1 for each.

    Raises:
        ValueError: the mask does not fit the logits.

    Source:
        `torch.nn.functional.cross_entropy`; Szegedy et al. (2016), section 7, for the smoothing.
    """

    def part(rows: Tensor, goals: Tensor, *factors: Tensor) -> Part:
        log_probs = F.log_softmax(rows, -1)
        each = F.nll_loss(log_probs, goals, reduction="none")
        if label_smoothing:
            each = (1 - label_smoothing) * each - label_smoothing * log_probs.mean(-1)

        def slope() -> Tensor:
            found = log_probs.exp_().sub_(label_smoothing / rows.shape[-1])
            share = torch.full_like(each[:, None], label_smoothing - 1)
            found.scatter_add_(-1, goals[:, None], share)
            return found.mul_(factors[0][:, None]) if factors else found

        return (each * factors[0] if factors else each).sum(), slope

    others = () if weights is None else (weights[:, None].expand(mask.shape),)
    return sum_over_rows(part, mask, logits, targets, *others)


def valid_rows(values: Tensor, mask: Tensor) -> Tensor:
    """The vectors of the valid tokens, (n, W), in full precision.

    Example:
        >>> valid_rows(torch.eye(2)[None].half(), torch.tensor([[False, True]]))
        tensor([[0., 1.]])

    Args:
        values: (B, T, W) of any floating type.
        mask: (B, T) True where a token is real.

    Raises:
        ValueError: the mask does not fit.
    """
    return full(values.flatten(0, -2).index_select(0, _index(values, mask)))


def _index(values: Tensor, mask: Tensor) -> Tensor:
    """The valid rows of values (B, T, W), (n,), once B and T are one dimension."""
    if mask.shape != values.shape[:-1]:
        raise ValueError(
            f"The mask is {tuple(mask.shape)} but the values are {tuple(values.shape)}; "
            f"the mask must be {tuple(values.shape[:-1])}. Use `batch.target_mask`."
        )
    return places(mask)


Part = tuple[Tensor, Callable[[], Tensor]]  # a sum over rows, its gradient on those of the logits


def sum_over_rows(
    part: Callable[..., Part], mask: Tensor, logits: Tensor, *others: Tensor
) -> Tensor:
    """The sum of a function over the valid rows, computed chunk by chunk.

    The gradient is computed with the value and is all that is kept for the backward pass; in fp16,
    where it could underflow before it is scaled, it is computed later. It has no derivative itself.

    Example:
        >>> logits = torch.ones(1, 2, 3, requires_grad=True)
        >>> mask = torch.tensor([[True, False]])
        >>> sum_over_rows(lambda x: (x.square().sum(), lambda: 2 * x), mask, logits).backward()
        >>> logits.grad.tolist()
        [[[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]]

    Args:
        part: Takes rows (n, V) of the logits and of each of `others`, as copies in full precision.
            Returns a sum over them, and a function of its gradient on the rows of the logits.
        mask: (B, T) True where a token is real.
        logits: (B, T, V).
        others: (B, T, ...) tensors that get no gradient.

    Raises:
        ValueError: the mask does not fit.
    """
    least = CHUNK.get(logits.device.type, LARGE_CHUNK)
    size = max(least, logits.numel() // CHUNKS) // max(logits.shape[-1], 1)
    chunks = torch.split(_index(logits, mask), max(size, 1))
    rows = [each.detach().flatten(0, mask.ndim - 1) for each in others]
    return _SumOverRows.apply(part, chunks, logits, *rows)  # type: ignore


def by_autograd(value: Callable[..., Tensor]) -> Callable[..., Part]:
    """A function for `sum_over_rows` whose gradient autograd finds.

    Example:
        >>> total, slope = by_autograd(lambda x: x.square().sum())(torch.ones(2))
        >>> slope()
        tensor([2., 2.])
    """

    def part(rows: Tensor, *others: Tensor) -> Part:
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            total = value(rows, *others)
        return total.detach(), lambda: torch.autograd.grad(total, rows)[0]

    return part


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Any, chunks: Any, logits: Tensor, *others: Tensor) -> Tensor:
        ctx.part, ctx.chunks = part, chunks
        ctx.save_for_backward(logits, *others)
        keep = ctx.needs_input_grad[2] and logits.dtype != torch.float16
        total, ctx.gradient = _sum_and_gradient(part, chunks, logits, others, keep)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None  # changed here: a kept graph computes it again
        if gradient is None:
            gradient = _sum_and_gradient(ctx.part, ctx.chunks, logits, others, True, factor)[1]
        else:
            gradient.mul_(factor)
        return None, None, gradient, *(None for _ in others)


def _sum_and_gradient(
    part: Callable[..., Part],
    chunks: tuple[Tensor, ...],
    logits: Tensor,
    others: Sequence[Tensor],
    wanted: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum over chunks and, if wanted, gradient * factor; no view, as autograd adds to it."""
    rows = (logits.flatten(0, -2), *others)
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if wanted else None

    def add(chunk: Tensor) -> Tensor:  # what it allocates is free again for the next chunk
        chosen = [each.index_select(0, chunk) for each in rows]
        total, slope = part(*(full(c) if c.is_floating_point() else c for c in chosen))
        if gradient is not None:
            found = slope() if factor is None else slope() * factor
            gradient.view_as(rows[0]).index_copy_(0, chunk, found.to(gradient.dtype))
        return total

    return torch.stack([add(chunk) for chunk in chunks]).sum(), gradient


def full(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned without a copy.

    Example:
        >>> full(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values if values.dtype == torch.float64 else values.float()
