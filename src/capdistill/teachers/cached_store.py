"""The files of cached targets: arrays that grow row by row, beside the index of their rows.

A row is appended to the arrays first and to the index afterwards, so what the index lists is
complete whenever the writer was killed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from capdistill.data.dataset import CaptionData
from capdistill.data.image_keys import image_contents
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.files import lock, read_manifest, write_text
from capdistill.saving import TARGETS
from capdistill.teachers.cached_index import Block, Column, Index, Line, with_checks

FORMAT = "capdistill.targets/1"
INDEX = "index.jsonl"
DTYPES = (".float16", ".float32", ".uint16", ".int32")  # the endings of the arrays' files


class Store:
    """A directory of cached targets.

    Args:
        directory: Holds targets.json, the index and the arrays.
        cut: Remove what a killed writer left incomplete. Only within `locked`.

    Attributes:
        content: What targets.json says: "about", whatever the targets depend on, and more.
        columns: The arrays by name.
        index: Their rows.

    Raises:
        CheckpointError: there are no such files, or they are damaged.
    """

    def __init__(self, directory: Path, cut: bool = False) -> None:
        self.directory = directory
        self.content = read_content(directory)
        self.columns = {c[0]: Column(*c) for c in self.content["columns"]}
        lines, whole = _read_lines(directory / INDEX, self._whole_rows)
        self.index = Index(lines)
        self._whole: set[tuple[str, int]] = set()  # images and views that were compared
        if cut:
            self._cut(whole)

    def require_unchanged(self, data: CaptionData, progress: bool = False) -> dict[str, str]:
        """Check that images are those whose targets are here.

        Returns:
            The hash of each image that has a file.

        Raises:
            DataError: the content of an image is another one.
        """
        contents = image_contents(data.examples, self.directory, progress)
        known = self.index.contents
        changed = [name for name, now in contents.items() if known.get(name, now) != now]
        if changed:
            raise DataError(
                f"{len(changed)} of {len(data)} images of {data.name}, such as '{changed[0]}', are "
                f"not those whose targets are in {self.directory}: their content differs. Give the "
                "images that were cached; or cache these, in another directory or with "
                "overwrite=True."
            )
        return contents

    def _whole_rows(self) -> tuple[int, int]:
        """Rows of tokens and of images that every array has."""
        found: dict[str, int] = {"token": 2**62, "image": 2**62}
        for column in self.columns.values():
            path = column.file(self.directory)
            size = path.stat().st_size if path.exists() else 0
            found[column.per] = min(found[column.per], size // column.row_bytes)
        return found["token"], found["image"]

    def _cut(self, index_bytes: int) -> None:
        os.truncate(self.directory / INDEX, index_bytes)
        for column in self.columns.values():
            rows = self.index.ends[0 if column.per == "token" else 1]
            path = column.file(self.directory)
            path.touch()
            os.truncate(path, rows * column.row_bytes)

    def add(self, block: Block) -> None:
        """Add the targets of a batch. Only within `locked`."""
        self.append(block.lines(self.index.ends), block.arrays)

    def append(self, lines: Sequence[Line], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Add rows to the arrays, then the lines that list them. Only within `locked`."""
        stored = {
            name: np.ascontiguousarray(arrays[name], dtype=column.dtype)
            for name, column in self.columns.items()
            if name in arrays
        }
        lines = with_checks(lines, stored, self.columns, self.index.ends)
        for name, values in stored.items():
            append_bytes(self.columns[name].file(self.directory), values.tobytes())
        append_bytes(self.directory / INDEX, "".join(line.text() for line in lines).encode())
        for line in lines:
            self.index.add(line)

    def require_whole(
        self, image_id: str, view: int, read: Callable[[str], np.ndarray[Any, Any]]
    ) -> None:
        """Compare the rows of an image in a view with their checksums, the first time.

        Args:
            image_id: The image.
            view: The view.
            read: Gives an array by its name.

        Raises:
            DataError: they are damaged.
        """
        if (image_id, view) in self._whole:
            return
        for entry in self.index.entries.get(image_id, ()):
            for name, checks in entry.checks.items():
                column = self.columns.get(name)
                if column is None or view >= len(checks):
                    continue
                rows = read(name)[entry.place(column, view)]
                if zlib.crc32(rows.tobytes()) != checks[view]:
                    raise DataError(
                        f"{column.file(self.directory)} is damaged where it holds image "
                        f"'{image_id}', view {view}. Remove the directory; cache the targets anew."
                    )
        self._whole.add((image_id, view))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The memory map of an array, (rows, width)."""
        column = self.columns[name]
        rows = self.index.ends[0 if column.per == "token" else 1]
        if not rows:
            return np.zeros((0, column.width), column.dtype)
        path = column.file(self.directory)
        return np.asarray(np.memmap(path, column.dtype, "r", shape=(rows, column.width)))


def _read_lines(path: Path, whole_rows: Callable[[], tuple[int, int]]) -> tuple[list[Line], int]:
    """The lines of an index up to the first that is not complete, and the bytes that they take."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    tokens, images = whole_rows()  # behind the index, whose lines are written after the rows
    lines: list[Line] = []
    size = 0
    for text in data.splitlines(keepends=True):
        if not text.endswith(b"\n"):
            break  # the writer was killed
        try:
            line = Line.parse(text)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}, line {len(lines) + 1} is not one that teachers.cache wrote "
                f"({type(error).__name__}: {error}). Remove the directory; cache the targets anew."
            ) from error
        token_end, image_end = line.ends()
        if token_end > tokens or image_end > images:
            break
        lines.append(line)
        size += len(text)
    return lines, size


def read_content(directory: Path) -> dict[str, Any]:
    """What targets.json holds.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format.
    """

    def check(content: dict[str, Any]) -> None:
        for each in content["columns"]:
            column = Column(*each)
            if [type(part) for part in column] != [str, str, int, str]:
                raise ValueError(f"column {each!r}")
            file = column.file(directory)
            if file.parent != directory or file.suffix not in DTYPES or column.row_bytes < 1:
                raise ValueError(f"column {column.name!r}")
        about, spec = content["about"], content["spec"]
        bytes.fromhex(about["weights of the teacher"])
        sizes = [about["image_size"], spec["prefix_tokens"], *(spec["grid"] or (0, 0))]
        sizes += [spec[name] or 0 for name in ("feature_dim", "tokens")]
        if not all(type(size) is int and size >= 0 for size in sizes) or len(sizes) != 6:
            raise ValueError("a size is no whole number")
        if not all(type(each) is float for each in about["temperatures"]):
            raise ValueError("a temperature is no number")
        if type(about["flip"]) is not bool or type(content["name"]) is not str:
            raise ValueError("flip or name has another type")

    writer = "capdistill.teachers.cache"
    return read_manifest(directory / TARGETS, FORMAT, "cached targets", writer, check)


def append_bytes(path: Path, data: bytes) -> None:
    """Add bytes to a file; they are on the disk when the function returns."""
    with open(path, "ab") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process at a time is inside the block; others wait for it.

    Raises:
        ConfigError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / INDEX, "ab") as stream:
            lock(stream)
            yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {directory}: {error.strerror or error}. Give a directory that exists or "
            "can be created, is writable and has space; what was written is kept, and the same "
            "call continues it."
        ) from error


def start(
    directory: Path, content: Mapping[str, Any], overwrite: bool, files: Mapping[str, Any]
) -> Store:
    """The store for these targets: a new one, or the one that is there, to be completed.

    Args:
        directory: Locked.
        content: "about" decides whether what is there may be kept.
        overwrite: Start anew, whatever is there.
        files: Name -> function that writes a further file.

    Raises:
        ConfigError: what is there was made differently; the message says how.
    """
    index = directory / INDEX
    rows = index.stat().st_size
    if (directory / TARGETS).exists() and rows and not overwrite:
        _require_same(directory, content["about"])
    elif rows and not overwrite:
        raise ConfigError(
            f"{directory} holds rows, but no {TARGETS}, which says how they were made. Give "
            "another directory, or overwrite=True to replace them."
        )
    else:
        os.truncate(index, 0)  # first: old rows must never stand beside a new description
        for path in directory.iterdir():
            if path.suffix in DTYPES:
                path.unlink()  # a process that has it open keeps it
        for name, write in files.items():
            write(directory / name)
        write_text(directory / TARGETS, json.dumps({"format": FORMAT, **content}, indent=2))
    return Store(directory, cut=True)


def _require_same(directory: Path, about: Mapping[str, Any]) -> None:
    try:
        before = read_content(directory)["about"]
    except CheckpointError as error:
        raise ConfigError(
            f"{error} Give another directory, or overwrite=True to replace what it holds."
        ) from error
    different = [key for key in {**about, **before} if about.get(key) != before.get(key)]
    if different:
        changes = ", ".join(_change(key, before.get(key), about.get(key)) for key in different)
        raise ConfigError(
            f"The targets in {directory} were made differently: {changes}. Give another directory, "
            "or overwrite=True to cache them anew."
        )


def _change(key: str, before: object, now: object) -> str:
    short = all(len(str(value)) < 40 for value in (before, now))
    return f"{key} was {before!r} and is {now!r}" if short else f"other {key}"
