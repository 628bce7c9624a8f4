"""Where and how a model runs: devices, precision, seeds, evaluation mode, progress."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from capdistill.errors import ConfigError
from capdistill.files import printable

T = TypeVar("T")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; otherwise what was asked for.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device='{name}' is no device. Use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device='{name}' was asked for but torch sees no CUDA device. Use device='auto', or "
            "install a CUDA build of torch and its driver."
        )
    return device


def pick_precision(device: torch.device, precision: str = "auto") -> str:
    """ "bf16", "fp16" or "fp32": what "auto" means on this hardware, by capability.

    Example:
        >>> pick_precision(torch.device("cpu"), "fp32")
        'fp32'

    Raises:
        ConfigError: an unknown precision, or fp16 away from CUDA, where there is no loss scaling.
    """
    if precision not in ("auto", "fp32", *_DTYPES):
        raise ConfigError(
            f"precision={precision!r} was given; use one of 'auto', 'bf16', 'fp16', 'fp32'."
        )
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"precision='fp16' needs CUDA (loss scaling), but the device is {device}. "
            "Use precision='bf16' or 'auto'."
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[object]:
    """Products in half precision inside the block, or nothing for fp32.

    Example:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    dtype = _DTYPES.get(pick_precision(device, precision))
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def require_single_process() -> None:
    """Training runs in one process; refuse to run as one of several.

    Raises:
        ConfigError: this process was started as one of several, by torchrun or the like.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    ranks = torch.distributed.get_world_size() if _distributed() else 1
    if ranks > 1 or (launched.isdigit() and int(launched) > 1):
        raise ConfigError(
            f"This is one of {max(ranks, int(launched or 1))} processes (WORLD_SIZE is set), but "
            "capdistill trains in one process: each would train everything, alone. Start it "
            "without torchrun, with one process."
        )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU inside the block depend on the seed alone, and leave no trace outside.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(1)
        >>> with seeded(3):
        ...     bool(torch.rand(1) == first)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


SAFE_SEED = 2**63


def stable_hash(*key: object) -> int:
    """A number in [0, 2**63) that depends on the key alone, on every machine.

    Example:
        >>> stable_hash(0, "dog.jpg") == stable_hash(0, "dog.jpg") != stable_hash(1, "dog.jpg")
        True
    """
    digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SAFE_SEED


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone.

    Example:
        >>> a, b = (torch.rand(1, generator=generator(0, 3, "dog.jpg")) for _ in range(2))
        >>> bool(a == b)
        True
    """
    return torch.Generator().manual_seed(stable_hash(*key))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own flag comes back after it."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def inference(*modules: nn.Module, fork_rng: bool = False) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every submodule's own flag comes back.

    Example:
        >>> layer = nn.Dropout()
        >>> with inference(layer):
        ...     layer.training, torch.is_grad_enabled()
        (False, False)
        >>> layer.training
        True

    Args:
        modules: Models that the block runs.
        fork_rng: Also restore the random state afterwards, on the CPU and on their CUDA devices.
    """
    cuda = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    forked = torch.random.fork_rng(devices=[*cuda]) if fork_rng else nullcontext()
    with forked, evaluating(*modules), torch.no_grad():
        yield


@contextmanager
def on_device(models: Iterable[object], device: torch.device) -> Iterator[None]:
    """Modules on `device` and in evaluation mode; flags and devices come back after the block.

    Args:
        models: Those that are no modules are left alone.
        device: Where the modules go.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    origins = [next((p.device for p in module.parameters()), device) for module in modules]
    try:
        with evaluating(*modules):
            for module in modules:
                module.to(device)
            yield
    finally:
        for module, origin in zip(modules, origins, strict=True):
            module.to(origin)


def progress(
    items: Iterable[T],
    total: int | None,
    what: str,
    *,
    unit: str = "image",
    show: bool = True,
    seconds: float = 10.0,
) -> Iterator[T]:
    """Pass items on, showing a bar on a terminal and a line now and then elsewhere.

    Both go to standard error. A loop shorter than `seconds` prints no line.

    Example:
        >>> sum(progress([1, 2, 3], 3, "Encoding", show=False))
        6

    Args:
        items: What the loop runs over.
        total: The number of items, if known.
        what: The work, such as "Encoding images".
        unit: What an item is.
        show: False shows nothing.
        seconds: The least time between two lines.
    """
    stream = sys.stderr
    if not show or stream is None:
        yield from items
        return
    if stream.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False)
        return
    of = f" of {total:,}" if total else ""
    last, printed, count = time.monotonic(), False, 0
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= seconds:
            share = f" ({count / total:.0%})" if total else ""
            line = f"{what}: {count:,}{of} {unit}s{share}"
            print(printable(line, stream), file=stream, flush=True)
            last, printed = time.monotonic(), True
    if printed:
        print(printable(f"{what}: {count:,} {unit}s, done", stream), file=stream, flush=True)
