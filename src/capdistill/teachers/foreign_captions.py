"""Captions that another program wrote, such as those of a model behind an API."""

from __future__ import annotations

import json
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
_TEXT = ("captions", "caption", "text", "generated_text")
_FORMS = (
    'Give JSON Lines of {"image": "dog.jpg", "caption": "a dog"} or "captions": [...]; one object '
    "{image: caption or captions}; COCO results, a list of {image_id, caption}; or a COCO file of "
    "images and annotations."
)


def is_foreign(file: Path, description: Path) -> bool:
    """Whether another program wrote a file: its first row has nothing that ours have.

    Args:
        file: The captions.
        description: The file that stands beside captions of ours.
    """
    try:
        with open(file, "rb") as stream:
            row = json.loads(stream.readline() or b"0")
    except (OSError, ValueError, RecursionError):  # reading it says what is wrong
        return file.is_file() and not description.is_file()
    if not isinstance(row, dict):
        return file.suffix == ".json"
    return not {"log_probs", "lengths", "duplicates"} & row.keys()


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
    names: dict[str, str] = {}  # a further name of an image -> the one that its captions have
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        names = _file_names(content.get("images"))
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
        (image, *others), texts = _names_and_texts(place, row)
        found.setdefault(image, []).extend(texts)
        names |= dict.fromkeys(others, image)
    for name, image in names.items():
        if image in found:
            found.setdefault(name, found[image])
    return found


def _file_names(images: Any) -> dict[str, str]:
    """The file of each image of a COCO file -> its id; entries without both are left out."""
    entries = [e for e in images if isinstance(e, Mapping)] if isinstance(images, list) else []
    pairs = [(image_name(e.get("file_name")), image_name(e.get("id"))) for e in entries]
    return {name: number for name, number in pairs if name is not None and number is not None}


def enumerate_rows(content: Any, file: Path, name: str) -> Iterable[tuple[str, Any]]:
    """(place, row) of a list.

    Raises:
        DataError: it is no list.
    """
    if not isinstance(content, list):
        raise DataError(f"{file} holds {shortened(content)}. {_FORMS}")
    return ((f"{file}, {name} {number}", row) for number, row in enumerate(content, 1))


def _names_and_texts(place: str, row: Any) -> tuple[list[str], list[str]]:
    """The names of the image, its id first, and its captions."""
    row = row if isinstance(row, Mapping) else {}
    found = [image_name(row[key]) for key in _IMAGE if key in row]
    names = [name for name in found if name is not None]
    texts = [row[key] for key in _TEXT if key in row]
    if not names or not texts:
        raise DataError(f"{place} names no image and caption: {shortened(dict(row))}. {_FORMS}")
    several = texts[0] if isinstance(texts[0], list) else texts[:1]
    return names, [_text(text, place) for text in several]


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
