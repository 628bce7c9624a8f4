from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capdistill.encoders.timm import TimmEncoder


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    """Random (count, 3, side, side) uint8 images, the same at every call."""

    def make(side: int, count: int = 2) -> Tensor:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=chance)

    return make


@pytest.fixture
def tiny_cnn() -> Callable[..., TimmEncoder]:
    """A random test_efficientnet of 64 x 64 pixels: 2 x 2 tokens of width 256."""

    def make(**options: object) -> TimmEncoder:
        return TimmEncoder("test_efficientnet", **{"weights": False, "image_size": 64, **options})

    return make


@pytest.fixture
def tiny_vit() -> Callable[..., TimmEncoder]:
    """A random test_vit of 64 x 64 pixels: CLS and 4 x 4 tokens of width 64."""

    def make(**options: object) -> TimmEncoder:
        return TimmEncoder("test_vit", **{"weights": False, "image_size": 64, **options})

    return make


@pytest.fixture(scope="session")
def shared_weights(shared: Callable[[str], Path]) -> Path:
    """The folder of real weights, or a skip."""
    return shared("weights")
