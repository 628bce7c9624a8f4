"""Read the two files of the COCO tool, references and results, for `CaptionScorer`.

The same content may come as JSON Lines (`.jsonl`, `.ndjson`) or as one object {image: caption or
captions}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from capdistill.data.caption_files import lines, parse_json, read_json, read_lists, read_text
from capdistill.errors import DataError, require_text, shortened
from capdistill.files import user_path
from capdistill.metrics.base import first

_LINES = (".jsonl", ".ndjson")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can name it alone; no output can hold it


@dataclass(frozen=True)
class CocoResults:
    """Captions with the references of their images. Ids are strings, in the files often numbers.

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
        ...     given, results = Path(folder, "references.json"), Path(folder, "results.json")
        ...     texts = [{"id": 1, "image_id": 7, "caption": "a dog"}]
        ...     _ = given.write_text(json.dumps({"images": [{"id": 7}], "annotations": texts}))
        ...     _ = results.write_text(json.dumps(coco_results({"7": "a dog runs"})))
        ...     found = read_coco_results(given, results)
        >>> found.references, found.captions
        ({'7': ['a dog']}, {'7': 'a dog runs'})

    Args:
        references: A COCO captions file: lists `images` (id) and `annotations` (image_id, caption);
            or {image: [caption, ...]}; or JSON Lines, with one object of image_id and caption per
            row.
        results: A list of objects with image_id and caption; or {image: caption}; or JSON Lines.

    Raises:
        DataError: a file cannot be read, is not JSON or has another form; a caption is not text;
            an image has two results or two entries, no reference, or is not in the references.
    """
    images, texts = _references(user_path(references, DataError))
    captions = _captions(user_path(results, DataError))
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
            f"{first(bare)}. Give each of them a reference, or leave out its result."
        )
    without = tuple(image for image in images if image not in captions)
    return CocoResults({image: texts[image] for image in captions}, captions, without)


def coco_results(captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Captions in the form of the COCO tool's results. Ids become numbers if all were numbers.

    Example:
        >>> coco_results({"391895": "a man on a bicycle"})
        [{'image_id': 391895, 'caption': 'a man on a bicycle'}]
        >>> coco_results({"dog.jpg": "a dog"})
        [{'image_id': 'dog.jpg', 'caption': 'a dog'}]

    Raises:
        DataError: a caption is not text, or two ids are the same text.
    """
    if not isinstance(captions, Mapping):
        raise DataError(
            f"coco_results: {type(captions).__name__} was given; expected {{image: caption}}, such "
            "as the captions of an evaluation."
        )
    texts: dict[str, str] = {}
    for image, text in captions.items():
        if str(image) in texts:
            raise DataError(f"The captions have image {str(image)!r} twice. Give each image one.")
        texts[str(image)] = require_text(text, f"The caption of image {image!r}")
    numbers = all(map(_is_number, texts))
    return [
        {"image_id": int(image) if numbers else image, "caption": text}
        for image, text in texts.items()
    ]


def _is_number(image: str) -> bool:
    """Whether the text is a whole number in its usual form: as an int it loses nothing."""
    return image.isascii() and image.isdigit() and len(image) < 19 and str(int(image)) == image


class _Row(NamedTuple):
    place: str
    image: str
    caption: str


def _references(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The images, in order, and image -> captions."""
    try:
        lists = read_lists(path, "images", "annotations", form="COCO captions")
    except DataError:
        content = _lines(path) if path.suffix in _LINES else read_json(path)
        if path.suffix not in _LINES and not _is_by_image(content):
            raise
        images, rows = None, _rows(path, "annotations", content)
    else:
        images = _image_ids(path, lists["images"])
        rows = _rows(path, "annotations", lists["annotations"])
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row.image, []).append(row.caption)
    return list(texts) if images is None else images, texts


def _image_ids(path: Path, entries: list[Any]) -> list[str]:
    ids: dict[str, None] = {}
    for number, entry in enumerate(entries):
        place = f"{path}, images[{number}]"
        _require_fields(place, entry, "id")
        image = _id(place, entry["id"], "id")
        if image in ids:
            raise DataError(f"{place}: image {image!r} is listed already; ids must differ.")
        ids[image] = None
    return list(ids)


def _captions(path: Path) -> dict[str, str]:
    content = _lines(path) if path.suffix in _LINES else read_json(path)
    if not isinstance(content, list) and not _is_by_image(content):
        held = f"an object with {list(content)[:8]}" if isinstance(content, dict) else ""
        raise DataError(
            f"{path} is not a COCO results file; expected a list of "
            f'{{"image_id": ..., "caption": ...}}, found {held or shortened(content)}. The '
            "references come first, the results second."
        )
    captions: dict[str, str] = {}
    for place, image, caption in _rows(path, "results", content):
        if image in captions:
            raise DataError(f"{place}: image {image!r} has a result already; give it one caption.")
        captions[image] = caption
    if not captions:
        raise DataError(f"{path} holds no result; expected one caption for each image to score.")
    return captions


def _lines(path: Path) -> list[Any]:
    """The rows of JSON Lines."""
    return [parse_json(row, f"{path}, row {number}") for number, row in lines(read_text(path))]


def _is_by_image(content: Any) -> bool:
    """Whether this is one object {image: caption or captions}."""
    if not isinstance(content, dict) or not content.keys().isdisjoint({"images", "annotations"}):
        return False
    return any(isinstance(value, str) or _holds_text(value) for value in content.values())


def _holds_text(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(text, str) for text in value)


def _rows(path: Path, key: str, content: Any) -> Iterator[_Row]:
    """Every caption with its image: of a list of objects, or of {image: caption or captions}.

    Raises:
        DataError: a row without what is needed, an id or a caption of another type; the message
            names the row.
    """
    if isinstance(content, dict):
        for image, texts in content.items():
            place = f"{path}, image {image!r}"
            _id(place, image, "the id")
            for text in texts if isinstance(texts, list) else [texts]:
                yield _Row(place, image, require_text(text, f"{place}: caption"))
        return
    for number, row in enumerate(content):
        place = f"{path}, {key}[{number}]"
        _require_fields(place, row, "image_id", "caption")
        image = _id(place, row["image_id"], "image_id")
        yield _Row(place, image, require_text(row["caption"], f"{place}: caption"))


def _require_fields(place: str, row: Any, *needs: str) -> None:
    if not isinstance(row, dict) or not all(need in row for need in needs):
        fields = " and ".join(f"'{need}'" for need in needs)
        raise DataError(f"{place}: expected an object with {fields}, found {shortened(row)}.")


def _id(place: str, value: Any, name: str) -> str:
    number_or_text = isinstance(value, (int, str)) and not isinstance(value, bool)
    if not number_or_text or _SURROGATE.search(str(value)):
        raise DataError(
            f"{place}: {name} is {shortened(value)}; expected a whole number or a string."
        )
    return str(value)
