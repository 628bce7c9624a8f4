"""What a step costs: memory, time, and waiting for data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capdistill.outputs import Batch
from capdistill.runtime import autocast
from capdistill.training.check.report import CheckRow
from capdistill.training.check.trial import (
    Trial,
    bytes_of,
    has_frozen_trunk,
    less_memory,
    megabytes,
    milliseconds,
)
from capdistill.training.stepper import total

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_WAIT = 0.25  # share of a step that may be spent waiting for data
_FULL = 0.9  # of the memory


def check_memory(trial: Trial) -> Iterator[CheckRow]:
    """What a step keeps: counted, and on CUDA also the allocator's peak."""
    trainer, device = trial.trainer, trial.trainer.device
    weights = bytes_of(trainer.objective)
    trained = [p for p in trainer.objective.parameters() if p.requires_grad]
    per_step = 3 * sum(p.numel() * p.element_size() for p in trained)  # gradients, two moments
    kept = _bytes_kept_for_backward(trainer, trial.batch)
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
    how = "an estimate: the above added up"
    if device.type == "cuda":
        total, how = max(total, _cuda_peak(trial)), "the allocator's peak, or the above added up"
    yield from _against_memory(trial, total, how)


def _against_memory(trial: Trial, total: int, how: str) -> Iterator[CheckRow]:
    there = _memory_of(trial.trainer.device)
    finding = f"a step needs about {megabytes(total)} ({how})"
    finding += f" of {megabytes(there)}" if there else ""
    full = there is not None and total > _FULL * there
    fix = less_memory(trial.config) if full else ""
    yield CheckRow("memory", "fail" if full else "ok", finding, fix)


def _bytes_kept_for_backward(trainer: Trainer, batch: Batch) -> int:
    """Bytes of distinct tensors that autograd saves in one forward, weights apart."""
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
    """Bytes of the device's memory, or None where that can not be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_time(trial: Trial) -> Iterator[CheckRow]:
    """Seconds of a step, of the teacher's part in it, and of reading its batch."""
    trainer, batch = trial.trainer, trial.batch
    trial.step_seconds = _seconds(trainer.device, lambda: _forward_backward(trial))
    rate = f"{batch.num_images / trial.step_seconds:.0f} images/s"
    finding = f"forward and backward {milliseconds(trial.step_seconds)} a batch of "
    yield CheckRow("time", "ok", f"{finding}{batch.num_images} images, {rate}")
    if "teacher" in trial.roles and len(trainer.objective.losses):
        moved = batch.to(trainer.device)
        teaching = _seconds(trainer.device, lambda: _teach(trainer, moved))
        share = teaching / trial.step_seconds
        finding = f"of it the teacher's forward {milliseconds(teaching)} ({share:.0%})"
        yield CheckRow("time", "ok", finding)
    if trial.source is not None:
        yield from _check_loading(trial)


def _check_loading(trial: Trial) -> Iterator[CheckRow]:
    """Time that a step waits for its batch: all of the reading without workers."""
    config, load, step = trial.config, trial.load_seconds, trial.step_seconds
    wait = load if config.workers == 0 else max(load / config.workers - step, 0.0)
    finding = (
        f"reading a batch takes {milliseconds(load)} in one process (workers={config.workers}), "
        f"so that a step of {milliseconds(step)} waits {milliseconds(wait)}"
    )
    if config.cache_images or config.cache_features:
        yield CheckRow("loading", "ok", f"{finding}, in the first epoch only (cached)")
    elif wait <= _WAIT * step:
        yield CheckRow("loading", "ok", finding)
    else:
        yield CheckRow("loading", "note", finding, _faster_loading(trial, load / step))


def _faster_loading(trial: Trial, needed: float) -> str:
    workers = max(1, min(math.ceil(needed), os.cpu_count() or 1))
    ways = [f"workers={workers}"] if workers > trial.config.workers else []
    ways += ["cache_images=True", "smaller image files"]
    if any(has_frozen_trunk(model) for model in trial.trainer.models):
        ways.insert(-1, "cache_features=True (the trunk is frozen)")
    return f"Try {', '.join(ways[:-1])} or {ways[-1]}."


def _forward_backward(trial: Trial) -> None:
    trainer = trial.trainer
    trainer.objective.zero_grad(set_to_none=True)
    trainer.scaler.scale(total(trainer.terms(trial.batch))).backward()  # type: ignore[no-untyped-call]


def _teach(trainer: Trainer, batch: Batch) -> None:
    with autocast(trainer.device, trainer.precision):
        trainer.teach(batch)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    """The shorter of two runs; what came before has warmed up."""
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
