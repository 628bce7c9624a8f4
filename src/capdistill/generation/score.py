"""How hypotheses are ranked: normalised by length, ties broken the same way everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from capdistill.generation.config import GenerationConfig


def penalty(config: GenerationConfig, length: int) -> float:
    """What the sum of log-probabilities of `length` tokens (the end counted) is divided by.

    Example:
        >>> penalty(GenerationConfig(length_normalisation="gnmt", length_penalty=2.0), 7)
        4.0
    """
    if config.length_normalisation == "none":
        return 1.0
    base = length if config.length_normalisation == "average" else (5 + length) / 6
    return float(base**config.length_penalty)


def bound(config: GenerationConfig, length: int, longest: int) -> float:
    """The divisor with which an open beam of `length` tokens is compared to those kept.

    A sum only falls, so that no continuation does better than today's sum divided by the largest
    divisor that is still to come.
    """
    if config.early_stopping != "never":
        return penalty(config, length)
    return max(penalty(config, min(length + 1, longest)), penalty(config, longest))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first; of equal ones the smaller index.

    Example:
        >>> best(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), 3)
        (tensor([[2., 2., 1.]]), tensor([[1, 3, 0]]))

    Args:
        scores: (J, M), not NaN.
        count: How many; where M is smaller, -inf of index 0 fill up.

    Returns:
        (J, count) values and indices.
    """
    if scores.shape[1] <= count:
        missing = count - scores.shape[1]
        values, index = scores.sort(dim=1, descending=True, stable=True)
        filled = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        return filled, torch.nn.functional.pad(index, (0, missing))
    if scores.device.type == "cpu":
        return _best_or_sorted(scores, count)
    if scores.dtype == torch.float32:
        index = _keys(scores).topk(count).indices
        return scores.gather(1, index), index
    return _sorted(scores, count)


def _sorted(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def _best_or_sorted(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` is free to choose among equals; where there are any, sort."""
    values, index = scores.topk(count + 1)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    if bool(tied.any()):
        return _sorted(scores, count)
    return values[:, :count], index[:, :count]


def _keys(scores: Tensor) -> Tensor:
    """Distinct int64 in the order of float32 scores, then of falling index: nothing is tied."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - torch.arange(scores.shape[1], device=scores.device)
