"""Options and data: what `fit` would refuse, and what is wrong with images and captions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.compatibility import image_size
from capdistill.data.loader import FixedBatches, Source
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.training.check.report import CheckRow
from capdistill.training.check.trial import Trial, has_frozen_trunk
from capdistill.training.run import prepare_sources, wants_crops
from capdistill.training.validation import require_references

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_READ = 4  # batches read to see how long that takes
_LOOKED_AT = 8  # images whose size is looked at
_CAPTIONS = 20_000  # captions whose words are counted
_TRUNCATED, _UNKNOWN = 0.01, 0.05  # shares of captions and of words that are worth a note


def check_options(trainer: Trainer, val: Any) -> Iterator[CheckRow]:
    """Device, precision, monitor and caching, as `fit` would choose or refuse them."""
    config = trainer.config
    if not hasattr(trainer, "device"):
        trainer._place()
    trainer._make_monitor(val)
    wants_crops(config)
    if config.cache_features and not any(has_frozen_trunk(model) for model in trainer.models):
        raise ConfigError(
            "cache_features=True but no model has a frozen trunk. Create the encoder with "
            "trainable='none', or set cache_features=False."
        )
    size = f"{config.batch_size} images x {config.captions_per_image or 'up to 5'} captions"
    yield CheckRow("options", "ok", f"{trainer.device}, {trainer.precision}, batches of {size}")


def check_data(trial: Trial, train: Any, val: Any) -> Iterator[CheckRow]:
    """Read some batches, in this process, and look at images and captions."""
    trial.source, val_source = prepare_sources(trial.trainer, train, val)
    began = time.perf_counter()
    for batch in islice(trial.source.epoch(0), _READ):
        trial.read.append(batch)
        began = time.perf_counter() if len(trial.read) == 1 and len(trial.source) > 1 else began
    if not trial.read:
        raise DataError("No usable training image. Give a data set with at least one.")
    timed = max(len(trial.read) - 1, 1)
    trial.load_seconds = (time.perf_counter() - began) / timed
    trial.batch = trial.read[0]
    images = sum(batch.num_images for batch in trial.read)
    yield CheckRow("data", "ok", f"{len(trial.source)} batches an epoch; {images} images read")
    yield from _check_unreadable(trial, trial.source, train)
    yield from _check_image_sizes(trial, train)
    yield from _check_captions(trial, "train", train, trial.read)
    if val_source is not None:
        yield from _check_validation(trial, val, val_source)


def _check_unreadable(trial: Trial, source: Source, data: Any) -> Iterator[CheckRow]:
    files = [Path(example.path) for example in getattr(data, "examples", ())]
    missing = [path for path in files if not path.exists()]
    fix = "Mend or remove them; with errors='skip' they are left out, errors='raise' stops."
    if missing:
        finding = f"{len(missing)} of {len(files)} image files are missing, first {missing[0]}"
        yield CheckRow("images", "fail" if trial.config.errors == "raise" else "note", finding, fix)
    elif len(source.skipped):
        finding = f"{len(source.skipped)} of the images read can not be used: "
        yield CheckRow("images", "note", finding + str(next(iter(source.skipped))), fix)


def _check_image_sizes(trial: Trial, data: Any) -> Iterator[CheckRow]:
    """Images smaller than what the models work at are blown up: time spent on no detail."""
    sides = _sides(trial, data)
    wanted = image_size(trial.trainer.models)
    small = [side for side in sides if side < wanted]
    if small:
        finding = (
            f"{len(small)} of {len(sides)} images looked at are smaller than the {wanted} pixels "
            f"that the models work at (smallest side {min(small)}): they are upscaled"
        )
        fix = f"Give larger images, or choose encoders with image_size={min(small)} or less."
        yield CheckRow("images", "note", finding, fix)
    elif sides:
        yield CheckRow("images", "ok", f"none of {len(sides)} looked at is upscaled to {wanted}")


def _sides(trial: Trial, data: Any) -> list[int]:
    """The smaller side of some images as the data set holds them."""
    if isinstance(trial.source, FixedBatches):
        return [side for side in (min(b.images.shape[-2:]) for b in trial.read) if side]
    from capdistill.data import read_image

    sides = []
    for number in range(0, len(data), max(len(data) // _LOOKED_AT, 1))[:_LOOKED_AT]:
        try:
            sides.append(min(read_image(data[number][0]).shape[1:]))
        except DataError:
            continue
    return sides


def _check_captions(
    trial: Trial, name: str, data: Any, batches: Iterable[Batch]
) -> Iterator[CheckRow]:
    """Captions that are cut, and words that the vocabulary lacks."""
    captions = getattr(data, "captions", None)
    if captions is None:
        captions = [caption for batch in batches for caption in batch.captions]
    captions = captions[:: len(captions) // _CAPTIONS + 1]
    tokenizer: Any = trial.trainer.captioner.tokenizer
    cut = _count_truncated(tokenizer, captions)
    unknown, words = getattr(tokenizer, "count_unknown", lambda captions: (0, 0))(captions)
    finding = f"{name}: {cut} of {len(captions)} captions are cut"
    finding += f", {unknown / words:.1%} of the words are unknown" if words else ""
    fixes = ["Train the tokenizer with a larger max_length."] * (cut > _TRUNCATED * len(captions))
    fixes += ["Train the tokenizer on more captions, or with a smaller min_count."] * (
        unknown > _UNKNOWN * words
    )
    yield CheckRow("captions", "note" if fixes else "ok", finding, " ".join(fixes))


def _count_truncated(tokenizer: Any, captions: list[str]) -> int:
    if hasattr(tokenizer, "count_truncated"):
        return int(tokenizer.count_truncated(captions))
    return sum(tokenizer.encode(caption)[-1] != tokenizer.end_id for caption in captions)


def _check_validation(trial: Trial, data: Any, source: Source) -> Iterator[CheckRow]:
    batches = list(islice(source.epoch(0), 1))
    if not batches:
        raise DataError("No usable validation image. Give a data set with at least one.")
    require_references(batches[0])
    yield from _check_captions(trial, "val", data, batches)
