"""How tokens are chosen from scores, in NumPy; see `capdistill.generation.choice`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from capdistill.generation.config import GenerationConfig

Array: TypeAlias = npt.NDArray[Any]


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in float32.

    Example:
        >>> log_softmax(np.array([0.0, 0.0])).round(3).tolist()
        [-0.6930000185966492, -0.6930000185966492]
    """
    with np.errstate(invalid="ignore"):  # a row with an infinite logit becomes NaN
        shifted = logits.astype(np.float32, copy=False) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def falling(scores: Array) -> Array:
    """The indices that sort each row, largest first; of equal ones the smaller index."""
    return np.argsort(-scores, axis=1, kind="stable")


def stable_topk(scores: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of each row, largest first; of equal ones the smaller index.

    Example:
        >>> values, index = stable_topk(np.array([[1.0, 2.0, 1.0, 2.0]]), 3)
        >>> values.tolist(), index.tolist()
        ([[2.0, 2.0, 1.0]], [[1, 3, 0]])

    Args:
        scores: (J, M), not NaN.
        count: Number of values; if M is smaller, the rest is -inf with index 0.

    Returns:
        (J, count) values and indices.
    """
    rows, entries = scores.shape
    index = np.zeros((rows, count), np.int64)
    values = np.full((rows, count), -np.inf, scores.dtype)
    kept = min(count, entries)
    for row, each in enumerate(scores):
        least = np.partition(each, entries - kept)[entries - kept]
        candidates = np.flatnonzero(each >= least)  # rising: equal ones stay in order
        order = np.argsort(-each[candidates], kind="stable")[:kept]
        index[row, :kept] = candidates[order]
        values[row, :kept] = each[index[row, :kept]]
    return values, index


def warp(log_probs: Array, config: GenerationConfig) -> Array:
    """Log-probabilities (..., V) to logits to draw from: temperature, then top-k, then top-p.

    Example:
        >>> logits = warp(np.log(np.float32([0.5, 0.3, 0.2])), GenerationConfig(top_k=2))
        >>> np.exp(logits).round(1).tolist()
        [0.5, 0.30000001192092896, 0.0]
    """
    logits = log_probs / np.float32(config.temperature)
    if config.top_k:
        kept = min(config.top_k, logits.shape[-1])
        least = np.partition(logits, -kept, axis=-1)[..., -kept, None]
        logits = np.where(logits < least, np.float32(-np.inf), logits)
    if config.top_p < 1:
        order = np.argsort(logits, axis=-1, kind="stable")
        shares = np.exp(log_softmax(np.take_along_axis(logits, order, -1)))
        drop = shares.cumsum(-1, dtype=np.float64).astype(np.float32) <= np.float32(
            1 - config.top_p
        )
        drop[..., -1] = False  # the most probable word stays
        dropped = np.empty_like(drop)
        np.put_along_axis(dropped, order, drop, -1)
        logits = np.where(dropped, np.float32(-np.inf), logits)
    return np.asarray(logits)


def draw(logits: Array, uniform: Array) -> Array:
    """An id per row, by inverting the distribution (..., V) at `uniform` (...), in [0, 1).

    Example:
        >>> draw(np.log(np.array([[0.2, 0.3, 0.5]] * 3)), np.array([0.1, 0.4, 0.9])).tolist()
        [0, 1, 2]
    """
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(-1, keepdims=True))
    cumulative = (powers / powers.sum(-1, keepdims=True)).cumsum(-1)
    wanted = uniform[..., None] * cumulative[..., -1:]
    return np.asarray((cumulative <= wanted).sum(-1))


_GAMMA, _MIX_1, _MIX_2 = map(
    np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def uniforms(keys: Array, seed: int, position: int) -> Array:
    """Random numbers in [0, 1), as a function of key (uint64), seed and position.

    Source:
        SplitMix64, as `capdistill.generation.choice.uniforms`, with equal numbers.
    """
    place = np.full_like(keys, position + 1) * _GAMMA
    mixed = _mix(keys + _mix(np.full_like(keys, seed % 2**64)) + place)
    return np.asarray((mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52)


def row_keys(keys: Array, count: int) -> Array:
    """(J,) keys of images to (J, count) of the captions drawn for them."""
    numbers: Array = np.arange(1, count + 1).astype(np.uint64)
    return _mix(keys[:, None] + _GAMMA * numbers)


def image_keys(pixels: Iterable[Array]) -> Array:
    """A uint64 for each image, computed from its pixels."""
    digests = (hashlib.blake2b(each.tobytes(), digest_size=8).digest() for each in pixels)
    return np.array([int.from_bytes(each, "little") for each in digests], np.uint64)


def _mix(x: Array) -> Array:
    """SplitMix64; uint64 arithmetic wraps, as it requires."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return np.asarray(x ^ (x >> np.uint64(31)))
