"""How tokens are chosen from scores: the stable top k, and sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from capdistill.generation.config import GenerationConfig


def stable_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first; of equal ones the smaller index.

    Example:
        >>> stable_topk(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), 3)
        (tensor([[2., 2., 1.]]), tensor([[1, 3, 0]]))

    Args:
        scores: (J, M), not NaN.
        count: Number of values; if M is smaller, the rest is -inf with index 0.

    Returns:
        (J, count) values and indices.
    """
    if scores.shape[1] <= count:
        missing = count - scores.shape[1]
        values, index = scores.sort(dim=1, descending=True, stable=True)
        filled = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        return filled, torch.nn.functional.pad(index, (0, missing))
    if scores.device.type == "cpu":
        return _topk_unless_tied(scores, count)
    return _by_value_and_place(scores, count)


def _by_value_and_place(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if scores.dtype == torch.float32:
        index = _keys(scores).topk(count).indices
        return scores.gather(1, index), index
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def _topk_unless_tied(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` breaks ties arbitrarily; if there are ties, the place decides."""
    values, index = scores.topk(count + 1)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    if bool(tied.any()):
        return _by_value_and_place(scores, count)
    return values[:, :count], index[:, :count]


def _keys(scores: Tensor) -> Tensor:
    """Distinct int64 in the order of float32 scores, then of falling index: nothing is tied."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - torch.arange(scores.shape[1], device=scores.device)


_GAMMA, _MIX_1, _MIX_2 = (
    0x9E3779B97F4A7C15 - 2**64,
    0xBF58476D1CE4E5B9 - 2**64,
    0x94D049BB133111EB - 2**64,
)


def warp(log_probs: Tensor, config: GenerationConfig) -> Tensor:
    """Log-probabilities (R, V) to logits to draw from: temperature, then top-k, then top-p.

    Example:
        >>> warp(torch.tensor([[0.5, 0.3, 0.2]]).log(), GenerationConfig(top_k=2)).softmax(-1)
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    logits = log_probs / config.temperature
    if config.top_k:
        least = logits.topk(min(config.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        rising, order = logits.sort(dim=1, stable=True)
        drop = rising.softmax(-1).cumsum(-1) <= 1 - config.top_p
        drop[:, -1] = False  # the most probable word stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One id per row, (R,), by inverting the distribution (R, V) at `uniform` (R,), in [0, 1).

    Example:
        >>> draw(torch.tensor([[0.2, 0.3, 0.5]]).log().expand(3, 3), torch.tensor([0.1, 0.4, 0.9]))
        tensor([0, 1, 2])
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (R, V)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return found.clamp_(max=logits.shape[1] - 1)  # a NaN or rounding leads beyond the last


def uniforms(keys: Tensor, seed: int, position: int) -> Tensor:
    """Random numbers in [0, 1), float64, as a function of key, seed and position.

    No state is kept, so the result does not depend on the batch or the device.

    Args:
        keys: int64, one for each number.
        seed: Seed of the sampling.
        position: Position of the word in the caption.

    Source:
        The output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    seed = (seed + 2**63) % 2**64 - 2**63  # to an int64
    place = torch.full_like(keys, position + 1) * _GAMMA
    mixed = _mix(keys + _mix(torch.full_like(keys, seed)) + place)
    return _shift(mixed, 12).double() * 2.0**-52


def row_keys(keys: Tensor, count: int) -> Tensor:
    """(J,) keys of images to (J, count) of the captions drawn for them."""
    return _mix(keys[:, None] + _GAMMA * torch.arange(1, count + 1, device=keys.device))


def image_keys(images: Iterable[str | bytes]) -> Tensor:
    """An int64 for each image, computed from its id or its pixels."""
    contents = (i.encode("utf-8", "surrogatepass") if isinstance(i, str) else i for i in images)
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])


def _mix(x: Tensor) -> Tensor:
    """SplitMix64; int64 arithmetic wraps, as it requires."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
