"""COCO's own caption files: one JSON a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capdistill.data.entries import entries, read_lists
from capdistill.data.gather import finder, gather, require_some
from capdistill.data.records import CaptionData, Example
from capdistill.data.report import Policy, Problem, Report
from capdistill.data.rows import Row


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
        errors: "skip" leaves out what can not be used and reports it; "raise" raises it.

    Raises:
        DataError: it is no such file, or nothing of it can be used.
    """

    def __init__(self, json: str | Path, images: str | Path, *, errors: Policy = "skip") -> None:
        path, folder, report = Path(json), Path(images), Report(errors)
        examples = list(_examples(path, folder, report))
        require_some(examples, path.stem, report, f"Images were looked for in {folder}.")
        super().__init__(examples, name=path.stem, report=report)


def _examples(path: Path, folder: Path, report: Report) -> Iterator[Example]:
    lists = read_lists(path, "images", "annotations", form="COCO captions")
    names = _names(lists["images"], path, report)
    rows = _rows(lists["annotations"], names, path, report)
    places, find = {name: image_id for image_id, name in names.items()}, finder(folder)
    for name, example in gather(rows, str(path), find, report).items():
        yield Example(places[name], example.path, example.captions)


def _names(images: list[Any], path: Path, report: Report) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    for place, entry in entries(images, "images", ("id", "file_name"), path, report):
        image_id, name = str(entry["id"]), str(entry["file_name"])
        if image_id in names or name in taken:
            report.add(Problem("duplicate id", str(path), place, f"{image_id}, {name}"))
            continue
        names[image_id] = name
        taken.add(name)
    return names


def _rows(rows: list[Any], names: dict[str, str], path: Path, report: Report) -> Iterator[Row]:
    captioned = set()
    needs = ("image_id", "caption")
    for place, entry in entries(rows, "annotations", needs, path, report):
        image_id = str(entry["image_id"])
        if image_id in names:
            captioned.add(image_id)
            yield Row(names[image_id], str(entry["caption"]), place)
        else:
            report.add(Problem("caption without image", str(path), place, f"image id {image_id}"))
    for image_id, name in names.items():
        if image_id not in captioned:
            report.add(Problem("image without caption", str(path), "images", name))
