"""Caption generation, word by word, with `Decoder.start` and `Decoder.step` alone.

>>> from capdistill.generation import GenerationConfig
>>> GenerationConfig(beam_size=3).length_normalisation
'average'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.generation.config import GenerationConfig as GenerationConfig
    from capdistill.generation.config import GenerationSpec as GenerationSpec
    from capdistill.generation.decode import beam_search as beam_search
    from capdistill.generation.decode import generate as generate
    from capdistill.generation.decode import greedy as greedy
    from capdistill.generation.hypotheses import Hypothesis as Hypothesis
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "GenerationConfig": "config",
            "GenerationSpec": "config",
            "Hypothesis": "hypotheses",
            "beam_search": "decode",
            "generate": "decode",
            "greedy": "decode",
        },
    )
