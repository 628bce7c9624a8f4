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
        weight = teacher.exp()
    gap = (teacher - student).masked_fill_(weight == 0, 0)  # 0 * inf would be nan
    return (weight * gap).sum()


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

    Args:
        student: (..., D), the valid vectors.
        teacher: (..., D).

    Returns:
        (...) one value per vector.

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

    Args:
        student: (..., D), the valid vectors.
        teacher: (..., D).

    Returns:
        (...) one value per vector.

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
