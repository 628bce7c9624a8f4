"""Caption files as rows: encodings, row ends, separated values, JSON.

A row ends at \\n or \\r\\n and nowhere else (`str.splitlines` would also cut captions at U+2028,
\\x85, \\x0c or \\x1c), and nothing depends on the locale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capdistill.errors import ConfigError, DataError

MAX_BYTES = 2**30  # caption files are read whole; COCO's largest has 0.15 GB


class Row(NamedTuple):
    """A caption as it stands in a file: its image's name, the text, and where."""

    image: str
    caption: str
    place: str


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The whole file as text, without a byte-order mark.

    Raises:
        DataError: the file can not be read, is too large, or is not in that encoding; the message
            names the row.
    """
    data = read_bytes(path)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        given = data[error.start : error.start + 1].hex()
        raise DataError(
            f"{path}, row {row}: byte 0x{given} is not {encoding}. Say how the file is encoded, "
            "for example encoding='cp1252' (Windows), 'latin-1' or 'utf-16', or save it as UTF-8."
        ) from error
    except LookupError as error:
        raise ConfigError(f"encoding={encoding!r} is unknown to Python; try 'utf-8'.") from error


def read_bytes(path: Path) -> bytes:
    """The whole file, bounded in size."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes; a caption file may have {MAX_BYTES:,}.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror or error}.") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, row) of every row that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def clean(caption: str) -> str:
    """The raw caption on one line: line breaks are white space, other characters stay.

    Example:
        >>> clean("first line\\r\\nsecond line ")
        'first line second line'
    """
    return re.sub(r"[\r\n]+", " ", caption).strip()


def split_fields(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""(row number, fields) of comma-separated text, quotes and quoted line breaks understood.

    A quote that opens a field and never closes it properly is an ordinary character, so that one
    stray quote can not swallow the rows below it.

    Example:
        >>> list(split_fields('a,"say ""hi"", you"\nb,"stray', ","))
        [(1, ['a', 'say "hi", you']), (2, ['b', '"stray'])]
    """
    cell = _cell_pattern(delimiter)
    position, number, start, fields = 0, 1, 1, list[str]()
    while position < len(text):
        match = cell.match(text, position)
        assert match is not None  # the unquoted alternative matches anything
        quoted, plain, end = match.groups()
        fields.append(plain if quoted is None else quoted.replace('""', '"'))
        number += match[0].count("\n")
        position = match.end()
        if end != delimiter:
            if any(field.strip() for field in fields):
                yield start, fields
            start, fields = number, []
    if fields:
        yield start, [*fields, ""]  # the text ends with a delimiter


def _cell_pattern(delimiter: str) -> re.Pattern[str]:
    cut = re.escape(delimiter)
    quoted = r' *"([^"]*(?:""[^"]*)*)" *'
    plain = rf"([^{cut}\r\n]*(?:\r(?!\n)[^{cut}\r\n]*)*)"
    return re.compile(rf"(?:{quoted}|{plain})({cut}|\r?\n|\Z)")


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: it can not be read or is not JSON; the message names the line.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """JSON text; `where` names it in the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        line = getattr(error, "lineno", 1)
        raise DataError(f"{where} is not JSON (line {line}: {error}).") from error
