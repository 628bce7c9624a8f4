"""What the checks share: the trainer, a batch, and words for numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.compatibility import probe_batch
from capdistill.data.loader import Source
from capdistill.outputs import Batch

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_CAPTIONS = 5  # of an image at most, where the data decide
_WORDS = 12  # of a made-up caption, the median of Flickr8k with its two ends


@dataclass
class Trial:
    """What the checks share.

    Args:
        trainer: Whose run is checked; its configuration is the one for reading in this process.
        config: The configuration of the run.
        batch: Real, or made up where there are no data.
        source: Where it came from, if it is real.
        load_seconds, step_seconds: Of one batch; NaN until measured.
    """

    trainer: Trainer
    config: Any
    batch: Batch
    source: Source | None = None
    load_seconds: float = math.nan
    step_seconds: float = math.nan
    read: list[Batch] = field(default_factory=list)

    @property
    def roles(self) -> dict[str, Any]:
        """The models by what they do."""
        names = ("student", "teacher") if len(self.trainer.models) == 2 else ("model",)
        return dict(zip(names, self.trainer.models, strict=True))

    @property
    def need(self) -> frozenset[str]:
        """What the losses ask of the models."""
        return self.trainer.objective.need


def made_up_batch(trainer: Trainer) -> Batch:
    """Noise and random words, of the configured size; the caller's chance is not touched."""
    probe = probe_batch(trainer.captioner, trainer.models)
    images, tokenizer = trainer.config.batch_size, trainer.captioner.tokenizer
    rows = images * (trainer.config.captions_per_image or _CAPTIONS)
    ids = torch.randint(len(tokenizer.vocabulary), (rows, _WORDS))
    ids[:, 0], ids[:, -1] = tokenizer.start_id, tokenizer.end_id
    shape = (images, *probe.images.shape[1:])
    return replace(
        probe,
        images=torch.randint(256, shape, dtype=torch.uint8),
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        captions=("",) * rows,
        image_ids=tuple(str(number) for number in range(images)),
    )


def name_of(model: Any) -> str:
    """How messages call a model."""
    return getattr(model, "name", type(model).__name__)


def has_frozen_trunk(model: Any) -> bool:
    """Whether the model's trunk tokens could be cached."""
    return isinstance(model, Captioner) and model.encoder.trunk_frozen


def numel(parameters: Iterable[Tensor]) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel() for parameter in parameters)


def bytes_of(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


_NAMED = 20  # parameters in a message


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def millions(count: int) -> str:
    """A count, in millions where it is large."""
    return f"{count / 1e6:.2f} M" if count >= 1e4 else str(count)


def megabytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds as whole milliseconds."""
    return f"{seconds * 1e3:.0f} ms"


def less_memory(config: Any) -> str:
    """How to get along with less memory."""
    half = max(config.batch_size // 2, 1)
    return (
        f"Set batch_size={half} (now {config.batch_size}) and accumulate={2 * config.accumulate}, "
        "which train the same; or precision='bf16', a smaller encoder, or a frozen trunk with "
        "cache_features=True."
    )
