"""Encoders by name: images to visual tokens. A new one is a subclass of `Encoder`.

>>> from capdistill import encoders
>>> "timm" in encoders.names()
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.encoders.base import Encoder as Encoder
from capdistill.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from capdistill.encoders.timm import TimmEncoder as TimmEncoder
    from capdistill.encoders.torchvision import TorchvisionEncoder as TorchvisionEncoder
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "TimmEncoder": "timm",
            "TorchvisionEncoder": "torchvision",
        },
        "Encoder",
        "create",
        "describe",
        "get",
        "names",
        "register",
        "registry",
    )

registry: Registry[Encoder] = Registry(
    "encoder",
    "capdistill.encoders",
    Encoder,
    {
        "timm": "capdistill.encoders.timm:TimmEncoder",
        "torchvision": "capdistill.encoders.torchvision:TorchvisionEncoder",
    },
)

register = registry.register
create = registry.create
get = registry.get
names = registry.names
describe = registry.describe
