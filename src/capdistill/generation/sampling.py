"""Words by chance: what may be drawn, and draws that depend on the seed and the image alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from capdistill.generation.config import GenerationConfig

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
    """One id a row, (R,), by inverting the distribution (R, V) at `uniform` (R,), in [0, 1).

    Example:
        >>> draw(torch.tensor([[0.2, 0.3, 0.5]]).log().expand(3, 3), torch.tensor([0.1, 0.4, 0.9]))
        tensor([0, 1, 2])
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (R, V)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def uniforms(keys: Tensor, seed: int, position: int) -> Tensor:
    """Numbers in [0, 1), float64, that are a function of key, seed and position.

    No state is kept, so that neither the batch nor the device matters.

    Args:
        keys: int64, one for each number.
        seed: Of the run.
        position: Of the word in the caption.

    Source:
        The output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    place = torch.full_like(keys, position + 1) * _GAMMA
    mixed = _mix(keys + _mix(torch.full_like(keys, seed)) + place)
    return _shift(mixed, 12).double() * 2.0**-52


def row_keys(keys: Tensor, count: int) -> Tensor:
    """(J,) keys of images to (J, count) of the captions drawn for them."""
    return _mix(keys[:, None] + _GAMMA * torch.arange(1, count + 1, device=keys.device))


def image_keys(images: Iterable[bytes]) -> Tensor:
    """An int64 for each image, from what tells it from others: its id, or its pixels."""
    digests = (hashlib.blake2b(image, digest_size=8).digest() for image in images)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])


def _mix(x: Tensor) -> Tensor:
    """int64 arithmetic wraps, which is what SplitMix64 asks for."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
