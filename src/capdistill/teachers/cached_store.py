"""The files of cached targets: arrays that grow row by row, and the index of their rows.

A row is appended to the arrays first and to the index afterwards, so what the index lists is
complete whenever the writer was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from capdistill.data.dataset import CaptionData
from capdistill.data.image_keys import image_contents
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.files import append_bytes, from_json, json_checksum, lock, read_manifest, write_text
from capdistill.saving import TARGETS

FORMAT, INDEX = "capdistill.targets/1", "index.jsonl"
DTYPES = (".float16", ".float32", ".uint16", ".int32")  # the endings of the arrays' files


class Column(NamedTuple):
    """An array on disk, with one row per target token or per image and view.

    Args:
        name: Name of its file.
        dtype: NumPy's name of the type.
        width: Values per row.
        per: What has a row.
    """

    name: str
    dtype: str
    width: int
    per: Literal["token", "image"] = "token"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * np.dtype(self.dtype).itemsize

    def file(self, directory: Path) -> Path:
        """Where it is."""
        return directory / f"{self.name}.{self.dtype}"


@dataclass(frozen=True)
class Line:
    """A line of the index: captions of an image, each in the same views.

    Args:
        image_id: The id of the image.
        content: Hash of its file; "" if it has none.
        captions: The texts.
        lengths: Target tokens of each.
        tokens: First row of the first caption, for each view; the others follow it.
        images: The row of the image, for each view.
        error: Why it could not be read; it then has no rows.
    """

    image_id: str
    content: str = ""
    captions: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    error: str | None = None

    def text(self) -> str:
        """The line as JSON, with a checksum."""
        content = asdict(self)
        return json.dumps({**content, "checksum": json_checksum(content)}) + "\n"

    @classmethod
    def parse(cls, text: bytes) -> Line:
        """The line of a text; TypeError, ValueError or KeyError if it is none."""
        values = {**from_json(text)}
        if values.pop("checksum", None) not in (None, json_checksum(values)):
            raise ValueError("its checksum is wrong")
        values.pop("size", None)  # of an earlier version
        line = cls(**values)
        numbers = [*line.lengths, *line.tokens, *line.images]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("a number is no whole number >= 0")
        texts = [line.image_id, line.content, *line.captions]
        if not all(type(text) is str for text in texts) or len(line.captions) != len(line.lengths):
            raise TypeError("captions and lengths do not fit")
        if len(line.tokens) != len(line.images):
            raise TypeError("views of tokens and images differ")
        return line

    def ends(self) -> tuple[int, int]:
        """The first token row and the first image row behind it."""
        block = sum(self.lengths)
        return max(self.tokens, default=-block) + block, max(self.images, default=-1) + 1


class Entry(NamedTuple):
    """Where the targets of an image are: first rows per view, and each caption's within them."""

    tokens: list[int]
    images: list[int]
    captions: dict[str, tuple[int, int]]  # offset, length


class Index:
    """Image id, view and caption -> rows.

    Example:
        >>> index = Index([Line("a", "f3", ["dog", "cat"], [2, 3], tokens=[0, 5], images=[0, 1])])
        >>> index.rows("a", 1, "cat"), index.has("a", ["dog"], views=2), index.rows("a", 0, "cow")
        ((7, 3), True, None)
    """

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.entries: dict[str, list[Entry]] = {}
        self.contents: dict[str, str] = {}  # of images whose content is known
        self.errors: dict[str, str] = {}
        self.ends = (0, 0)  # rows of tokens, rows of images
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Take a line; it hides what earlier ones say of the same captions."""
        if line.error is not None:
            self.errors[line.image_id] = line.error
            return
        self.errors.pop(line.image_id, None)
        self.contents |= {line.image_id: line.content} if line.content else {}
        offsets = np.cumsum([0, *line.lengths]).tolist()
        places = zip(offsets, line.lengths, strict=False)
        entry = Entry(line.tokens, line.images, dict(zip(line.captions, places, strict=True)))
        self.entries.setdefault(line.image_id, []).insert(0, entry)
        tokens, images = line.ends()
        self.ends = max(self.ends[0], tokens), max(self.ends[1], images)

    def rows(self, image_id: str, view: int, caption: str) -> tuple[int, int] | None:
        """First row and number of rows of a caption's tokens; None if it is not there."""
        for entry in self.entries.get(image_id, ()):
            place = entry.captions.get(caption)
            if place is not None and view < len(entry.tokens):
                return entry.tokens[view] + place[0], place[1]
        return None

    def image_row(self, image_id: str, view: int) -> int | None:
        """The row of an image."""
        entries = self.entries.get(image_id, ())
        return next((each.images[view] for each in entries if view < len(each.images)), None)

    def has(self, image_id: str, captions: Iterable[str], views: int) -> bool:
        """Whether all these captions are there, in views 0 to `views` - 1."""
        if self.image_row(image_id, views - 1) is None:
            return False
        return all(self.rows(image_id, views - 1, caption) for caption in captions)


@dataclass(frozen=True)
class Block:
    """The targets of a batch of images, to be added; their rows stand view by view.

    Args:
        wanted: A line of each, with the captions, but without rows.
        lengths: Target tokens (I, k) of each caption; 0 behind the last of an image.
        views: Views of each image.
        arrays: By name.
    """

    wanted: Sequence[Line]
    lengths: Sequence[Sequence[int]]
    views: int
    arrays: dict[str, np.ndarray[Any, Any]]

    def lines(self, ends: tuple[int, int]) -> list[Line]:
        """The lines of the index.

        Args:
            ends: Rows of tokens and of images that are there before.
        """
        token, image = ends
        per_view = sum(map(sum, self.lengths))
        lines = []
        for line, counts in zip(self.wanted, self.lengths, strict=True):
            tokens = [token + view * per_view for view in range(self.views)]
            images = [image + view * len(self.wanted) for view in range(self.views)]
            lengths = [*counts[: len(line.captions)]]
            lines.append(replace(line, lengths=lengths, tokens=tokens, images=images))
            token, image = token + sum(counts), image + 1
        return lines


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
        for name, column in self.columns.items():
            if name in arrays:
                values = np.ascontiguousarray(arrays[name], dtype=column.dtype)
                append_bytes(column.file(self.directory), values.tobytes())
        append_bytes(self.directory / INDEX, "".join(line.text() for line in lines).encode())
        for line in lines:
            self.index.add(line)

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
                f"({type(error).__name__}: {error}). Cache the targets anew, with overwrite=True."
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
                path.unlink()  # who reads it now keeps it
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
