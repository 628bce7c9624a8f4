"""The difficulty of images for a model: one pass over the data, for a `Curriculum`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from capdistill.compatibility import image_size
from capdistill.data.curriculum import image_ids, with_mean
from capdistill.data.loader import Loader
from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.losses.divergence import cross_entropy, valid_rows
from capdistill.outputs import LOGITS, Batch
from capdistill.progress import progress as report_progress
from capdistill.runtime import autocast, on_device, pick_device

_KINDS = ("loss", "entropy")


def model_difficulty(
    model: Any,
    data: Any,
    kind: Literal["loss", "entropy"] = "loss",
    *,
    batch_size: int = 64,
    captions_per_image: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> dict[str, float]:
    """How difficult every image is for a teacher, or for the student as it is now.

    Example:
        >>> import capdistill as cd
        >>> train = cd.data.sample().train.subset(4)
        >>> tokenizer = cd.WordTokenizer.train(train.captions, min_count=2)
        >>> teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> values = model_difficulty(teacher, train, device="cpu")
        >>> curriculum = cd.data.Curriculum(train, values, start=0.5)
        >>> len(values), curriculum.available(0, epochs=10)
        (4, 2)

    Args:
        model: A captioner, or the result of `capdistill.teachers.wrap`; flags are restored.
        data: A data set or sequence of (image, captions) pairs.
        kind: "loss", the mean negative log-likelihood (nats per token) of the captions; "entropy",
            the mean entropy (nats) of the model's distribution of the next word along them.
        batch_size: Images per batch.
        captions_per_image: The first k captions of an image are read; by default as many as the
            first image has, at most 5.
        device, precision: As in `TrainConfig`.
        progress: Show progress.

    Returns:
        Image id -> difficulty. An image without captions, or one that cannot be read (which
        training leaves out), gets the mean of the others.

    Raises:
        ConfigError: no captioner, or one that gives no logits.
        UnknownName: there is no such kind.
        DataError: no image that can be read has a caption.
    """
    if kind not in _KINDS:
        raise UnknownName(f"model_difficulty: no kind {kind!r}. {suggest(str(kind), _KINDS)}")
    usable = isinstance(model, nn.Module) and hasattr(model, "tokenizer")
    if not usable:
        raise ConfigError(
            f"model_difficulty: the model is {type(model).__name__}. Give a capdistill.Captioner, "
            "teachers.wrap(...), or an ensemble of them."
        )
    place = pick_device(device)
    loader = Loader(
        data,
        model.tokenizer,
        image_size=image_size(model),
        batch_size=batch_size,
        captions_per_image=captions_per_image,
    )
    found: dict[str, float] = {}
    batches = report_progress(
        loader.epoch(0), len(loader), "Measuring difficulty", unit="batch", show=progress
    )
    with on_device([model], place), torch.no_grad():
        for batch in batches:
            batch = batch.to(place)
            with autocast(place, precision):
                logits = model(batch, need=LOGITS).logits
            if logits is None:
                raise ConfigError("model_difficulty: the model gives no logits to measure.")
            found |= _per_image(logits, batch, kind)
    return with_mean(found, image_ids(data))


def _per_image(logits: Tensor, batch: Batch, kind: str) -> dict[str, float]:
    """The mean over the tokens of all captions of each image that has any."""
    k, values = batch.captions_per_image, {}
    for number, name in enumerate(batch.image_ids):
        rows = slice(number * k, (number + 1) * k)
        mask = batch.target_mask[rows]
        if not mask.any():
            continue
        if kind == "loss":
            total = cross_entropy(logits[rows], batch.targets[rows], mask)
        else:
            log_probs = valid_rows(logits[rows], mask).log_softmax(-1)  # (tokens, V)
            total = torch.special.entr(log_probs.exp()).sum()
        values[name] = float(total / mask.sum())
    return values
