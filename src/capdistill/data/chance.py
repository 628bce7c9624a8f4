"""Chance as a function of what it is for, never of workers, ranks or the order of calls (law 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

SAFE_SEED = 2**63


def hashed(*key: object) -> int:
    """A number in [0, 2**63) that depends on the key alone, on every machine.

    Example:
        >>> hashed(0, "dog.jpg") == hashed(0, "dog.jpg") != hashed(1, "dog.jpg")
        True
    """
    digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SAFE_SEED


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone.

    Example:
        >>> a, b = (torch.rand(1, generator=generator(0, 3, "dog.jpg")) for _ in range(2))
        >>> bool(a == b)
        True
    """
    return torch.Generator().manual_seed(hashed(*key))


def choose(captions: Sequence[str], k: int, rng: torch.Generator | None = None) -> list[str]:
    """k captions, none twice before all are used; the first k where there is no generator.

    Example:
        >>> choose(["a", "b"], 3)
        ['a', 'b', 'a']
        >>> sorted(choose(["a", "b", "c"], 3, generator(0)))
        ['a', 'b', 'c']
    """
    chosen: list[str] = []
    while len(chosen) < k:
        order = range(len(captions)) if rng is None else _permutation(len(captions), rng)
        chosen += [captions[i] for i in order]
    return chosen[:k]


def _permutation(n: int, rng: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(n, generator=rng).tolist()
    return order
