"""Atomic writes: a reader, or a killed writer, never sees half a file. Also what JSON can hold."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capdistill.errors import ConfigError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "new", "a.txt")
        ...     write_atomically(file, lambda temporary: temporary.write_text("whole"))
        ...     file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)

    Args:
        path: The file; its directory is made where there is none.
        write: Given the temporary path, writes all content to it.

    Raises:
        ConfigError: the directory cannot be written (read-only, full, or a file); what stood
            at `path` stays as it was, as it does whatever else `write` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # with the permissions of any new file
        try:
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Give a directory that exists or "
            "can be made, is writable and has space; files written earlier were left as they are."
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, line ends as they are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/a.txt", "one\\n")
        ...     Path(folder, "a.txt").read_bytes()
        b'one\\n'

    Raises:
        ConfigError: as `write_atomically`.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def finite_or_none(value: Any) -> Any:
    """The same content for JSON, with None for NaN and infinity, which JSON cannot hold.

    Example:
        >>> finite_or_none({"loss": float("nan"), "rates": (0.1, float("inf"))})
        {'loss': None, 'rates': [0.1, None]}

    Args:
        value: Mappings, lists and tuples of any depth; keys become strings, tuples lists.
    """
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
