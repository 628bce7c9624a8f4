"""The files of cached features: where they lie, what they hold, which of them are complete.

A cache is three files: the values, one row per image; an index; and, until it is complete, a byte
per image that marks which rows are done. A cache that is not complete is continued there.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from capdistill.errors import ConfigError
from capdistill.files import from_json, lock, remove_abandoned, user_path

FORMAT = "capdistill.features/2"
HASHES = "image-hashes.json"  # of image files: place -> [hash, stamp]
MISSING, DONE, UNREADABLE = 0, 1, 2  # marks
SECONDS = 10.0  # of work that a killed process may lose
_FILE = re.compile(r"[0-9a-f]{32}\.(fp16|bf16|f16|json|done)")

CacheType: TypeAlias = Literal["fp16", "bf16"]


def default_cache_dir() -> Path:
    """The default directory of cached features, in the user's cache directory.

    Raises:
        ConfigError: there is no home directory.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        known = root and os.path.isabs(root)  # the standard says to ignore a relative one
        home = Path(root or "") if known else Path.home() / ".cache"
    except RuntimeError as error:  # HOME is not set and the user has no entry
        raise ConfigError(
            "Cached features need a directory, but this user has no home directory. Give "
            "cache_dir=, or set cache_features=False."
        ) from error
    return home / "capdistill" / "features"


def read_index(path: Path) -> dict[str, Any]:
    """The index of a cache; empty if there is none that can be read."""
    try:
        index = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) and index.get("format") == FORMAT else {}


def marks_file(path: Path) -> Path:
    """The file of the marks beside that of the values."""
    return path.with_suffix(".done")


def kind_of(path: Path) -> str:
    """The type of the values in a file: "fp16" or "bf16"."""
    return path.suffix[1:]


class CacheFiles:
    """The values and the marks of a cache that is not complete; several processes may write it."""

    def __init__(self, path: Path, images: int, shape: tuple[int, ...]) -> None:
        self.path, self.images, self.shape = path, images, shape
        self.row_bytes = 2 * math.prod(shape)
        self.pending: list[tuple[int, bytes]] = []
        self.flushed = time.monotonic()
        size = images * self.row_bytes
        if not path.exists() or path.stat().st_size != size:
            _require_space(path.parent, size)
        with open(path, "ab") as values, open(marks_file(path), "ab") as done:
            lock(values)  # others may be here for the same reason
            if os.fstat(values.fileno()).st_size != size:
                done.truncate(0)  # of other values
                values.truncate(size)
            done.truncate(images)
        self.values = path.open("r+b")  # buffered: it completes a write or raises
        self.done = marks_file(path).open("r+b", buffering=0)  # sees the marks of others

    def marks(self) -> np.ndarray[Any, Any]:
        """One of `MISSING`, `DONE`, `UNREADABLE` per image."""
        self.done.seek(0)
        return np.frombuffer(self.done.read(), np.uint8)

    def write(
        self, row: int, values: np.ndarray[Any, Any] | None, marks: np.ndarray[Any, Any]
    ) -> None:
        """Write consecutive rows; they are marked as done once they are safely on the disk."""
        if values is not None:
            self.values.seek(row * self.row_bytes)
            self.values.write(values.data)
        self.pending.append((row, marks.tobytes()))
        if time.monotonic() - self.flushed >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring the rows written so far to the disk, then mark them."""
        self.values.flush()
        os.fsync(self.values.fileno())
        for row, marks in self.pending:
            self.done.seek(row)
            self.done.write(marks)
        self.pending.clear()
        self.flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close both files."""
        with self.values, self.done:
            self.flush()

    def remove(self) -> None:
        """Close and remove all files of the cache."""
        self.close()
        for file in (self.path, marks_file(self.path), self.path.with_suffix(".json")):
            file.unlink(missing_ok=True)


def _require_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ConfigError(
            f"Cached features need {size / 1e6:,.1f} MB, but {directory} has {free / 1e6:,.1f} MB "
            "left. Set cache_dir= to a directory on a larger disk, or cache_features=False."
        )


@dataclass(frozen=True)
class CacheEntry:
    """A cache of features in a directory.

    Args:
        path: The file of the values.
        encoder, data: Names; "" in a cache without an index.
        images: Images that it holds or is meant to hold.
        done: Images whose values are there.
        bytes: Bytes on the disk of all its files.
    """

    path: Path
    encoder: str
    data: str
    images: int
    done: int
    bytes: int


def list_caches(directory: str | os.PathLike[str] | None = None) -> list[CacheEntry]:
    """The caches in a directory, complete or not, the oldest first.

    Example:
        >>> import tempfile
        >>> list_caches(tempfile.mkdtemp())
        []

    Args:
        directory: By default that of the user.

    Raises:
        ConfigError: a directory was given that does not exist.
    """
    folder = _cache_folder(directory)
    names = sorted({path.stem for path in _cache_files(folder)})
    found = [_entry(folder, name) for name in names]
    return sorted(found, key=lambda entry: _time(entry.path))


def clear_caches(directory: str | os.PathLike[str] | None = None) -> int:
    """Remove all caches in a directory, and the remembered hashes. Other files stay.

    Args:
        directory: By default that of the user.

    Returns:
        The number of bytes that were freed.

    Raises:
        ConfigError: they cannot be removed, or a directory was given that does not exist.
    """
    folder = _cache_folder(directory)
    files = [*_cache_files(folder), *folder.glob(HASHES)]
    freed = sum(_disk_bytes(file) for file in files)
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot remove {error.filename}: {error.strerror}. Give a cache_dir= that is writable."
        ) from error
    remove_abandoned(folder)
    return freed


def _cache_folder(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was given, which must exist; by default that of the user."""
    if directory is None:
        return default_cache_dir()
    folder = user_path(directory)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: there is no such directory. Expected the cache_dir of a run; without one, "
            "the caches of the user are meant."
        )
    return folder


def _cache_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.*") if _FILE.fullmatch(path.name)]


def _entry(folder: Path, name: str) -> CacheEntry:
    files = [path for path in _cache_files(folder) if path.stem == name]
    values = next((path for path in files if path.suffix not in (".json", ".done")), files[0])
    index = read_index(values.with_suffix(".json"))
    images = len(index.get("image_ids", ()))
    done = images if index.get("complete") else 0
    marks = marks_file(values)
    if not done and marks.exists():
        done = int(np.count_nonzero(np.frombuffer(marks.read_bytes(), np.uint8)))
    encoder, data = (str(index.get(key, "")) for key in ("encoder", "data"))
    return CacheEntry(values, encoder, data, images, done, sum(map(_disk_bytes, files)))


def _disk_bytes(path: Path) -> int:
    """Bytes that a file takes on the disk, where the system tells: rows not written take none."""
    try:
        status = path.stat()
    except OSError:
        return 0
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
