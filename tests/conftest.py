"""What tests of every folder share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the suite caches stays out of the user's cache directory, and does not outlive it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


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
