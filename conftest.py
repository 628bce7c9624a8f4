"""What tests and the examples of docstrings share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def scratch() -> Iterator[None]:
    """What the suite caches, and its temporary files, do not outlive it.

    Their directory has a short name: the sockets of worker processes are made in it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_CACHE_HOME", f"{folder}/caches")
        patch.setenv("TMPDIR", folder)  # of child processes
        patch.setattr(tempfile, "tempdir", folder)
        yield
