"""From rows of a caption file to images with captions; every format ends here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from capdistill.data.records import Example
from capdistill.data.report import Problem, Report
from capdistill.data.rows import Row, clean
from capdistill.errors import DataError


def gather(
    rows: Iterable[Row], file: str, find: Callable[[str], Path | None], report: Report
) -> dict[str, Example]:
    """Rows to examples by image, in the order of the file; what can not be used is reported."""
    paths: dict[str, Path | None] = {}
    captions: dict[str, list[str]] = {}
    for image, text, place in rows:
        if image not in paths:
            paths[image] = find(image)
            if paths[image] is None:
                report.add(Problem("missing image", file, place, image))
        if paths[image] is None:
            continue
        caption = clean(text)
        if not caption:
            report.add(Problem("empty caption", file, place, image))
            continue
        captions.setdefault(image, []).append(caption)
    found = {image: path for image, path in paths.items() if path is not None}
    for image in found:
        if image not in captions:
            report.add(Problem("image without caption", file, "", image))
    return {image: Example(image, found[image], tuple(texts)) for image, texts in captions.items()}


def finder(*roots: Path) -> Callable[[str], Path | None]:
    """A function from a name in a caption file to the image file of that very name, or None."""

    def find(name: str) -> Path | None:
        inside = [root / name for root in roots if _stays_inside(root, name)]
        return next((path for path in inside if path.is_file()), None)

    return find


def require_some(examples: Sequence[object], name: str, report: Report, fix: str) -> None:
    """Refuse a data set of which nothing can be used, with the reasons and the fix."""
    if not examples:
        raise DataError(f"{name}: no image with a caption can be used. {fix}\n{report}")


def _stays_inside(root: Path, name: str) -> bool:
    if not name or "\0" in name or ".." in Path(name).parts:
        return False
    return not Path(name).is_absolute() or Path(name).is_relative_to(root)
