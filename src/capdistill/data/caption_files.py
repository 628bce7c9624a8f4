"""Caption files and their rows, validation of captions, and the report of skipped data.

A row ends at \\n or \\r\\n and nowhere else (`str.splitlines` would also cut captions at U+2028,
\\x85, \\x0c or \\x1c), and nothing depends on the locale.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from capdistill.errors import ConfigError, DataError, text_problem
from capdistill.files import user_path

MAX_BYTES = 2**30  # caption files are read whole; COCO's largest has 0.15 GB


Policy = Literal["skip", "raise"]

# Harmless: every copy of the official Flickr8k file has the first, and a header row is no caption.
TOLERATED = frozenset({"phantom row", "header row"})
_SHOWN = 20
FIX = "Fix it, or pass errors='skip' to leave it out."


@dataclass(frozen=True)
class Problem:
    """A part of the data that cannot be used, and its location.

    Example:
        >>> print(Problem("empty caption", "captions.csv", "row 4", "dog.jpg"))
        captions.csv, row 4: empty caption (dog.jpg)

    Args:
        kind: What is wrong, such as "missing image", "corrupt image" or "empty caption".
        file: The file in question, or the item of a data set.
        place: The row or entry within the file, or "".
        detail: The image or the reason.
    """

    kind: str
    file: str
    place: str = ""
    detail: str = ""

    def __str__(self) -> str:
        where = f"{self.file}, {self.place}" if self.place else self.file
        return f"{where}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(repr=False)
class DataReport:
    """The problems found so far, each listed once.

    Example:
        >>> report = DataReport()
        >>> report.add(Problem("missing image", "captions.csv", "row 2", "cat.jpg"))
        >>> print(report)
        1 problem: 1 missing image
          captions.csv, row 2: missing image (cat.jpg)

    Args:
        errors: "skip" collects the problems; "raise" raises the first one as an error.
        problems: The problems in the order in which they were found.
    """

    errors: Policy = "skip"
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.errors not in ("skip", "raise"):
            raise ConfigError(f"errors={self.errors!r} was given; use errors='skip' or 'raise'.")
        self._seen = set(self.problems)

    def add(self, problem: Problem) -> None:
        """Add a problem, or raise it if the policy is "raise".

        Raises:
            DataError: the policy is "raise" and the problem is not harmless.
        """
        if self.errors == "raise" and problem.kind not in TOLERATED:
            raise DataError(f"{problem}. {FIX}")
        if problem not in self._seen:
            self._seen.add(problem)
            self.problems.append(problem)

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> number of problems."""
        return dict(Counter(problem.kind for problem in self.problems))

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def summary(self) -> str:
        """One line: the number of problems of each kind."""
        if not self.problems:
            return "no problems"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{pluralize(len(self), 'problem')}: {kinds}"

    def __str__(self) -> str:
        shown = [self.summary(), *(f"  {problem}" for problem in self.problems[:_SHOWN])]
        if len(self) > _SHOWN:
            shown.append(f"  ... and {len(self) - _SHOWN} more (see .problems)")
        return "\n".join(shown)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary()}>"


def pluralize(count: int, noun: str) -> str:
    """A count and its noun, in the singular for 1.

    Example:
        >>> pluralize(1, "image"), pluralize(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


class Row(NamedTuple):
    """A caption as a file holds it: the name of its image, the caption, and its place.

    JSON can hold anything under the key of a caption, so the caption is checked later.
    """

    image: str
    caption: object
    place: str


MISSING = frozenset({"None", "nan", "NaN", "null", "NULL", "<NA>"})  # printed by pandas and others


def caption_problem(value: object) -> tuple[str, str] | None:
    """(kind, reason) why a value is not a caption; None if it is one.

    Every caption passes here: from a file, a data set, an `Example`. A caption is text. None, NaN,
    a number, a list or an object is not, nor is one of them printed into a string.

    Example:
        >>> caption_problem("A dog runs .") is None
        True
        >>> print(*caption_problem("['a dog', 'a cat']"), sep=": ")
        invalid caption: "['a dog', 'a cat']" (a list printed into a string)
        >>> caption_problem("nan"), caption_problem("  ")
        (('invalid caption', "'nan' (a missing value)"), ('empty caption', 'white space only'))

    Args:
        value: A caption as it was read or given.
    """
    reason = text_problem(value)
    if not reason and str(value).strip() in MISSING:
        reason = f"{value!r} (a missing value)"
    if reason:
        return "invalid caption", reason
    return None if str(value).strip() else ("empty caption", "white space only")


def require_caption(value: object, where: str) -> str:
    """Return a caption, or raise if it is not one.

    Example:
        >>> require_caption(None, "train: a caption of image '7'")
        Traceback (most recent call last):
        ...
        capdistill.errors.DataError: train: a caption of image '7' is None (NoneType); expected \
text.

    Args:
        value: A caption as it was given.
        where: Description of the caption; the error begins with it.

    Raises:
        DataError: it is not text, or blank.
    """
    problem = caption_problem(value)
    if problem:
        raise DataError(f"{where} is {problem[1]}; expected text.")
    return str(value)


def usable_captions(
    values: Iterable[object], report: DataReport, file: str, place: str, image: str
) -> list[str]:
    """The captions among some values, each on one line. What is none is reported.

    Example:
        >>> report = DataReport()
        >>> usable_captions(["a dog", None, " "], report, "captions.json", "row 4", "dog.jpg")
        ['a dog']
        >>> report.counts
        {'invalid caption': 1, 'empty caption': 1}

    Args:
        values: Captions as they were read.
        report: Where problems go.
        file, place: Where the values come from, for the report.
        image: The id of their image.
    """
    found = []
    for value in values:
        problem = caption_problem(value)
        if problem is None:
            found.append(clean(str(value)))
            continue
        detail = image if problem[0] == "empty caption" else f"{image}: {problem[1]}"
        report.add(Problem(problem[0], file, place, detail))
    return found


def clean(caption: str) -> str:
    """The raw caption on one line: line breaks become spaces, all other characters stay.

    Example:
        >>> clean("first line\\r\\nsecond line ")
        'first line second line'
    """
    return re.sub(r"[\r\n]+", " ", caption).strip()


def image_name(value: object) -> str | None:
    """The name or id of an image as a string; a whole number is one; None for anything else.

    Example:
        >>> image_name("dog.jpg"), image_name(12), image_name(12.0), image_name(None)
        ('dog.jpg', '12', '12', None)
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of ids with a gap into floats
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole or (isinstance(value, str) and value.strip()) else None


_PACKED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"\xd0\xcf\x11\xe0": "a spreadsheet",
}


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The whole file as text, without a byte-order mark.

    A mark of UTF-16 decides where UTF-8 was expected: no text in UTF-8 begins with it.

    Raises:
        DataError: the file cannot be read, is too large, or is not in that encoding; the message
            names the row.
    """
    data = read_bytes(path)
    try:
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        utf8 = marked and codecs.lookup(encoding).name == "utf-8"
        return data.decode("utf-16" if utf8 else encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        packed = next((kind for start, kind in _PACKED.items() if data.startswith(start)), None)
        if packed is not None:
            raise DataError(f"{path} is {packed}, not text. Unpack or export it first.") from error
        row = data.count(b"\n", 0, error.start) + 1
        given = data[error.start : error.start + 1].hex()
        raise DataError(
            f"{path}, row {row}: byte 0x{given} is not {encoding}. Save the file as UTF-8, or, if "
            "it is not JSON, name its encoding: encoding='cp1252' (Windows) or 'latin-1'."
        ) from error
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"encoding={encoding!r} is unknown to Python; try 'utf-8'.") from error


def read_bytes(path: Path) -> bytes:
    """The whole file, bounded in size.

    Raises:
        DataError: the file cannot be read, or is too large.
    """
    path = user_path(path, DataError)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes; a caption file may have {MAX_BYTES:,}.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, row) of every row that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def split_fields(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""(row number, fields) of comma-separated text, quotes and quoted line breaks understood.

    A quote that opens a field and never closes it properly is an ordinary character, so that one
    stray quote cannot swallow the rows below it.

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
        DataError: it cannot be read or is not JSON; the message names the line.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """JSON text; `where` names it in the error.

    Raises:
        DataError: it is not JSON, or an object has a key twice, of which JSON would keep the last.
    """
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        line = getattr(error, "lineno", 1)
        raise DataError(f"{where} is not JSON (line {line}: {error}).") from error


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise DataError(f"{where}: an object has the key '{twice}' twice. Give each key once.")
    return found


def read_lists(path: Path, *keys: str, form: str) -> dict[str, list[Any]]:
    """The lists that a JSON file holds under the given keys.

    Raises:
        DataError: the file is not a JSON object with those lists; the message names its content.
    """
    content = read_json(path)
    held = list(content)[:8] if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise DataError(f"{path}: not a {form} file; expected the lists {keys}, found {held}.")
    return {key: content[key] for key in keys}


def json_entries(
    rows: list[Any], key: str, needs: tuple[str, ...], file: Path, report: DataReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of every entry that is an object with these fields; others are reported."""
    for number, entry in enumerate(rows):
        place = f"{key}[{number}]"
        missing = [n for n in needs if n not in entry] if isinstance(entry, dict) else list(needs)
        if missing:
            report.add(Problem("malformed row", str(file), place, f"no {', '.join(missing)}"))
        else:
            yield place, entry
