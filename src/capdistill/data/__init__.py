"""Images and captions: data sets in the forms people have them, and the loader that batches them.

>>> import capdistill as cd
>>> print(cd.data.sample().train)
sample/train: 39 images, 195 captions
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.data.caption_files import DataReport as DataReport
    from capdistill.data.caption_files import Problem as Problem
    from capdistill.data.coco import CocoCaptions as CocoCaptions
    from capdistill.data.coco import Karpathy as Karpathy
    from capdistill.data.coco import sample as sample
    from capdistill.data.curriculum import Curriculum as Curriculum
    from capdistill.data.curriculum import difficulty as difficulty
    from capdistill.data.dataset import CaptionData as CaptionData
    from capdistill.data.dataset import Example as Example
    from capdistill.data.dataset import Splits as Splits
    from capdistill.data.flickr8k import Flickr8k as Flickr8k
    from capdistill.data.folder import Folder as Folder
    from capdistill.data.folder import Images as Images
    from capdistill.data.images import read_image as read_image
    from capdistill.data.loader import Loader as Loader
    from capdistill.data.rows import Rows as Rows
    from capdistill.data.shard_writer import write_shards as write_shards
    from capdistill.data.shards import Shards as Shards
    from capdistill.data.shards import shard_splits as shard_splits
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "CaptionData": "dataset",
            "CocoCaptions": "coco",
            "Curriculum": "curriculum",
            "DataReport": "caption_files",
            "Example": "dataset",
            "Flickr8k": "flickr8k",
            "Folder": "folder",
            "Images": "folder",
            "Karpathy": "coco",
            "Loader": "loader",
            "Problem": "caption_files",
            "Rows": "rows",
            "Shards": "shards",
            "Splits": "dataset",
            "difficulty": "curriculum",
            "read_image": "images",
            "sample": "coco",
            "shard_splits": "shards",
            "write_shards": "shard_writer",
        },
    )
