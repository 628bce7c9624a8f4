"""Distances between vectors: features, hidden states, attention, correlations.

They are computed in float32 (float64 stays float64); no gradient flows into the target. Divergences
of next-token distributions are in `divergence.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.losses.divergence import full

SHORTEST = 1e-4  # lower bound on the length or standard deviation of a vector


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
    cosine = torch.cosine_similarity(full(student), full(teacher.detach()), dim=-1, eps=SHORTEST)
    return 1 - cosine


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


def huber_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's distance with delta = 1, entry by entry; `torch.nn.functional.huber_loss`.

    Example:
        >>> huber_distance(torch.tensor([0.5, 3.0]), torch.zeros(2))
        tensor([0.1250, 2.5000])
    """
    return F.huber_loss(full(student), full(teacher.detach()), reduction="none")


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
