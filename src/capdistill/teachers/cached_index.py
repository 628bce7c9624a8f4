"""The index of cached targets: which rows of which array belong to an image, a view, a caption."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from capdistill.files import from_json, json_checksum


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
        checks: Name of an array -> checksums of the rows of each view; none in an earlier version.
    """

    image_id: str
    content: str = ""
    captions: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    error: str | None = None
    checks: dict[str, list[int]] = field(default_factory=dict)

    def text(self) -> str:
        """The line as JSON, with a checksum."""
        content = asdict(self)
        return json.dumps({**content, "checksum": json_checksum(content)}) + "\n"

    @classmethod
    def parse(cls, text: bytes) -> Line:
        """The line that `text` gave.

        Raises:
            TypeError, ValueError, KeyError: it is none.
        """
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
        if not isinstance(line.checks, dict) or any(
            type(c) is not list for c in line.checks.values()
        ):
            raise TypeError("checks is no object of lists")
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
    checks: dict[str, list[int]]

    def place(self, column: Column, view: int) -> slice:
        """The rows of an array that belong to a view."""
        if column.per == "image":
            return slice(self.images[view], self.images[view] + 1)
        length = max((offset + count for offset, count in self.captions.values()), default=0)
        return slice(self.tokens[view], self.tokens[view] + length)


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
        captions = dict(zip(line.captions, places, strict=True))
        entry = Entry(line.tokens, line.images, captions, line.checks)
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


def with_checks(
    lines: Sequence[Line],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    columns: Mapping[str, Column],
    ends: tuple[int, int],
) -> list[Line]:
    """The lines with checksums of their rows.

    Args:
        lines: Their rows are in the arrays.
        arrays: By name; those that are added.
        columns: What the arrays are.
        ends: Rows of tokens and of images that are there before.
    """
    found = []
    for line in lines:
        checks: dict[str, list[int]] = {}
        for name, values in arrays.items():
            whole = columns[name].per == "image"
            before, count = (ends[1], 1) if whole else (ends[0], sum(line.lengths))
            firsts = [first - before for first in (line.images if whole else line.tokens)]
            checks[name] = [zlib.crc32(values[at : at + count].tobytes()) for at in firsts]
        found.append(replace(line, checks=checks))
    return found
