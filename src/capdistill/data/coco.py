"""COCO's caption files (one JSON file per split), Karpathy's, and the bundled sample."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capdistill.data.caption_files import (
    DataReport,
    Policy,
    Problem,
    Row,
    image_name,
    json_entries,
    read_lists,
)
from capdistill.data.dataset import (
    CaptionData,
    Example,
    Splits,
    require_some,
    to_examples,
)
from capdistill.data.image_names import Finder, image_finder
from capdistill.errors import DataError, shortened
from capdistill.files import user_path


class CocoCaptions(CaptionData):
    """Images and captions of one COCO file, such as `captions_train2017.json`. Ids are COCO's.

    Example:
        >>> data = CocoCaptions("annotations/captions_val2017.json", "val2017")  # doctest: +SKIP
        >>> print(data)                                                          # doctest: +SKIP
        captions_val2017: 5000 images, 25014 captions

    Args:
        json: The caption file: lists `images` (id, file_name) and `annotations` (image_id,
            caption).
        images: The folder of the images.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.

    Raises:
        DataError: it is not such a file, or nothing in it can be used.
    """

    def __init__(self, json: str | Path, images: str | Path, *, errors: Policy = "skip") -> None:
        report = DataReport(errors)
        path, folder = user_path(json, DataError), user_path(images, DataError)
        examples = list(_examples(path, folder, report))
        require_some(examples, path.stem, report, f"Images were looked for in {folder}.")
        super().__init__(examples, name=path.stem, report=report)


def _examples(path: Path, folder: Path, report: DataReport) -> Iterator[Example]:
    lists = read_lists(path, "images", "annotations", form="COCO captions")
    names = _names(lists["images"], path, report)
    rows = _rows(lists["annotations"], names, path, report)
    places, find = {name: image_id for image_id, name in names.items()}, image_finder(folder)
    for name, example in to_examples(rows, str(path), find, report).items():
        yield Example(places[name], example.path, example.captions)


def _names(images: list[Any], path: Path, report: DataReport) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    for place, entry in json_entries(images, "images", ("id", "file_name"), path, report):
        image_id, name = image_name(entry["id"]), image_name(entry["file_name"])
        if image_id is None or name is None:
            reason = f"id {shortened(entry['id'])}, file_name {shortened(entry['file_name'])}"
            report.add(Problem("malformed row", str(path), place, reason))
            continue
        if image_id in names or name in taken:
            report.add(Problem("duplicate id", str(path), place, f"{image_id}, {name}"))
            continue
        names[image_id] = name
        taken.add(name)
    return names


def _rows(rows: list[Any], names: dict[str, str], path: Path, report: DataReport) -> Iterator[Row]:
    captioned = set()
    needs = ("image_id", "caption")
    for place, entry in json_entries(rows, "annotations", needs, path, report):
        image_id = image_name(entry["image_id"])
        if image_id in names:
            captioned.add(image_id)
            yield Row(names[image_id], entry["caption"], place)
        else:
            reason = f"image id {shortened(entry['image_id'])}"
            report.add(Problem("caption without image", str(path), place, reason))
    for image_id, name in names.items():
        if image_id not in captioned:
            report.add(Problem("image without caption", str(path), "images", name))


_SPLITS = ("train", "val", "test")
_ALSO = {"dev": "val", "validation": "val"}


class Karpathy(Splits):
    """Images, captions and splits of a Karpathy JSON file.

    Image ids are COCO's (`cocoid`) if the file has them, else the file names.

    Example:
        >>> data = Karpathy("dataset_coco.json", "coco")           # doctest: +SKIP
        >>> print(data)                                            # doctest: +SKIP
        dataset_coco (restval in train)
          train: 113287 images, 566747 captions
          val: 5000 images, 25010 captions
          test: 5000 images, 25010 captions

    Args:
        json: The file.
        images: The folder that holds `filepath/filename`, or `filename`.
        restval: Add COCO's `restval` images to the training images, as is usual, or leave them out.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.

    Raises:
        DataError: it is not such a file, or nothing in it can be used.
    """

    def __init__(
        self,
        json: str | Path,
        images: str | Path,
        *,
        restval: bool = True,
        errors: Policy = "skip",
    ) -> None:
        report = DataReport(errors)
        path, folder = user_path(json, DataError), user_path(images, DataError)
        made = read_karpathy(path, folder, restval=restval, report=report)
        super().__init__(made.parts, name=made.name, note=made.note, report=report)


def read_karpathy(path: Path, images: Path, *, restval: bool, report: DataReport) -> Splits:
    """The splits of a file. What cannot be used goes to the report."""
    rows = read_lists(path, "images", form="Karpathy")["images"]
    parts: dict[str, list[Example]] = {name: [] for name in _SPLITS}
    taken: set[str] = set()
    rest = 0
    find = image_finder(images)
    needs = ("filename", "split", "sentences")
    for place, entry in json_entries(rows, "images", needs, path, report):
        split = str(entry["split"]).lower()
        image_id = image_name(entry.get("cocoid", entry["filename"]))
        split = _ALSO.get(split, split)
        rest += split == "restval"
        if split == "restval" and not restval:
            continue
        split = "train" if split == "restval" else split
        wrong = _wrong_field(entry)
        if wrong or image_id is None:
            report.add(Problem("malformed row", str(path), place, wrong or "cocoid is not an id"))
            continue
        if split not in parts or image_id in taken:
            kind = "duplicate id" if image_id in taken else "unknown split"
            report.add(Problem(kind, str(path), place, f"{image_id}, split {split!r}"))
            continue
        taken.add(image_id)
        parts[split] += _example(entry, image_id, place, path, find, report)
    chosen = [example for part in parts.values() for example in part]
    require_some(chosen, path.stem, report, f"Images were looked for in {images}.")
    note = f"restval {'in train' if restval else 'left out'}" if rest else ""
    made = {
        name: CaptionData(part, name=f"{path.stem}/{name}", report=report)
        for name, part in parts.items()
        if part
    }
    return Splits(made, name=path.stem, note=note, report=report)


def _example(
    entry: dict[str, Any],
    image_id: str,
    place: str,
    path: Path,
    find: Finder,
    report: DataReport,
) -> list[Example]:
    """One example, or none if its image or all of its captions are missing."""
    name, folder = image_name(entry["filename"]) or "", entry.get("filepath") or ""
    full = f"{folder}/{name}" if folder else name
    texts = [_raw(sentence) for sentence in entry["sentences"]]
    rows = [Row(full, text, f"{place}.sentences[{n}]") for n, text in enumerate(texts)]
    if not rows:
        report.add(Problem("image without caption", str(path), place, full))
    found = to_examples(rows, str(path), lambda full: find(full) or find(name), report)
    return [Example(image_id, example.path, example.captions) for example in found.values()]


def _raw(sentence: Any) -> object:
    """The caption of a sentence, of whatever type it is; its tokens if it has no raw text."""
    if not isinstance(sentence, dict):
        return sentence
    tokens = sentence.get("tokens")
    if "raw" in sentence or not isinstance(tokens, list):
        return sentence.get("raw")
    return " ".join(tokens) if all(isinstance(token, str) for token in tokens) else tokens


def _wrong_field(entry: dict[str, Any]) -> str:
    """The reason why an entry cannot be read, or ""."""
    if image_name(entry["filename"]) is None:
        return f"filename is {shortened(entry['filename'])}"
    if not isinstance(entry["sentences"], list):
        return f"sentences is {type(entry['sentences']).__name__}; expected a list"
    if not isinstance(entry.get("filepath") or "", str):
        return f"filepath is {shortened(entry['filepath'])}"
    return ""


def sample() -> Splits:
    """47 COCO photos with five captions each, 39 for training and 8 for validation.

    The photos are CC BY 2.0 (`sample/ATTRIBUTION.md` beside them has their addresses and
    licences), the captions CC BY 4.0 by the COCO Consortium.

    Example:
        >>> data = sample()
        >>> len(data.train), len(data.val), len(data.val.captions)
        (39, 8, 40)
    """
    root = Path(str(importlib.resources.files("capdistill.data"))) / "sample"
    path = root / "captions.json"
    data = CocoCaptions(path, root / "images", errors="raise")
    split = {
        str(entry["id"]): entry["split"]
        for entry in read_lists(path, "images", form="sample")["images"]
    }
    parts = {}
    for name in ("train", "val"):
        parts[name] = data.subset(i for i, key in enumerate(data.image_ids) if split[key] == name)
        parts[name].name = f"sample/{name}"
    return Splits(parts, name="sample", report=data.report)
