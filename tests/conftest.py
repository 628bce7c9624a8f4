"""What tests of every folder share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


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
    """`-m "not shared"` leaves out every test that uses the data, directly or by a fixture."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
