"""What tests of every folder share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests import elsewhere

BESIDE = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Make the simulated device known before torch counts devices, at the first backward pass."""
    if not torch.cuda.is_available():
        with suppress(ImportError):  # this torch cannot have one: its tests are skipped
            elsewhere.register()


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/flickr8k")` is that path in the data beside the repository, or a skip.

    Tests that use it have the marker `shared`.
    """
    root = Path(os.environ.get("CAPDISTILL_SHARED", BESIDE))

    def find(path: str) -> Path:
        if not (root / path).exists():
            pytest.skip(f"{root / path} is absent: set CAPDISTILL_SHARED to the folder of the data")
        return root / path

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the data `shared`; refuse ids that change with the process.

    pytest-xdist runs a test by its id, so an object's address must not be part of it.
    """
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError("give these cases fixed ids:\n" + "\n".join(unstable))
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
