"""The states of the random generators that a process shares."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Drawn(NamedTuple):
    """Where Python's, NumPy's and torch's generators are, here and on CUDA devices."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]


def drawn() -> Drawn:
    """Where the generators are now: cheap enough for every step."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return Drawn(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def random_state(where: Drawn | None = None) -> dict[str, Any]:
    """The states of the generators as plain data, now or at an earlier moment."""
    where = drawn() if where is None else where
    version, words, gauss = where.python
    name, keys, *rest = where.numpy
    return {
        "torch": where.torch,
        "cuda": where.cuda,
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *map(float, rest)],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Continue drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
