"""A folder of images with their captions in a CSV or JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capdistill.data.caption_files import (
    DataReport,
    Policy,
    Problem,
    Row,
    lines,
    read_text,
    split_fields,
)
from capdistill.data.dataset import CaptionData, image_finder, require_some, to_examples
from capdistill.errors import DataError

IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "file", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "comment", "sentence", "raw")
_DELIMITERS = (",", ";", "\t", "|")
_USUAL = (
    "captions.csv",
    "captions.jsonl",
    "captions.tsv",
    "captions.txt",
    "metadata.csv",
    "metadata.jsonl",
)


class Folder(CaptionData):
    """Images of a folder, captioned by a file with an image column and a caption column.

    CSV: the first row names the columns (`image` and `caption`, or usual synonyms, in any order);
    comma, semicolon, tab or bar; quotes and line breaks within quotes as spreadsheets write them.
    JSON Lines (`.jsonl`): an object a row with the same names; the caption may be a list.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8)).save(root / "dog.jpg")
        >>> _ = (root / "captions.csv").write_text("image,caption\\ndog.jpg,A dog , running\\n")
        >>> data = Folder(root)
        >>> data.captions
        ['A dog , running']

    Args:
        root: The folder; names in the file are relative to it, to `root/images` or `root/Images`.
        captions: The caption file, relative to root; default `captions.csv` and its kin.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.
        encoding: How the caption file is encoded.

    Raises:
        DataError: the file is missing, its columns cannot be told, or nothing can be used.
    """

    def __init__(
        self,
        root: str | Path,
        captions: str | Path | None = None,
        *,
        errors: Policy = "skip",
        encoding: str = "utf-8",
    ) -> None:
        folder, report = Path(root), DataReport(errors)
        path = _caption_file(folder) if captions is None else folder / captions
        text = read_text(path, encoding)
        read = json_rows if path.suffix in (".jsonl", ".ndjson") else separated_rows
        find = image_finder(folder, folder / "images", folder / "Images")
        examples = list(to_examples(read(path, text, report), str(path), find, report).values())
        require_some(examples, str(path), report, f"Images were looked for in {folder}.")
        super().__init__(examples, name=folder.name or str(folder), report=report)


def _caption_file(folder: Path) -> Path:
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"Folder: {folder} {'holds' if folder.is_dir() else 'is no folder; expected one with'} "
        f"{'none of ' if folder.is_dir() else ''}{', '.join(_USUAL)}. Name the caption file with "
        "captions='...'."
    )


def separated_rows(path: Path, text: str, report: DataReport) -> Iterator[Row]:
    """Rows of a CSV file whose first row names the columns.

    A caption with commas and without quotes is kept whole where there are just two columns; with
    more columns its row is refused, since nobody can tell which column the comma belongs to.

    Raises:
        DataError: no delimiter gives an image and a caption column; the message lists the columns.
    """
    delimiter, image, caption, width = _columns(path, text)
    rows = split_fields(text, delimiter)
    next(rows)
    for number, fields in rows:
        place, extra = f"row {number}", len(fields) - width
        if extra < 0 or (extra and width > 2):
            reason = f"{len(fields)} columns, expected {width}; quote captions with {delimiter!r}"
            report.add(Problem("malformed row", str(path), place, reason))
            continue
        name = fields[image if image < caption else image + extra]
        whole = delimiter.join(fields[caption : caption + extra + 1])
        yield Row(name.strip(), whole, place)


def _columns(path: Path, text: str) -> tuple[str, int, int, int]:
    for delimiter in _DELIMITERS:
        _, header = next(split_fields(text, delimiter), (1, []))
        names = [name.strip().lower() for name in header]
        image, caption = _named(names, IMAGE_COLUMNS), _named(names, CAPTION_COLUMNS)
        if image is not None and caption is not None:
            return delimiter, image, caption, len(names)
    first = next((line for _, line in lines(text)), "")
    raise DataError(
        f"{path}, row 1: the columns found are {first[:120]!r}; expected an image column (one of "
        f"{', '.join(IMAGE_COLUMNS)}) and a caption column (one of {', '.join(CAPTION_COLUMNS)}), "
        "separated by comma, semicolon, tab or bar. Add such a first row."
    )


def _named(names: list[str], wanted: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def json_rows(path: Path, text: str, report: DataReport) -> Iterator[Row]:
    """Rows of a JSON Lines file; the caption may be a list."""
    for number, line in lines(text):
        place = f"row {number}"
        image, captions = _fields(line)
        if image is None or captions is None:
            reason = f"{line[:60]!r} is no object with an image and a caption"
            report.add(Problem("malformed row", str(path), place, reason))
            continue
        for caption in captions:
            yield Row(image, caption, place)


def _fields(line: str) -> tuple[str | None, list[str] | None]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None, None
    if not isinstance(entry, dict):
        return None, None
    image = next((entry[name] for name in IMAGE_COLUMNS if name in entry), None)
    caption: Any = next((entry[name] for name in CAPTION_COLUMNS if name in entry), None)
    several = caption if isinstance(caption, list) else [caption]
    if not isinstance(image, str) or not all(isinstance(text, str) for text in several):
        return None, None
    return image, several
