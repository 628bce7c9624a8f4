"""Images and captions: data sets in the forms people have them, and the loader that batches them.

>>> import capdistill as cd
>>> print(cd.data.sample().train)
sample/train: 39 images, 195 captions
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capdistill.data.caption_files import DataReport, Problem
    from capdistill.data.coco import CocoCaptions, Karpathy, sample
    from capdistill.data.dataset import CaptionData, Example, Splits
    from capdistill.data.flickr8k import Flickr8k
    from capdistill.data.folder import Folder
    from capdistill.data.images import read_image
    from capdistill.data.loader import Loader

_PUBLIC = {
    "CaptionData": "dataset",
    "CocoCaptions": "coco",
    "Example": "dataset",
    "Flickr8k": "flickr8k",
    "Folder": "folder",
    "Karpathy": "coco",
    "Loader": "loader",
    "Problem": "caption_files",
    "DataReport": "caption_files",
    "Splits": "dataset",
    "read_image": "images",
    "sample": "coco",
}

__all__ = [
    "CaptionData",
    "CocoCaptions",
    "DataReport",
    "Example",
    "Flickr8k",
    "Folder",
    "Karpathy",
    "Loader",
    "Problem",
    "Splits",
    "read_image",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'capdistill.data' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"capdistill.data.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
