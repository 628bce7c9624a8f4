"""Captions that another program wrote, such as those of a model behind an API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from capdistill.data.caption_files import (
    clean,
    image_name,
    lines,
    parse_json,
    read_json,
    read_text,
    require_caption,
)
from capdistill.data.dataset import CaptionData, Example
from capdistill.errors import DataError, shortened

Row = TypeVar("Row")
_IMAGE = ("image_id", "image", "file_name", "file", "id")
_TEXT = ("captions", "caption", "text")
_FORMS = (
    'Give JSON Lines of {"image": "dog.jpg", "caption": "a dog"} or "captions": [...]; one object '
    "{image: caption or captions}; COCO results, a list of {image_id, caption}; or a COCO file of "
    "images and annotations."
)


def read_texts(file: Path) -> dict[str, list[str]]:
    """The name or id of each image -> its captions, in the order of the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "api.jsonl")
        >>> _ = path.write_text('{"image": "dog.jpg", "caption": "a dog"}')
        >>> read_texts(path)
        {'dog.jpg': ['a dog']}

    Args:
        file: JSON Lines (any suffix but .json) or JSON.

    Raises:
        DataError: it cannot be read, is not JSON, or has another form; the message names the row.
    """
    if file.suffix != ".json":
        content: Any = [parse_json(row, f"{file}, row {n}") for n, row in lines(read_text(file))]
    else:
        content = read_json(file)
    names: dict[str, str] = {}
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        images = content.get("images") or []
        names = {str(e["id"]): e["file_name"] for e in images if {"id", "file_name"} <= {*e}}
        content = content["annotations"]
        rows: Iterable[tuple[str, Any]] = enumerate_rows(content, file, "annotations")
    elif isinstance(content, dict):
        rows = (
            (f"{file}, image {image!r}", {"image": image, "captions": texts})
            for image, texts in content.items()
        )
    else:
        rows = enumerate_rows(content, file, "row")
    found: dict[str, list[str]] = {}
    for place, row in rows:
        image, texts = _image_and_texts(place, row)
        found.setdefault(image, []).extend(texts)
    for number, name in names.items():
        if number in found:
            found.setdefault(name, found[number])
    return found


def enumerate_rows(content: Any, file: Path, name: str) -> Iterable[tuple[str, Any]]:
    """(place, row) of a list.

    Raises:
        DataError: it is no list.
    """
    if not isinstance(content, list):
        raise DataError(f"{file} holds {shortened(content)}. {_FORMS}")
    return ((f"{file}, {name} {number}", row) for number, row in enumerate(content, 1))


def _image_and_texts(place: str, row: Any) -> tuple[str, list[str]]:
    row = row if isinstance(row, Mapping) else {}
    image = next((image_name(row[key]) for key in _IMAGE if key in row), None)
    texts = [row[key] for key in _TEXT if key in row]
    if image is None or not texts:
        raise DataError(f"{place} names no image and caption: {shortened(dict(row))}. {_FORMS}")
    several = texts[0] if isinstance(texts[0], list) else texts[:1]
    return image, [_text(text, place) for text in several]


def _text(text: Any, place: str) -> str:
    """A caption on one line; an empty one, which is counted and dropped, stays empty."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return ""
    return clean(require_caption(text, f"{place}: the caption"))


def with_file_names(texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The same captions, also by the name of a file alone where one image has it.

    Example:
        >>> with_file_names({"photos/dog.jpg": ["a dog"]})["dog.jpg"]
        ['a dog']
    """
    names = {image: PureWindowsPath(image).name for image in texts}  # parts at / and at \\
    count = Counter(names.values())
    return {**{n: texts[image] for image, n in names.items() if count[n] == 1}, **texts}


def texts_of(texts: Mapping[str, list[str]], example: Example) -> list[str] | None:
    """The captions of an image, by its id or by the name of its file; None without any."""
    path = Path(str(example.path))
    keys = (example.image_id, str(example.path), path.name, path.stem)
    return next((texts[key] for key in keys if key in texts), None)


def rows_of(rows: Mapping[str, Row], files: Mapping[str, str], data: CaptionData) -> dict[str, Row]:
    """The row of each image: by its id or, where one image alone has it, by the name of its file.

    Args:
        rows: By the id of the image.
        files: The file of the image of each row.
        data: The images.
    """
    ours = {example.image_id: Path(str(example.path)).name for example in data.examples}
    theirs = {image: Path(file).name for image, file in files.items()}
    several = {
        name for names in (ours, theirs) for name, n in Counter(names.values()).items() if n > 1
    }
    by_name = {name: image for image, name in theirs.items() if name not in several}
    places = {
        image: image if image in rows else by_name.get(name, "") for image, name in ours.items()
    }
    return {image: rows[place] for image, place in places.items() if place in rows}
