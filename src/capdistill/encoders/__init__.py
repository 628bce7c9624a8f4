"""Encoders by name: images to visual tokens. A new one is a subclass of `Encoder`.

>>> from capdistill import encoders
>>> "timm" in encoders.names()
True
"""

from __future__ import annotations

from capdistill.encoders.base import Encoder
from capdistill.registry import Registry

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

__all__ = ["Encoder", "create", "describe", "get", "names", "register", "registry"]
