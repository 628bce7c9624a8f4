"""Distil large image captioners into small, fast ones.

>>> import capdistill as cd
>>> cd.losses.create("token", temperature=2.0).temperature
2.0
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Batch": "outputs",
    "Captioner": "captioner",
    "CaptionerOutput": "outputs",
    "Decoder": "decoders.base",
    "DecoderOutput": "outputs",
    "DistillationLoss": "losses.base",
    "Distiller": "training.distiller",
    "Encoder": "encoders.base",
    "FeatureKD": "losses.feature",
    "GenerationConfig": "generation.config",
    "HiddenKD": "losses.hidden",
    "ModelSpec": "outputs",
    "TokenKD": "losses.token",
    "Trainer": "training.trainer",
    "WordTokenizer": "tokenizer",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.evaluation",
    "presets": "presets",
}
_PACKAGES = (
    "data",
    "decoders",
    "encoders",
    "errors",
    "losses",
    "metrics",
    "plots",
    "teachers",
    "training",
)

__version__ = "0.1.0"
__all__ = [*_PUBLIC, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES or name == "presets":
        return importlib.import_module(f"capdistill.{name}")
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"capdistill.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'capdistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
