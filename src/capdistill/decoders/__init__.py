"""Decoders by name: visual tokens and words to the next word. A new one subclasses `Decoder`.

>>> from capdistill import decoders
>>> "lstm" in decoders.names()
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.decoders.base import Decoder as Decoder
from capdistill.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from capdistill.decoders.base import DecoderState as DecoderState
    from capdistill.decoders.lstm import LSTMDecoder as LSTMDecoder
    from capdistill.decoders.transformer import TransformerDecoder as TransformerDecoder
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "DecoderState": "base",
            "LSTMDecoder": "lstm",
            "TransformerDecoder": "transformer",
        },
        "Decoder",
        "create",
        "describe",
        "get",
        "names",
        "register",
        "registry",
    )

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
