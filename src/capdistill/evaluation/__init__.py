"""Evaluate captioners and compare a student with its teacher: scores, size, time, memory."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Comparison": "comparison",
    "Evaluation": "evaluation",
    "compare": "comparison",
    "evaluate": "evaluation",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = importlib.import_module(f"capdistill.evaluation.{_PUBLIC[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'capdistill.evaluation' has no attribute '{name}'")
