"""A folder of images: with their captions in a CSV or JSON Lines file, or without captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from capdistill.data.caption_files import (
    DataReport,
    Policy,
    Problem,
    Row,
    image_name,
    lines,
    parse_json,
    read_text,
    split_fields,
)
from capdistill.data.dataset import CaptionData, Example, require_some, to_examples
from capdistill.data.image_names import image_finder, images_below
from capdistill.errors import DataError, shortened
from capdistill.files import user_path

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
    "captions.json",
)


class Folder(CaptionData):
    """Images of a folder, captioned by a file with an image column and a caption column.

    CSV: the first row names the columns (`image` and `caption`, or usual synonyms, in any order);
    comma, semicolon, tab or bar; quotes and line breaks within quotes as spreadsheets write them.
    JSON Lines (`.jsonl`): one object per row with the same names; the caption may be a list.
    JSON (`.json`): a list of such objects.

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
        root: The folder. Names in the file are relative to it, to `root/images` or `root/Images`;
            they may lack the suffix, or be numbers without leading zeros, if one file matches.
        captions: The caption file, relative to root; by default `captions.csv` or a usual name.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.
        encoding: The encoding of the caption file.

    Raises:
        DataError: the file is missing, its columns are unknown, or nothing can be used.
    """

    def __init__(
        self,
        root: str | Path,
        captions: str | Path | None = None,
        *,
        errors: Policy = "skip",
        encoding: str = "utf-8",
    ) -> None:
        folder, report = user_path(root, DataError), DataReport(errors)
        path = _caption_file(folder, captions)
        text = read_text(path, encoding)
        read = _READERS.get(path.suffix.lower(), separated_rows)
        find = image_finder(folder, folder / "images", folder / "Images")
        examples = list(to_examples(read(path, text, report), str(path), find, report).values())
        require_some(examples, str(path), report, f"Images were looked for in {folder}.")
        super().__init__(examples, name=folder.name or str(folder), report=report)


class Images(CaptionData):
    """Images without captions, for losses that read images alone, such as "feature".

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "summer").mkdir()
        >>> for name in ("cat.jpg", "summer/dog.jpg"):
        ...     Image.new("RGB", (8, 8)).save(root / name)
        >>> data = Images(root)
        >>> data.image_ids, data.captions
        (('cat.jpg', 'summer/dog.jpg'), [])

    Args:
        source: A folder, of which all images are taken, also those in its folders (hidden files
            and folders are left out); or the paths of image files. An image's id is its path below
            the folder, or its path as it was given.

    Raises:
        DataError: no such folder, no image, or a path given twice.
    """

    def __init__(self, source: str | Path | Iterable[str | Path]) -> None:
        if isinstance(source, (str, Path)):
            root = user_path(source, DataError)
            if not root.is_dir():
                raise DataError(
                    f"Images: {root} is not a folder. Give a folder, or a list of files."
                )
            name = root.name or str(root)
            found = [(path.relative_to(root).as_posix(), path) for path in images_below(root)]
            if not found:
                raise DataError(f"Images: {name} holds no image file. Give a folder with images.")
        elif isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
            raise DataError(
                f"Images: {type(source).__name__} was given. Give a folder, or a list of files."
            )
        else:
            name, found = "images", [(str(path), user_path(path, DataError)) for path in source]
            if not found:
                raise DataError("Images: the list holds no image file. Give some, or a folder.")
        super().__init__((Example.unlabelled(*each) for each in found), name=name)


def _caption_file(folder: Path, given: str | Path | None) -> Path:
    if given is not None:
        return folder / user_path(given, DataError)
    for name in _USUAL:
        if os.path.isfile(folder / name):
            return folder / name
    if not folder.is_dir():
        raise DataError(f"Folder: {folder} is not a folder. Give the folder that holds the images.")
    raise DataError(
        f"Folder: {folder} holds none of {', '.join(_USUAL)}. Name the caption file with "
        "captions='...'."
    )


def separated_rows(path: Path, text: str, report: DataReport) -> Iterator[Row]:
    """Rows of a CSV file whose first row names the columns.

    An unquoted caption with commas is kept whole if there are just two columns. With more columns
    its row is reported, because the comma could belong to any of them.

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
    """Rows of a JSON Lines file. The caption may be a list."""
    for number, line in lines(text):
        place = f"row {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            reason = f"{shortened(line)} is not JSON ({error})"
            report.add(Problem("malformed row", str(path), place, reason))
            continue
        yield from _entry_rows(path, place, entry, report)


def json_list_rows(path: Path, text: str, report: DataReport) -> Iterator[Row]:
    """Rows of a JSON file that holds a list of objects. The caption may be a list.

    Raises:
        DataError: it is not JSON, or holds something else.
    """
    content = parse_json(text, str(path))
    if not isinstance(content, list):
        held = f"the keys {list(content)[:8]}" if isinstance(content, dict) else shortened(content)
        raise DataError(
            f"{path} holds {held}; expected a list of objects with an image and a caption. Files "
            "of COCO and Karpathy are read by cd.data.CocoCaptions and cd.data.Karpathy."
        )
    for number, entry in enumerate(content):
        yield from _entry_rows(path, f"[{number}]", entry, report)


_READERS = {".jsonl": json_rows, ".ndjson": json_rows, ".json": json_list_rows}


def _entry_rows(path: Path, place: str, entry: Any, report: DataReport) -> Iterator[Row]:
    fields = entry if isinstance(entry, dict) else {}
    image = image_name(next((fields[name] for name in IMAGE_COLUMNS if name in fields), None))
    captions = [fields[name] for name in CAPTION_COLUMNS if name in fields][:1]
    if image is None or not captions:
        reason = f"{shortened(entry)} is not an object with an image and a caption"
        report.add(Problem("malformed row", str(path), place, reason))
    elif captions == [[]]:
        report.add(Problem("empty caption", str(path), place, image))
    else:
        several = captions[0] if isinstance(captions[0], list) else captions
        yield from (Row(image, caption, place) for caption in several)
