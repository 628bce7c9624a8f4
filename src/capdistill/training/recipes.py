"""Recipes by name: losses, weights, options and models that were published or measured."""

from __future__ import annotations

import copy
from typing import Any

from capdistill.errors import UnknownName, suggest
from capdistill.training.config import DEFAULT_WEIGHTS

_RECIPES: dict[str, dict[str, Any]] = {
    "kd_2024": {
        "losses": {
            "token": {"name": "token", "temperature": 4.0},
            "feature": {"name": "feature"},
            "hidden": {"name": "hidden"},
        },
        "weights": DEFAULT_WEIGHTS,
        "epochs": 30,
        "batch_size": 16,
        "captions_per_image": 1,
        "learning_rate": 2e-4,
        "encoder_lr_scale": 0.1,
        "weight_decay": 0.01,
        "schedule": "cosine_restarts",
        "label_smoothing": 0.0,
    },
    "flickr8k_small": {
        "losses": {
            "token": {"name": "token", "temperature": 4.0},
            "feature": {"name": "feature", "match": "pooled"},
            "hidden": {"name": "hidden"},
        },
        "weights": DEFAULT_WEIGHTS,
        "epochs": 12,
        "batch_size": 16,
        "captions_per_image": 5,
        "learning_rate": 1.5e-3,
        "encoder_lr_scale": 1.0,  # only its last stage is trained
        "weight_decay": 0.05,
        "schedule": "warmup_cosine",
        "label_smoothing": 0.1,
        "cache_features": True,
        "cache_views": 4,
        "flip": True,
    },
}

# What the stages of "best_small" share: views of every image, on cached maps.
_SUPERVISED: dict[str, Any] = {
    "batch_size": 16,
    "cache_features": True,
    "cache_views": 4,
    "encoder_lr_scale": 1.0,
    "flip": True,
    "patience": None,
    "captions_per_image": 5,
    "label_smoothing": 0.1,
    "schedule": "warmup_cosine",
    "weight_decay": 0.05,
    "word_dropout": 0.1,
}
_RECIPES["best_small"] = {
    "stages": [
        {
            **_SUPERVISED,
            "method": "train",
            "name": "cross-entropy",
            "epochs": 12,
            "learning_rate": 1.5e-3,
        },
        {
            **_SUPERVISED,
            "method": "distill",
            "name": "sequences",
            "captions": {"beam_size": 5, "num_return": 3, "mix": 2},
            "losses": {
                "token": {"name": "token", "temperature": 1.0},
                "feature": {"name": "feature", "match": "pooled", "teacher": 0},
            },
            "weights": {"ce": 0.3, "token": 0.7, "feature": 0.2},
            "ema_decay": 0.998,
            "epochs": 12,
            "learning_rate": 1e-3,
        },
    ],
}

# The models of a recipe that is a whole run: a teacher, a student by cross-entropy alone and the
# same student distilled, on cached features with the last stage of each encoder trained.
_MODELS: dict[str, dict[str, Any]] = {
    "flickr8k_small": {
        "tokenizer": {"min_count": 5},
        "teacher": {
            "encoder": ("timm", {"name": "tf_efficientnet_lite2", "dim": 512}),
            "decoder": ("lstm", {"dim": 512, "hidden": 512, "layers": 2, "dropout": 0.4}),
        },
        "student": {
            "encoder": ("timm", {"name": "tf_efficientnet_lite0", "dim": 256}),
            "decoder": ("lstm", {"dim": 256, "hidden": 512, "layers": 1, "dropout": 0.4}),
        },
        "encoder": {"trainable": 1, "dropout": 0.1},
    },
}
_MODELS["best_small"] = {
    key: _MODELS["flickr8k_small"][key] for key in ("tokenizer", "student", "encoder")
}
RECIPES = tuple(_RECIPES)  # the names


def recipe(name: str) -> dict[str, Any]:
    """A recipe by name, as keyword arguments of `Distiller`, or of `run_stages` if it has stages.

    Example:
        >>> recipe("kd_2024")["weights"]
        {'ce': 0.3, 'token': 0.7, 'feature': 0.2, 'hidden': 0.1}

    `Distiller(teacher, student, **recipe("kd_2024"))` uses it. To change an option, write
    `{**recipe("kd_2024"), "epochs": 10}`.

    - "kd_2024" is the published recipe that this library started from: a ViT-Transformer teacher
      and a CNN-LSTM student, token KL at T = 4. The numbers it states are expectations, not
      measurements.
    - "flickr8k_small" is one distillation on Flickr8k, from a teacher that it trains too.
    - "best_small" trains a small student in two stages: cross-entropy; then the captions, words and
      pooled features of a teacher. The teacher must be given: best an ensemble of captioners after
      self-critical training, whose first member has the features. docs/results.md measures it.

    Raises:
        UnknownName: there is no such recipe; the message lists the available ones.
    """
    if name not in tuple(_RECIPES):  # it may not be hashable
        raise UnknownName(f"There is no recipe '{name}'. {suggest(name, _RECIPES)}")
    return copy.deepcopy(_RECIPES[name])


def recipe_models(name: str) -> dict[str, Any] | None:
    """The models of a recipe, as components by name; None for a recipe without models.

    Example:
        >>> recipe_models("flickr8k_small")["teacher"]["decoder"][0]
        'lstm'

    Returns:
        `{"tokenizer": options of WordTokenizer.train, "teacher": {"encoder": (name, arguments),
        "decoder": (name, arguments)}, "student": the same}`; without a teacher where it is given.
    """
    if name not in tuple(_MODELS):  # the same
        return None
    found = copy.deepcopy(_MODELS[name])
    shared = found.pop("encoder")
    for role in {"teacher", "student"} & found.keys():
        kind, arguments = found[role]["encoder"]
        found[role]["encoder"] = (kind, {**arguments, **shared})
    return found
