"""Devices, precision, seeds, evaluation mode and workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from capdistill.errors import ConfigError, shortened

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; otherwise the given device.

    Of several processes, each takes the CUDA device of its LOCAL_RANK unless one is named.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_device(torch.device("cuda"))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={name!r} is not a device. Use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device='{name}' was given but torch finds no CUDA device. Use device='auto', or "
            "install a CUDA build of torch and its driver."
        )
    return _own_device(device)


def _own_device(device: torch.device) -> torch.device:
    """The device of this rank, where the computer has several and none was named."""
    launch, count = launched(), torch.cuda.device_count()
    if device.type != "cuda" or device.index is not None or launch.world_size == 1 or count == 1:
        return device  # a launcher may show each rank its own device only
    if launch.local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK is {launch.local_rank}, but torch finds {count} CUDA devices. Start at "
            f"most {count} processes on this computer, or give device='cpu'."
        )
    return torch.device("cuda", launch.local_rank)


def pick_precision(device: torch.device, precision: str = "auto") -> str:
    """ "bf16", "fp16" or "fp32": resolve "auto" by the capability of the hardware.

    Example:
        >>> pick_precision(torch.device("cpu"), "fp32")
        'fp32'

    Raises:
        ConfigError: an unknown precision, or fp16 without CUDA, which loss scaling needs.
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
    """Autocast to half precision inside the block; nothing for fp32.

    Example:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    dtype = _DTYPES.get(pick_precision(device, precision))
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Launch(NamedTuple):
    """What a launcher (torchrun, accelerate, srun with exports) says about this process.

    Args:
        rank: Number of this process among all, from 0.
        local_rank: Its number among those of this computer.
        world_size: Number of processes; 1 without a launcher.
        local_world_size: Number of processes of this computer.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def launched() -> Launch:
    """This process, by the environment variables RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE.

    Raises:
        ConfigError: one of them is not a whole number.
    """
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    values = {name: os.environ.get(name) or str(default) for name, default in names.items()}
    for name, value in values.items():
        if not value.isdecimal():
            raise ConfigError(f"{name}={value!r} in the environment; expected a whole number.")
    return Launch(*map(int, values.values()))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU inside the block depend on the seed alone; state is restored.

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
    """Evaluation mode inside the block; every submodule's flag is restored after it."""
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
    """Evaluation mode and no gradients inside the block; every submodule's flag is restored.

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
    """Modules on `device` and in evaluation mode; flags and devices are restored after the block.

    Args:
        models: The models; objects that are not modules, and modules that somebody has placed on
            devices, are not moved.
        device: Device inside the block.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    moved = [module for module in modules if not is_placed(module)]
    origins = [next((p.device for p in module.parameters()), device) for module in moved]
    try:
        with evaluating(*modules):
            for module in moved:
                module.to(device)
            yield
    finally:
        for module, origin in zip(moved, origins, strict=True):
            module.to(origin)


def is_placed(module: nn.Module) -> bool:
    """Whether somebody has decided where the parts of a model lie: it is not moved as a whole.

    This holds for FSDP2 and for `device_map` of Hugging Face libraries, which loads the parts to
    several devices and moves what they read.
    """
    mapped = any(hasattr(p, "hf_device_map") or hasattr(p, "_hf_hook") for p in module.modules())
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
    return mapped or sharded or len({p.device for p in module.parameters()}) > 1


def worker_start_method(given: str | None) -> str:
    """How worker processes start: "fork", "spawn" or "forkserver"; None is Python's default.

    Raises:
        ConfigError: this system has no such method.
    """
    methods = multiprocessing.get_all_start_methods()  # the first is the default
    if given is not None and given not in methods:
        raise ConfigError(f"start_method={given!r} was given; use one of {', '.join(methods)}.")
    return given or multiprocessing.get_start_method(allow_none=True) or methods[0]


def max_workers(start_method: str | None = None) -> int:
    """How many worker processes this one can use: its CPU cores, or none if it may not start any.

    Several processes that train together on a computer share its cores.

    Example:
        >>> max_workers() >= 0
        True
    """
    if multiprocessing.current_process().daemon:  # a worker itself
        return 0
    if worker_start_method(start_method) != "fork" and not _program_is_guarded():
        return 0
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(cores // launched().local_world_size, 1)


def _program_is_guarded() -> bool:
    """Whether a worker can import the program again without running it."""
    main = sys.modules.get("__main__")
    try:
        return "__main__" in Path(str(main.__file__)).read_text("utf-8")  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False


def require_picklable(data: Any, name: str = "data") -> None:
    """Reject data that cannot be sent to worker processes, and name the part that cannot.

    Example:
        >>> pairs = [("a.jpg", "a dog", lambda image: image)]
        >>> require_picklable(pairs)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: data[0][2] cannot be pickled ...

    Args:
        data: A data set, with all that it holds, such as its transform.
        name: Beginning of the message.

    Raises:
        ConfigError: it cannot be pickled.
    """
    error = _pickling_error(data)
    if error is None:
        return
    part, value = _unpicklable_part(data, name)
    raise ConfigError(
        f"{part} cannot be pickled ({shortened(value)}: {error}), so it cannot be sent to worker "
        "processes. Use num_workers=0, or replace it: a lambda by a function of a module, an open "
        "file by its path."
    ) from error


def is_picklable(value: Any) -> bool:
    """Whether a value can be sent to another process."""
    return _pickling_error(value) is None


def _pickling_error(value: Any) -> Exception | None:
    try:
        pickle.Pickler(_Discard(), pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:
        return error
    return None


class _Discard:
    def write(self, data: Any) -> int:
        return len(data)


def _unpicklable_part(value: Any, name: str, depth: int = 0) -> tuple[str, Any]:
    """The innermost part that cannot be pickled, with its name, such as "data.transform"."""
    parts: dict[str, Any] = {}
    if isinstance(value, Mapping):
        parts = {f"{name}[{key!r}]": each for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"{name}[{number}]": each for number, each in enumerate(value)}
    elif not isinstance(value, (type, FunctionType)):
        parts = {f"{name}.{key}": each for key, each in getattr(value, "__dict__", {}).items()}
    for part, each in parts.items():
        if depth < 9 and not is_picklable(each):
            return _unpicklable_part(each, part, depth + 1)
    return name, value


_FEW_BATCHES, _MAX_WORKERS = 8, 4


def default_num_workers(data: Any, batch_size: int = 16, *, start_method: str | None = None) -> int:
    """The number of processes to read a data set with.

    As many as there are CPU cores for this process, at most four. None for less than eight batches,
    for images in memory, on a single core, or in a process that may not start others. Without
    "fork", where workers import the program again, none for a data set that cannot be pickled or a
    program without `if __name__ == "__main__"`.

    Example:
        >>> from capdistill.data import sample
        >>> default_num_workers(sample().train)
        0

    Args:
        data: A data set.
        batch_size: Images per batch.
        start_method: As for `Loader`.
    """
    workers = max_workers(start_method)
    if workers < 2 or len(data) < _FEW_BATCHES * batch_size or _is_in_memory(data):
        return 0
    forked = worker_start_method(start_method) == "fork"
    return min(workers, _MAX_WORKERS) if forked or is_picklable(data) else 0


def _is_in_memory(data: Any) -> bool:
    first = data[0] if isinstance(data, (list, tuple)) else None
    image = first[0] if isinstance(first, (list, tuple)) and first else None
    return image is not None and not isinstance(image, (str, os.PathLike))


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms of a module."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return [part for part in module.modules() if isinstance(part, kinds)]


@contextmanager
def batch_norms_in_eval(module: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics inside the block and do not update them."""
    norms = [norm for norm in batch_norms(module) if norm.training]
    try:
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm in norms:
            norm.train()
