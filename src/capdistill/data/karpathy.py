"""Karpathy's JSON (`dataset_coco.json`, `dataset_flickr8k.json`, `dataset_flickr30k.json`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from capdistill.data.entries import entries, read_lists
from capdistill.data.gather import finder, gather, require_some
from capdistill.data.records import CaptionData, Example, Splits
from capdistill.data.report import Policy, Problem, Report
from capdistill.data.rows import Row

_SPLITS = ("train", "val", "test")
_ALSO = {"dev": "val", "validation": "val"}


class Karpathy(Splits):
    """Images, captions and splits of a Karpathy JSON file.

    Image ids are COCO's where the file has them (`cocoid`), else the file names.

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
        restval: Count COCO's `restval` images as training images, as is usual; else leave them out.
        errors: "skip" leaves out what can not be used and reports it; "raise" raises it.

    Raises:
        DataError: it is no such file, or nothing of it can be used.
    """

    def __init__(
        self,
        json: str | Path,
        images: str | Path,
        *,
        restval: bool = True,
        errors: Policy = "skip",
    ) -> None:
        report = Report(errors)
        made = read_karpathy(Path(json), Path(images), restval=restval, report=report)
        super().__init__(made.parts, name=made.name, note=made.note, report=report)


def read_karpathy(path: Path, images: Path, *, restval: bool, report: Report) -> Splits:
    """The splits of a file; what can not be used goes to the report."""
    rows = read_lists(path, "images", form="Karpathy")["images"]
    parts: dict[str, list[Example]] = {name: [] for name in _SPLITS}
    taken: set[str] = set()
    rest = 0
    find = finder(images)
    for place, entry in entries(rows, "images", ("filename", "split", "sentences"), path, report):
        split = _ALSO.get(entry["split"], entry["split"])
        rest += split == "restval"
        if split == "restval" and not restval:
            continue
        split = "train" if split == "restval" else split
        image_id = str(entry.get("cocoid", entry["filename"]))
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
    find: Callable[[str], Path | None],
    report: Report,
) -> list[Example]:
    """One example, or none where its image or all of its captions are missing."""
    name = str(entry["filename"])
    folder = str(entry.get("filepath") or "")
    full = f"{folder}/{name}" if folder else name
    texts = [_raw(sentence) for sentence in entry["sentences"]]
    rows = [Row(full, text, f"{place}.sentences[{n}]") for n, text in enumerate(texts)]
    if not rows:
        report.add(Problem("image without caption", str(path), place, full))
    found = gather(rows, str(path), lambda full: find(full) or find(name), report)
    return [Example(image_id, example.path, example.captions) for example in found.values()]


def _raw(sentence: Any) -> str:
    if isinstance(sentence, str):
        return sentence
    if not isinstance(sentence, dict):
        return ""
    return str(sentence.get("raw") or " ".join(map(str, sentence.get("tokens", ()))))
