"""The sample that comes with the package: 47 photos for tests and the demo, not for results."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from capdistill.data.coco import CocoCaptions
from capdistill.data.entries import read_lists
from capdistill.data.records import Splits


def sample() -> Splits:
    """47 COCO photos with five captions each, 39 to train and 8 to validate.

    Photos are CC BY 2.0 (their addresses and licences stand in `sample/ATTRIBUTION.md` beside
    them), captions CC BY 4.0 by the COCO Consortium.

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
