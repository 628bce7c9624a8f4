"""Decoders by name: visual tokens and words to the next word. A new one subclasses `Decoder`.

>>> from capdistill import decoders
>>> "lstm" in decoders.names()
True
"""

from __future__ import annotations

from capdistill.decoders.base import Decoder
from capdistill.registry import Registry

registry: Registry[Decoder] = Registry(
    "decoder",
    "capdistill.decoders",
    Decoder,
    {
        "lstm": "capdistill.decoders.lstm:LSTMDecoder",
        "transformer": "capdistill.decoders.transformer:TransformerDecoder",
    },
)

register = registry.register
create = registry.create
get = registry.get
names = registry.names
describe = registry.describe

__all__ = ["Decoder", "create", "describe", "get", "names", "register", "registry"]
