"""Devices, precision, seeds, random states and evaluation mode."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError

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


class Drawn(NamedTuple):
    """Where Python's, NumPy's and torch's generators are, here and on CUDA devices."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]


def drawn() -> Drawn:
    """Where the generators are now: cheap enough for every step."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return Drawn(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def random_state(where: Drawn | None = None) -> dict[str, Any]:
    """The states of the generators as plain data, now or at an earlier moment."""
    where = drawn() if where is None else where
    version, words, gauss = where.python
    name, keys, *rest = where.numpy
    return {
        "torch": where.torch,
        "cuda": where.cuda,
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *map(float, rest)],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Continue drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


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
    with torch.random.fork_rng(devices=[]), made_on_cpu():
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def isolated(dtype: torch.dtype | None = None) -> Iterator[None]:
    """What the caller has set for the whole of torch does not reach the block, nor the reverse.

    Inside, gradients are recorded, there is no autocast and no inference mode, and tensors are made
    on the CPU unless a device is given. Afterwards Python, NumPy and torch draw the numbers that
    they would have drawn without the block.

    Example:
        >>> with torch.inference_mode(), isolated():
        ...     torch.manual_seed(0) and torch.ones(1, requires_grad=True).is_inference()
        False

    Args:
        dtype: The default of floating-point tensors inside; by default it is the caller's.
    """
    before = torch.get_default_dtype()
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    kinds = ("cpu", "cuda", "mps")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in filter(torch.is_autocast_enabled, kinds):
                # A cache of weights is emptied where the outermost autocast ends: too late.
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
            stack.enter_context(made_on_cpu())
            torch.set_default_dtype(dtype or before)
            yield
    finally:
        torch.set_default_dtype(before)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


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
    with forked, evaluating(*modules), torch.no_grad(), made_on_cpu():
        yield


def made_on_cpu() -> AbstractContextManager[object]:
    """Tensors are made on the CPU unless a device is given, whatever the caller's default is."""
    usual = torch.get_default_device().type == "cpu"
    return nullcontext() if usual else torch.device("cpu")


@contextmanager
def on_device(models: Iterable[object], device: torch.device) -> Iterator[None]:
    """Modules on `device` and in evaluation mode; flags and devices are restored after the block.

    Args:
        models: The models; objects that are not modules, and modules that somebody has placed on
            devices, are not moved.
        device: Device inside the block.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    moved = [part for module in modules for part in members_of(module) if not is_placed(part)]
    origins = [next((p.device for p in module.parameters()), device) for module in moved]
    try:
        with evaluating(*modules):
            for module in moved:
                module.to(device)
            yield
    finally:
        for module, origin in zip(moved, origins, strict=True):
            module.to(origin)


def members_of(model: nn.Module) -> list[nn.Module]:
    """The members of an ensemble, which may lie on different devices; any other model itself."""
    members = getattr(model, "members", None)
    values = list(members.values()) if isinstance(members, Mapping) else []
    if not values or not all(isinstance(value, nn.Module) for value in values):
        return [model]
    return [part for member in values for part in members_of(member)]


def is_placed(module: nn.Module) -> bool:
    """Whether somebody has decided where the parts of a model lie: it is not moved as a whole.

    This holds for FSDP2 and for `device_map` of Hugging Face libraries, which loads the parts to
    several devices and moves what they read; and for an ensemble with such a member.
    """
    members = members_of(module)
    if members != [module]:
        return any(is_placed(member) for member in members)
    mapped = any(hasattr(p, "hf_device_map") or hasattr(p, "_hf_hook") for p in module.modules())
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
    return mapped or sharded or len({p.device for p in module.parameters()}) > 1


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
