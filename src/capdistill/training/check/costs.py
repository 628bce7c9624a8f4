"""What a step costs: memory, time, and waiting for data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capdistill.compatibility import image_size
from capdistill.data.loader import Loader
from capdistill.data.rows import accept_rows
from capdistill.data.source import FixedBatches, Source
from capdistill.data.workers import default_num_workers, require_picklable, worker_start_method
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.runtime import autocast
from capdistill.training.check.trial import (
    CheckRow,
    Trial,
    bytes_of,
    has_frozen_stages,
    less_memory,
    megabytes,
    milliseconds,
)
from capdistill.training.sources import (
    is_changed,
    open_sources,
    require_captions,
    wants_crops,
)
from capdistill.training.validation import add_references

if TYPE_CHECKING:
    from capdistill.training.step import Stepper


_WAIT = 0.25  # share of a step that may be spent waiting for data
_FULL = 0.9  # share of the memory that a step may fill


def check_memory(trial: Trial) -> Iterator[CheckRow]:
    """Memory of a step: counted, and on CUDA also the allocator's peak."""
    trainer, device = trial.trainer, trial.trainer.device
    weights = bytes_of(trainer.objective)
    trained = [p for p in trainer.objective.parameters() if p.requires_grad]
    per_step = 3 * sum(p.numel() * p.element_size() for p in trained)  # gradients, two moments
    kept = bytes_kept_for_backward(trainer, trial.batch)
    yield CheckRow(
        "memory",
        "ok",
        f"{next(iter(trial.roles))}: weights {megabytes(weights)}, gradients and AdamW "
        f"{megabytes(per_step)}, activations kept for backward {megabytes(kept)}",
    )
    total = weights + per_step + kept
    if "teacher" in trial.roles:
        theirs = bytes_of(trial.roles["teacher"])
        total += theirs
        yield CheckRow("memory", "ok", f"teacher: weights {megabytes(theirs)}, no gradients")
    method = "an estimate: the sum of the above"
    if device.type == "cuda":
        total, method = (
            max(total, _cuda_peak(trial)),
            "the allocator's peak, or the sum of the above",
        )
    yield from _against_memory(trial, total, method)


def _against_memory(trial: Trial, total: int, method: str) -> Iterator[CheckRow]:
    available = _memory_of(trial.trainer.device)
    finding = f"a step needs about {megabytes(total)} ({method})"
    finding += f" of {megabytes(available)}" if available else ""
    full = available is not None and total > _FULL * available
    fix = less_memory(trial.config) if full else ""
    yield CheckRow("memory", "fail" if full else "ok", finding, fix)


def bytes_kept_for_backward(trainer: Stepper, batch: Batch) -> int:
    """Bytes of distinct tensors that autograd saves in one forward pass, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in trainer.objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = trainer.terms(batch)
    del terms
    return sum(kept.values())


def _cuda_peak(trial: Trial) -> int:
    """The allocator's peak over a forward and backward, with AdamW's moments added."""
    trainer = trial.trainer
    torch.cuda.reset_peak_memory_stats(trainer.device)
    _forward_backward(trial)
    trained = (p for p in trainer.objective.parameters() if p.requires_grad)
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)
    return torch.cuda.max_memory_allocated(trainer.device) + moments


def _memory_of(device: torch.device) -> int | None:
    """Bytes of the device's memory, or None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_time(trial: Trial) -> Iterator[CheckRow]:
    """Seconds for a step, for the teacher's forward in it, and for reading its batch."""
    trainer, batch = trial.trainer, trial.batch
    trial.step_seconds = _seconds(trainer.device, lambda: _forward_backward(trial))
    rate = f"{batch.num_images / trial.step_seconds:.0f} images/s"
    finding = f"forward and backward: {milliseconds(trial.step_seconds)} per batch of "
    yield CheckRow("time", "ok", f"{finding}{batch.num_images} images, {rate}")
    if "teacher" in trial.roles and len(trainer.objective.losses):
        moved = batch.to(trainer.device)
        teaching = _seconds(trainer.device, lambda: _teach(trainer, moved))
        share = teaching / trial.step_seconds
        finding = f"the teacher's forward takes {milliseconds(teaching)} of it ({share:.0%})"
        yield CheckRow("time", "ok", finding)
    if trial.source is not None:
        yield from _check_loading(trial)


def _check_loading(trial: Trial) -> Iterator[CheckRow]:
    """Time that a step waits for its batch: the whole reading time without workers."""
    config, load, step = trial.config, trial.load_seconds, trial.step_seconds
    workers = _workers(trial)
    wait = load if workers == 0 else max(load / workers - step, 0.0)
    finding = (
        f"reading a batch takes {milliseconds(load)} in one process "
        f"(num_workers={workers}); a step of "
        f"{milliseconds(step)} waits {milliseconds(wait)}"
    )
    if config.cache_images or config.cache_features:
        yield CheckRow("loading", "ok", f"{finding}, in the first epoch only (cached)")
    elif wait <= _WAIT * step:
        yield CheckRow("loading", "ok", finding)
    else:
        yield CheckRow("loading", "note", finding, _faster_loading(trial, load / step))


def _workers(trial: Trial) -> int:
    """Number of workers that `fit` uses for reading."""
    given, source = trial.config.num_workers, trial.source
    if given is None and isinstance(source, Loader) and not trial.config.cache_images:
        return default_num_workers(source.data, source.batch_size)
    return given or 0


def _faster_loading(trial: Trial, needed: float) -> str:
    workers = max(1, min(math.ceil(needed), os.cpu_count() or 1))
    options = [f"num_workers={workers}"] if workers > _workers(trial) else []
    options += ["cache_images=True", "smaller image files"]
    trainer = trial.trainer
    if any(
        has_frozen_stages(model, is_changed(model, trainer.captioner)) for model in trainer.models
    ):
        options.insert(-1, "cache_features=True (stages are frozen)")
    return f"Try {', '.join(options[:-1])} or {options[-1]}."


def _forward_backward(trial: Trial) -> None:
    trainer = trial.trainer
    trainer.objective.zero_grad(set_to_none=True)
    loss = torch.stack([term.weighted for term in trainer.terms(trial.batch).values()]).sum()
    trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]


def _teach(trainer: Stepper, batch: Batch) -> None:
    with autocast(trainer.device, trainer.precision):
        trainer.teacher_output(batch)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    """Seconds of the faster of two runs; earlier checks have warmed up the model."""
    times = []
    for _ in range(2):
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_READ = 4  # batches read to measure the reading time
_LOOKED_AT = 8  # images whose size is checked
_CAPTIONS = 20_000  # captions whose words are counted
_TRUNCATED, _UNKNOWN = 0.01, 0.05  # shares of captions and of words above which a note is given


def check_options(trainer: Stepper, val: Any) -> Iterator[CheckRow]:
    """Device, precision, monitor and caching, as `fit` would choose or reject them."""
    config = trainer.config
    trainer.make_monitor()
    wants_crops(config)
    if config.cache_features and not any(
        has_frozen_stages(model, is_changed(model, trainer.captioner)) for model in trainer.models
    ):
        raise ConfigError(
            "cache_features=True but no encoder has frozen stages that can be cached. Create "
            "it with trainable='none' or a number of last stages, or set cache_features=False."
        )
    size = f"{config.batch_size} images x {config.captions_per_image or 'up to 5'} captions"
    yield CheckRow("options", "ok", f"{trainer.device}, {trainer.precision}, batches of {size}")


def check_data(trial: Trial, train: Any, val: Any) -> Iterator[CheckRow]:
    """Read some batches in this process and check images and captions."""
    train, val = accept_rows(train), accept_rows(val)
    trial.trainer.prepare_data(train)
    trial.source, val_source = open_sources(trial.trainer, train, val)
    began = time.perf_counter()
    for batch in islice(trial.source.epoch(0), _READ):
        trial.read.append(batch)
        began = time.perf_counter() if len(trial.read) == 1 and len(trial.source) > 1 else began
    if not trial.read:
        raise DataError("No usable training image. Pass a data set with at least one.")
    timed = max(len(trial.read) - 1, 1)
    trial.load_seconds = (time.perf_counter() - began) / timed
    trial.batch = trial.read[0]
    images = sum(batch.num_images for batch in trial.read)
    yield CheckRow("data", "ok", f"{len(trial.source)} batches per epoch; {images} images read")
    if trial.config.num_workers and worker_start_method(None) != "fork":
        require_picklable(train, "train")
        require_picklable(val, "val")
    yield from _check_unreadable(trial, trial.source, train)
    yield from _check_image_sizes(trial, train)
    yield from _check_captions(trial, "train", train, trial.read)
    require_captions(trial.trainer, trial.batch, trial.source, val_source)
    if val_source is not None:
        yield from _check_validation(trial, val, val_source)


def _check_unreadable(trial: Trial, source: Source, data: Any) -> Iterator[CheckRow]:
    files = [Path(example.path) for example in getattr(data, "examples", ())]
    missing = [path for path in files if not path.exists()]
    fix = "Fix or remove them; errors='skip' leaves them out, errors='raise' stops."
    if missing:
        finding = f"{len(missing)} of {len(files)} image files are missing, first {missing[0]}"
        yield CheckRow("images", "fail" if trial.config.errors == "raise" else "note", finding, fix)
    elif len(source.skipped):
        finding = f"{len(source.skipped)} of the images read cannot be used: "
        yield CheckRow("images", "note", finding + str(next(iter(source.skipped))), fix)


def _check_image_sizes(trial: Trial, data: Any) -> Iterator[CheckRow]:
    """Images smaller than the models' input are upscaled, which costs time and adds no detail."""
    sides = _sides(trial, data)
    wanted = image_size(*trial.trainer.models)
    small = [side for side in sides if side < wanted]
    if small:
        finding = (
            f"{len(small)} of {len(sides)} checked images are smaller than the {wanted} pixels "
            f"that the models read (smallest side {min(small)}): they are upscaled"
        )
        fix = f"Use larger images, or choose encoders with image_size={min(small)} or less."
        yield CheckRow("images", "note", finding, fix)
    elif sides:
        yield CheckRow(
            "images", "ok", f"none of {len(sides)} checked images is upscaled to {wanted}"
        )


def _sides(trial: Trial, data: Any) -> list[int]:
    """The smaller side of some images as they are in the data set."""
    if isinstance(trial.source, FixedBatches):
        return [side for side in (min(b.images.shape[-2:]) for b in trial.read) if side]
    from capdistill.data import read_image

    sides = []
    for number in range(0, len(data), max(len(data) // _LOOKED_AT, 1))[:_LOOKED_AT]:
        try:
            sides.append(min(read_image(data[number][0]).shape[1:]))
        except Exception:  # `fit` skips such an item and reports it
            continue
    return sides


def _check_captions(
    trial: Trial, name: str, data: Any, batches: Iterable[Batch]
) -> Iterator[CheckRow]:
    """Captions that are cut, and words missing from the vocabulary."""
    captions = getattr(data, "captions", None)
    if captions is None:
        captions = [caption for batch in batches for caption in batch.captions]
    if not captions:
        return
    captions = captions[:: len(captions) // _CAPTIONS + 1]
    tokenizer: Any = trial.trainer.captioner.tokenizer
    cut = _count_truncated(tokenizer, captions)
    unknown, words = getattr(tokenizer, "count_unknown", lambda captions: (0, 0))(captions)
    finding = f"{name}: {cut} of {len(captions)} captions are cut"
    kind = "pieces" if hasattr(tokenizer, "word_forms") else "words"
    finding += f", {unknown / words:.1%} of the {kind} are unknown" if words else ""
    fixes = ["Train the tokenizer with a larger max_length."] * (cut > _TRUNCATED * len(captions))
    more = "Train the tokenizer on more captions, or with a smaller min_count."
    more = more if kind == "words" else "The full tokenizer does not know these characters."
    fixes += [more] * (unknown > _UNKNOWN * words)
    yield CheckRow("captions", "note" if fixes else "ok", finding, " ".join(fixes))


def _count_truncated(tokenizer: Any, captions: list[str]) -> int:
    if hasattr(tokenizer, "count_truncated"):
        return int(tokenizer.count_truncated(captions))
    return sum(tokenizer.encode(caption)[-1] != tokenizer.end_id for caption in captions)


def _check_validation(trial: Trial, data: Any, source: Source) -> Iterator[CheckRow]:
    batches = list(islice(source.epoch(0), 1))
    if not batches:
        raise DataError("No usable validation image. Pass a data set with at least one.")
    add_references({}, batches[0])
    yield from _check_captions(trial, "val", data, batches)
