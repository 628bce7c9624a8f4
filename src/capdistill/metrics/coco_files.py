"""COCO's own files for scoring: references and results, read into what `CaptionScorer` takes.

Also the same as JSON Lines (`.jsonl`, `.ndjson`), and as one object {image: caption or captions}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capdistill.data.caption_files import lines, parse_json, read_json, read_lists, read_text
from capdistill.errors import DataError
from capdistill.metrics.base import first

_LINES = (".jsonl", ".ndjson")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can name it alone; no output can hold it


@dataclass(frozen=True)
class CocoResults:
    """Captions with the references of their images. Ids are strings, also where the files' are not.

    Args:
        references: Image -> its references, for each image that has a result.
        captions: Image -> the result, in the order of the file.
        without: Images of the references' file that have no result.
    """

    references: Mapping[str, list[str]]
    captions: Mapping[str, str]
    without: tuple[str, ...]


def read_coco_results(references: str | Path, results: str | Path) -> CocoResults:
    """Read the two files of the COCO tool; the images are those of the results, as in its example.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     given, said = Path(folder, "references.json"), Path(folder, "results.json")
        ...     texts = [{"id": 1, "image_id": 7, "caption": "a dog"}]
        ...     _ = given.write_text(json.dumps({"images": [{"id": 7}], "annotations": texts}))
        ...     _ = said.write_text(json.dumps(coco_results({"7": "a dog runs"})))
        ...     found = read_coco_results(given, said)
        >>> found.references, found.captions
        ({'7': ['a dog']}, {'7': 'a dog runs'})

    Args:
        references: A COCO captions file: lists `images` (id) and `annotations` (image_id, caption);
            or {image: [caption, ...]}; or JSON Lines, an object with image_id and caption a row.
        results: A list of objects with image_id and caption; or {image: caption}; or JSON Lines.

    Raises:
        DataError: a file cannot be read, is no JSON or of another form; a caption that is no
            text; an image with two results, without a reference, or not in the references.
    """
    images, texts = _references(Path(references))
    captions = _captions(Path(results))
    foreign = [image for image in captions if image not in images]
    if foreign:
        raise DataError(
            f"{results}: {len(foreign)} of {len(captions)} results are of images that "
            f"{references} does not have: {first(foreign)}. Give the references of the same data."
        )
    bare = [image for image in captions if image not in texts]
    if bare:
        raise DataError(
            f"{references}: {len(bare)} images of {results} have no caption under 'annotations': "
            f"{first(bare)}. An image can be scored where it has a reference."
        )
    without = tuple(image for image in images if image not in captions)
    return CocoResults({image: texts[image] for image in captions}, captions, without)


def coco_results(captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Captions as the COCO tool takes results. Ids become numbers again where all were numbers.

    Example:
        >>> coco_results({"391895": "a man on a bicycle"})
        [{'image_id': 391895, 'caption': 'a man on a bicycle'}]
        >>> coco_results({"dog.jpg": "a dog"})
        [{'image_id': 'dog.jpg', 'caption': 'a dog'}]
    """
    numbers = all(_is_number(image) for image in captions)
    return [
        {"image_id": int(image) if numbers else image, "caption": text}
        for image, text in captions.items()
    ]


def _is_number(image: str) -> bool:
    """Whether it is the one way to write a whole number, so that nothing is lost."""
    return image.isascii() and image.isdigit() and len(image) < 19 and str(int(image)) == image


def _references(path: Path) -> tuple[dict[str, None], dict[str, list[str]]]:
    """The images, in order, and image -> captions."""
    images: dict[str, None] | None = None
    try:
        lists = read_lists(path, "images", "annotations", form="COCO captions")
    except DataError:
        rows = _lines(path) if path.suffix in _LINES else _of_object(read_json(path))
        if rows is None:
            raise
    else:
        rows = lists["annotations"]
        listed = _rows(path, "images", lists["images"], "id")
        images = {_id(place, row): None for place, row in listed}
    texts: dict[str, list[str]] = {}
    for place, row in _rows(path, "annotations", rows, "image_id", "caption"):
        texts.setdefault(_id(place, row, "image_id"), []).append(_caption(place, row))
    return dict.fromkeys(texts) if images is None else images, texts


def _captions(path: Path) -> dict[str, str]:
    rows = _result_rows(path)
    if not rows:
        raise DataError(f"{path} holds no result; expected one caption for each image to score.")
    captions: dict[str, str] = {}
    for place, row in _rows(path, "results", rows, "image_id", "caption"):
        image = _id(place, row, "image_id")
        if image in captions:
            raise DataError(f"{place}: image {image!r} has a result already; give it one caption.")
        captions[image] = _caption(place, row)
    return captions


def _result_rows(path: Path) -> list[Any]:
    content = _lines(path) if path.suffix in _LINES else read_json(path)
    rows = content if isinstance(content, list) else _of_object(content)
    if rows is None:
        given = isinstance(content, dict)
        held = f"an object with {list(content)[:8]}" if given else _short(content)
        raise DataError(
            f"{path}: no COCO results file; expected a list of "
            f'{{"image_id": ..., "caption": ...}}, found {held}. The references come first, the '
            "results second."
        )
    return rows


def _lines(path: Path) -> list[Any]:
    """The rows of JSON Lines."""
    return [parse_json(row, f"{path}, row {number}") for number, row in lines(read_text(path))]


def _of_object(content: Any) -> list[Any] | None:
    """COCO's rows of an object {image: caption} or {image: [caption, ...]}; None of another."""
    if not isinstance(content, dict) or not content:
        return None
    said = {image: [t] if isinstance(t, str) else t for image, t in content.items()}
    if not all(isinstance(t, list) and t and isinstance(t[0], str) for t in said.values()):
        return None
    return [{"image_id": image, "caption": text} for image, t in said.items() for text in t]


def _rows(path: Path, key: str, rows: list[Any], *needs: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row, each an object with what is needed."""
    for number, row in enumerate(rows):
        place = f"{path}, {key}[{number}]"
        if not isinstance(row, dict) or not all(need in row for need in needs):
            fields = " and ".join(f"'{need}'" for need in needs)
            raise DataError(f"{place}: expected an object with {fields}, found {_short(row)}.")
        yield place, row


def _id(place: str, row: Mapping[str, Any], key: str = "id") -> str:
    value = row[key]
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, str))
        or _SURROGATE.search(str(value))
    ):
        raise DataError(f"{place}: {key} is {_short(value)}; expected a whole number or a string.")
    return str(value)


def _caption(place: str, row: Mapping[str, Any]) -> str:
    text = row["caption"]
    if not isinstance(text, str):
        raise DataError(f"{place}: caption is {_short(text)}; expected a string ('' is one).")
    return text


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
