"""Named sets of losses, weights and options, to be unpacked into a `Distiller`."""

from __future__ import annotations

import copy
from typing import Any

from capdistill.errors import UnknownName, suggest

_RECIPES: dict[str, dict[str, Any]] = {
    "reference": {
        "losses": {
            "token": {"name": "token", "temperature": 4.0},
            "feature": {"name": "feature"},
            "hidden": {"name": "hidden"},
        },
        "weights": {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1},
        "epochs": 30,
        "batch_size": 16,
        "captions_per_image": 1,
        "learning_rate": 2e-4,
        "encoder_rate": 0.1,
        "weight_decay": 0.01,
        "schedule": "cosine_restarts",
        "label_smoothing": 0.0,
    },
}


def recipe(name: str) -> dict[str, Any]:
    """The keyword arguments of a `Distiller` that a name stands for.

    Example:
        >>> recipe("reference")["weights"]
        {'ce': 0.3, 'token': 0.7, 'feature': 0.2, 'hidden': 0.1}

    `Distiller(teacher, student, **recipe("reference"))` trains by it; change what you like:
    `{**recipe("reference"), "epochs": 10}`.

    Raises:
        UnknownName: no such recipe; the message lists them.
    """
    if name not in _RECIPES:
        raise UnknownName(f"There is no recipe '{name}'. {suggest(name, _RECIPES)}")
    return copy.deepcopy(_RECIPES[name])
