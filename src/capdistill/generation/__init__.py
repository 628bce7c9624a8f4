"""Captions word by word, over `Decoder.start` and `Decoder.step` alone.

>>> from capdistill.generation import GenerationConfig
>>> GenerationConfig(beam_size=3).length_normalisation
'average'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capdistill.generation.config import GenerationConfig, Plan
    from capdistill.generation.decode import beam_search, generate, greedy
    from capdistill.generation.hypotheses import Hypothesis

_PUBLIC = {
    "GenerationConfig": "config",
    "Hypothesis": "hypotheses",
    "Plan": "config",
    "beam_search": "decode",
    "generate": "decode",
    "greedy": "decode",
}
__all__ = ["GenerationConfig", "Hypothesis", "Plan", "beam_search", "generate", "greedy"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"capdistill.generation.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'capdistill.generation' has no attribute '{name}'")
