"""Flickr8k in its three usual layouts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from capdistill.data.caption_files import (
    DataReport,
    Policy,
    Problem,
    Row,
    lines,
    pluralize,
    read_text,
)
from capdistill.data.dataset import (
    CaptionData,
    Example,
    Splits,
    require_some,
    to_examples,
)
from capdistill.data.image_names import Finder, image_finder
from capdistill.errors import DataError
from capdistill.files import user_path

PHANTOM = "2258277193_586949ec62.jpg.1"  # in the official caption file; there is no such image
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_TOKENS = ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
_IMAGES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
_KARPATHY = ("dataset_flickr8k.json", "dataset.json")
_KAGGLE = ("captions.txt", "captions.csv")


class Flickr8k(Splits):
    """Flickr8k: about 8,000 photos with five captions each.

    The layout is recognised: the official one (`Flicker8k_Dataset/`, `Flickr8k.token.txt` and the
    split lists), a Karpathy JSON beside the images, or Kaggle's (`Images/` and `captions.txt`).
    Kaggle's has no splits: it is split 6 : 1 : 1 at random, by the seed; the summary reports it.

    Example:
        >>> data = Flickr8k("flickr8k")            # doctest: +SKIP
        >>> print(data)                            # doctest: +SKIP
        Flickr8k (official split)
          train: 6000 images, 30000 captions
          val: 1000 images, 5000 captions
          test: 1000 images, 5000 captions
          1 problem: 1 phantom row

    Args:
        root: The folder that holds the images' folder and the caption file.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.
        encoding: The encoding of the caption file.
        seed: Seed of the random split, for a layout without splits.

    Raises:
        DataError: the folder has none of the three layouts, or a file cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        errors: Policy = "skip",
        encoding: str = "utf-8",
        seed: int = 0,
    ) -> None:
        folder, report = user_path(root, DataError), DataReport(errors)
        made = _read(folder, encoding, seed, report)
        super().__init__(
            made.parts, name="Flickr8k", note=made.note, absent=made.absent, report=report
        )


def _read(root: Path, encoding: str, seed: int, report: DataReport) -> Splits:
    images = _first(root, _IMAGES, os.path.isdir) or root
    find = image_finder(images, images / images.name, root)  # unpacked archives often nest it
    tokens = _first(root, _TOKENS, os.path.isfile)
    lists = {
        name: _first(root, (file, f"Flickr8k_text/{file}"), os.path.isfile)
        for name, file in LISTS.items()
    }
    if tokens and any(lists.values()):
        return _official(_tokens(tokens, encoding, find, report), lists, encoding, report)
    if karpathy := _first(root, _KARPATHY, os.path.isfile):
        from capdistill.data.coco import read_karpathy

        return read_karpathy(karpathy, images, restval=True, report=report)
    if tokens:
        return _random_split(_tokens(tokens, encoding, find, report), images, seed, report)
    if kaggle := _first(root, _KAGGLE, os.path.isfile):
        from capdistill.data.folder import separated_rows

        rows = separated_rows(kaggle, read_text(kaggle, encoding), report)
        return _random_split(
            to_examples(_no_phantom(rows, kaggle, report), str(kaggle), find, report),
            images,
            seed,
            report,
        )
    raise DataError(
        f"Flickr8k: {root} {'holds none of' if root.is_dir() else 'is not a folder; expected'} "
        f"{_TOKENS[0]}, {_KARPATHY[0]} or {_KAGGLE[0]}. Give the folder that holds the caption "
        f"file and the images' folder ({', '.join(_IMAGES)})."
    )


def _first(root: Path, names: tuple[str, ...], test: Callable[[Path], bool]) -> Path | None:
    return next((root / name for name in names if test(root / name)), None)


def _tokens(path: Path, encoding: str, find: Finder, report: DataReport) -> dict[str, Example]:
    rows = token_rows(read_text(path, encoding), str(path), find, report)
    return to_examples(_no_phantom(rows, path, report), str(path), find, report)


def token_rows(text: str, file: str, find: Finder, report: DataReport) -> Iterator[Row]:
    """Rows `name.jpg#i<TAB>caption`; the name may hold `#`, the caption may hold tabs.

    Example:
        >>> text = "my #1 dog.jpg#0\\tA dog\\trunning ."
        >>> list(token_rows(text, "tokens", lambda name: [], DataReport()))
        [Row(image='my #1 dog.jpg', caption='A dog\\trunning .', place='row 1')]
    """
    seen: dict[str, str] = {}
    for number, line in lines(text):
        place = f"row {number}"
        key, tab, caption = line.partition("\t")
        numbered = re.fullmatch(r"(.+)#[0-9]+", key, re.DOTALL)
        name = numbered[1] if numbered else key
        if not tab or not (numbered or find(key)):
            kind = "header row" if number == 1 else "malformed row"
            report.add(Problem(kind, file, place, f"{line[:60]!r} is not name.jpg#i<TAB>caption"))
            continue
        if numbered and key in seen:
            report.add(Problem("duplicate id", file, place, key))
        if not numbered or seen.get(key) != caption:
            yield Row(name, caption, place)
        seen.setdefault(key, caption)


def _no_phantom(rows: Iterator[Row], file: Path, report: DataReport) -> Iterator[Row]:
    for row in rows:
        if row.image == PHANTOM:
            report.add(Problem("phantom row", str(file), row.place, f"{PHANTOM}, no such image"))
        else:
            yield row


def _official(
    examples: dict[str, Example], lists: dict[str, Path | None], encoding: str, report: DataReport
) -> Splits:
    parts, absent, taken = {}, {}, dict[str, str]()
    for name, path in lists.items():
        if path is None:
            absent[name] = f"{LISTS[name]} was not found"
            continue
        listed = lines(read_text(path, encoding))
        chosen = list(_listed(path, listed, name, examples, taken, report))
        if chosen:
            parts[name] = CaptionData(chosen, name=f"Flickr8k/{name}", report=report)
        else:
            absent[name] = f"no image of {LISTS[name]} is there with captions"
    require_some(list(taken), "Flickr8k", report, "Check the images' folder.")
    rest = len(examples) - len(taken)
    note = "official split" + (f"; {pluralize(rest, 'image')} more in no list" if rest else "")
    return Splits(parts, note=note, absent=absent, report=report)


def _listed(
    path: Path,
    listed: Iterator[tuple[int, str]],
    split: str,
    examples: dict[str, Example],
    taken: dict[str, str],
    report: DataReport,
) -> Iterator[Example]:
    stems = Counter(os.path.splitext(name)[0] for name in examples)
    by_stem = {s: name for name in examples if stems[s := os.path.splitext(name)[0]] == 1}
    for number, line in listed:
        name, place = line.strip(), f"row {number}"
        if name not in examples:  # some lists or caption files lack the suffix
            stem = os.path.splitext(name)[0]
            name = by_stem.get(name, stem if stem in examples else name)
        if name in taken:
            where = f"{name}, already in {taken[name]}"
            report.add(Problem("duplicate id", str(path), place, where))
        elif name not in examples:
            report.add(Problem("image without caption or file", str(path), place, name))
        else:
            taken[name] = split
            yield examples[name]


def _random_split(
    examples: dict[str, Example], images: Path, seed: int, report: DataReport
) -> Splits:
    chosen = list(examples.values())
    require_some(chosen, "Flickr8k", report, f"Images were looked for in {images}.")
    data = CaptionData(chosen, name="Flickr8k", report=report)
    if len(data) < 3:
        note = "too few images to split: all in train"
        return Splits({"train": data}, note=note, report=report)
    made = data.split(val=1 / 8, test=1 / 8, seed=seed)
    made.note = f"no split lists: random split 6 : 1 : 1 with seed {seed}"
    return made
