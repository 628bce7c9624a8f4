"""Hugging Face captioners as teachers. An adapter per family, chosen by the type of the model.

>>> from capdistill.teachers import huggingface
>>> "blip" in huggingface.names()
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import Registry, lazy_exports
from capdistill.teachers.huggingface.base import Adapter as Adapter
from capdistill.teachers.huggingface.base import Encoded as Encoded

if TYPE_CHECKING:
    from capdistill.teachers.huggingface.loading import from_pretrained as from_pretrained
    from capdistill.teachers.huggingface.teacher import HuggingFaceTeacher as HuggingFaceTeacher
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {"HuggingFaceTeacher": "teacher", "from_pretrained": "loading"},
        "Adapter",
        "Encoded",
        "create",
        "describe",
        "get",
        "names",
        "register",
        "registry",
    )

_HERE = "capdistill.teachers.huggingface"
registry: Registry[Adapter] = Registry(
    "adapter",
    "capdistill.adapters",
    Adapter,
    {  # config.model_type -> class; any other prompted model has the last one
        "blip": f"{_HERE}.blip:Blip",
        "blip-2": f"{_HERE}.blip2:Blip2",
        "florence2": f"{_HERE}.florence2:Florence2",
        "git": f"{_HERE}.git:Git",
        "vision-encoder-decoder": f"{_HERE}.vision_encoder_decoder:VisionEncoderDecoder",
        "image-text-to-text": f"{_HERE}.image_text_to_text:ImageTextToText",
    },
)
register = registry.register
create = registry.create
get = registry.get
names = registry.names
describe = registry.describe
