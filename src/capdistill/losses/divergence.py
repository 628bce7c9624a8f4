"""The divergences that the losses use: how far the student is from its target.

All are computed in float32 (float64 stays float64). Token-level divergences first select the valid
tokens (`valid_rows`), so padding affects neither the value nor the gradient, and a batch without a
valid token gives 0 with zero gradients. No gradient flows into the target.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-4  # lower bound on the length or standard deviation of a vector


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) of the softened distributions.

    An entry with teacher probability 0 adds nothing, whatever the student gives it: a logit of -inf
    in the teacher, or in both models, is ignored. With -inf in the student alone, the divergence is
    infinite, as the definition requires.

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
    student = F.log_softmax(valid_rows(student_logits, mask) / temperature, -1)  # (n, V)
    with torch.no_grad():
        teacher = F.log_softmax(valid_rows(teacher_logits, mask) / temperature, -1)  # (n, V)
    return _kl(student, teacher)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (..., C), summed over everything."""
    weight = teacher.exp()
    gap = (teacher - student).masked_fill_(weight == 0, 0)  # 0 * inf would be nan
    return (weight * gap).sum()


def reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over valid tokens of KL(student || teacher) of the softened distributions.

    An entry with student probability 0 adds nothing. With -inf in the teacher alone, the divergence
    is infinite.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)
        >>> teacher[..., 0] = 2.0
        >>> round(float(reverse_kl_divergence(student, teacher, torch.tensor([[True]]))), 4)
        0.4232

    The arguments are those of `kl_divergence`.

    Source:
        Gu et al. (2024), MiniLLM, section 2.
    """
    student = F.log_softmax(valid_rows(student_logits, mask) / temperature, -1)  # (n, V)
    weight = student.exp()
    with torch.no_grad():  # the derivatives of the logarithm add up to that of sum(weight) = 1
        teacher = F.log_softmax(valid_rows(teacher_logits, mask) / temperature, -1)  # (n, V)
        gap = (student - teacher).masked_fill_(weight == 0, 0)
    return (weight * gap).sum()


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
    student = (valid_rows(student_logits, mask) / temperature).softmax(-1)  # (n, V)
    with torch.no_grad():  # as in `reverse_kl_divergence`; the derivatives of log M cancel, too
        teacher = (valid_rows(teacher_logits, mask) / temperature).softmax(-1)  # (n, V)
        tiny = torch.finfo(teacher.dtype).tiny  # 0 * log 0 would be nan
        mixed = teacher.lerp(student, 1 - beta).clamp_(min=tiny)
        fixed = (teacher * (teacher / mixed).clamp_(min=tiny).log_()).sum()
        gap = (student / mixed).clamp_(min=tiny).log_()
    return (1 - beta) * (student * gap).sum() + beta * fixed


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
    index = targets[mask][:, None]  # (n, 1)
    student = _split(valid_rows(student_logits, mask) / temperature, index)
    with torch.no_grad():
        teacher = _split(valid_rows(teacher_logits, mask) / temperature, index)
    target_term, other_term = map(_kl, student, teacher)
    return alpha * target_term + beta * other_term


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
    rows = valid_rows(student_logits, mask) / temperature  # (n, V)
    with torch.no_grad():
        targets = valid_rows(teacher_logits, mask) / temperature
        index = targets.topk(k, sorted=False).indices  # (n, k)
        teacher = _entries(targets, index, bucket)
    return _kl(_entries(rows, index, bucket), teacher)


def _entries(logits: Tensor, index: Tensor, bucket: bool) -> Tensor:
    """Log-probabilities (n, k) of the chosen entries, or (n, k + 1) with that of all others."""
    chosen = logits.gather(-1, index)
    if bucket:
        rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, rest], -1)
    return F.log_softmax(chosen, -1)


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of vectors of weights >= 0, which are made to add up to 1.

    First 1e-4 is added to every weight. This bounds the gradient where the student's weight is 0,
    and vectors of zeros become uniform.

    Example:
        >>> attention_divergence(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.25, 0.75]])) < 1e-6
        tensor([True])

    Arguments and result are those of `squared_distance`.
    """
    mine, theirs = (full(each) + SHORTEST for each in (student, teacher.detach()))
    mine, theirs = (each / each.sum(-1, keepdim=True) for each in (mine, theirs))
    return (theirs * (theirs.log() - mine.log())).sum(-1)


def correlation_distance(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """1 - Pearson's correlation along a dimension of non-negative values, in [0, 2].

    Where the teacher does not vary there is nothing to match: the distance is 0. A standard
    deviation below 1e-4 of the mean counts as none; one of the student as 1e-4 of the mean.

    Example:
        >>> x = torch.tensor([[0.1, 0.2, 0.7]])
        >>> bool(correlation_distance(x, 3 * x) < 1e-6), correlation_distance(x, 0 * x)
        (True, tensor([0.]))

    Args:
        student, teacher: Probabilities, of one shape.
        dim: The dimension that the result lacks.

    Source:
        Huang et al. (2022), DIST; `torch.corrcoef`.
    """
    mine, _ = _standardised(full(student), dim)
    theirs, varies = _standardised(full(teacher.detach()), dim)
    size = max(student.shape[dim], 1)
    return (1 - (mine * theirs).sum(dim) / size).masked_fill(~varies, 0)


def _standardised(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Deviations from the mean over their standard deviation, and whether that is large enough."""
    size = max(x.shape[dim], 1)
    mean = x.sum(dim, keepdim=True) / size
    scale = mean.detach().clamp(min=1e-30)  # the squares of small probabilities would underflow
    centred = (x - mean) / scale
    variance = centred.square().sum(dim, keepdim=True) / size
    varies = variance.detach().squeeze(dim) > SHORTEST**2
    return centred * variance.clamp(min=SHORTEST**2).rsqrt(), varies


def huber_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's distance with delta = 1, entry by entry; `torch.nn.functional.huber_loss`.

    Example:
        >>> huber_distance(torch.tensor([0.5, 3.0]), torch.zeros(2))
        tensor([0.1250, 2.5000])
    """
    return F.huber_loss(full(student), full(teacher.detach()), reduction="none")


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
    rows, goals = valid_rows(logits, mask), targets[mask]  # (n, V), (n,)
    if weights is None:
        return F.cross_entropy(rows, goals, reduction="sum", label_smoothing=label_smoothing)
    each = F.cross_entropy(rows, goals, reduction="none", label_smoothing=label_smoothing)
    return (each * weights[:, None].expand(mask.shape)[mask]).sum()


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, averaged over the width.

    Example:
        >>> squared_distance(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor([5.])

    Args:
        student: (..., D), the valid vectors.
        teacher: (..., D).

    Returns:
        (...) one value per vector.

    Source:
        `torch.nn.functional.mse_loss`.
    """
    return (full(student) - full(teacher.detach())).square().mean(-1)


def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`squared_distance` of the layer-normalised vectors (without an affine part).

    The result does not depend on scale and offset of a vector. A standard deviation below 1e-4
    (over the width) is treated as 1e-4, which bounds the gradient of a constant vector.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> bool(normalised_distance(1e-3 * x, x) < 1e-9)
        True

    Arguments and result are those of `squared_distance`.

    Source:
        Ba, Kiros, Hinton (2016); `torch.nn.functional.layer_norm`.
    """
    return squared_distance(_layer_normed(full(student)), _layer_normed(full(teacher.detach())))


def _layer_normed(x: Tensor) -> Tensor:
    """`layer_norm` with a lower bound instead of an epsilon, which would depend on the scale."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * variance.clamp(min=SHORTEST**2).rsqrt()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, in [0, 2].

    A vector shorter than 1e-4 is treated as having that length. A zero vector then has distance 1
    and a bounded gradient.

    Example:
        >>> cosine_distance(torch.eye(2), torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
        tensor([1., 0.])

    Arguments and result are those of `squared_distance`.

    Source:
        `torch.nn.functional.cosine_similarity`.
    """
    cosine = F.cosine_similarity(full(student), full(teacher.detach()), dim=-1, eps=SHORTEST)
    return 1 - cosine


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
    if mask.shape != values.shape[:-1]:
        raise ValueError(
            f"The mask is {tuple(mask.shape)} but the values are {tuple(values.shape)}; "
            f"the mask must be {tuple(values.shape[:-1])}. Use `batch.target_mask`."
        )
    index = mask.flatten().nonzero().squeeze(1)  # (n,)
    return full(values.flatten(0, -2).index_select(0, index))


def full(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned without a copy.

    Example:
        >>> full(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values if values.dtype == torch.float64 else values.float()
