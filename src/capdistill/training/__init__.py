"""Training: `Trainer` for cross-entropy alone, `Distiller` for a student with a teacher."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Distiller": "distiller",
    "DistillConfig": "config",
    "History": "history",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "recipe": "config",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"capdistill.training.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'capdistill.training' has no attribute '{name}'")
