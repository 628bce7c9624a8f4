"""Every option of a training run, checked when given and written beside the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from capdistill.errors import UnknownName, suggest
from capdistill.errors import parse as parse
from capdistill.generation.config import GenerationConfig


class TrainConfig(BaseModel):
    """Options of `Trainer`; each may be given to the constructor or to `fit`.

    Example:
        >>> TrainConfig(epochs=3).batch_size
        16

    Args:
        epochs: Each is every training image once.
        batch_size: Images a step (times `captions_per_image` captions, times `accumulation_steps`).
        captions_per_image: Captions of an image in one batch; the image is encoded once for all.
            None is as many as the images usually have, at most 5.
        learning_rate: Peak rate of AdamW.
        encoder_lr_scale: The encoder trunk's rate as a share of `learning_rate`.
        weight_decay: Not on norms, biases and embeddings.
        schedule: "cosine_restarts", "warmup_cosine" or "constant"; stepped every optimizer step.
        restart_epochs: Length of the first cosine period.
        restart_factor: How much longer each following period is.
        warmup: Share of all steps that "warmup_cosine" climbs.
        precision: "auto", "bf16", "fp16" (CUDA) or "fp32".
        accumulation_steps: Batches a step; a short last group counts for what it holds.
        max_grad_norm: Largest gradient norm, or None.
        label_smoothing: Of the cross-entropy term, never of the teacher's targets.
        word_dropout: Probability that the trained model reads a word as the unknown one. Targets
            and what a teacher reads stay as they are.
        scheduled_sampling: Probability, at the end of the run, that it reads a word of its own in
            place of the reference's; grows evenly from 0. The decoder runs twice a step.
        patience: Epochs without progress before training stops, or None.
        monitor: Score that decides what is best: "cider", "bleu_4", ..., or "loss".
        seed: Of shuffling, choice of captions, augmentation and dropout.
        num_workers: Processes that read images.
        device: "auto", "cpu", "cuda", ...
        augment: Random crops of training images; None is yes unless features are cached.
        flip: Mirror half of the training images; captions say left and right, so off.
        cache_images: Keep decoded images in memory.
        cache_features: Encode each image once where the trunk is frozen.
        cache_views: Views of a training image that `cache_features` encodes, the centre and random
            crops (mirrored with `flip`); the epochs take them in turn.
        cache_dir: Where cached features lie; a folder of the user's cache unless given.
        errors: "skip" names unreadable images and goes on; "raise" stops.
        eval_batch_size: Images a batch in validation.
        generation: How validation captions, a `GenerationConfig` or its options; None is greedy.
        log_every: Steps between two rows of the history.
        progress: Progress bar; None is only on a terminal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(16, ge=1)
    captions_per_image: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    encoder_lr_scale: float = Field(0.1, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["cosine_restarts", "warmup_cosine", "constant"] = "cosine_restarts"
    restart_epochs: int = Field(10, ge=1)
    restart_factor: int = Field(2, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    accumulation_steps: int = Field(1, ge=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    word_dropout: float = Field(0.0, ge=0, lt=1)
    scheduled_sampling: float = Field(0.0, ge=0, le=1)
    patience: int | None = Field(7, ge=1)
    monitor: str = "cider"
    seed: int = 0
    num_workers: int = Field(0, ge=0)
    device: str = "auto"
    augment: bool | None = None
    flip: bool = False
    cache_images: bool = False
    cache_features: bool = False
    cache_views: int = Field(1, ge=1)
    cache_dir: str | None = None
    errors: Literal["skip", "raise"] = "skip"
    eval_batch_size: int = Field(64, ge=1)
    generation: GenerationConfig | None = None
    log_every: int = Field(10, ge=1)
    progress: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_decoding(cls, values: Any) -> Any:
        """Fields of `GenerationConfig` may stand beside those of training: `fit(beam_size=3)`."""
        own = cls.model_fields.keys()
        loose = {n: v for n, v in values.items() if n in GenerationConfig.model_fields.keys() - own}
        if not loose:
            return values
        given = values.get("generation") or {}
        whole = given if isinstance(given, Mapping) else given.model_dump(exclude_unset=True)
        rest = {name: value for name, value in values.items() if name not in loose}
        return {**rest, "generation": {**whole, **loose}}


class DistillConfig(TrainConfig):
    """Options of `Distiller`: those of `Trainer` with a higher rate.

    Example:
        >>> DistillConfig().learning_rate
        0.0002
    """

    learning_rate: float = Field(2e-4, gt=0)


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
        "encoder_lr_scale": 0.1,
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
