"""The trained module in several processes: its wrapper, and what all must have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from capdistill.errors import ConfigError
from capdistill.runtime import batch_norms_in_eval
from capdistill.training.config import TrainConfig
from capdistill.training.objective import Objective

Parallel = Callable[[nn.Module], nn.Module]


# Options that may differ between two parts of a run without changing what is trained.
HARMLESS = frozenset(
    {
        "num_workers",
        "device",
        "compile",
        "gradient_checkpointing",
        "cache_images",
        "cache_dir",
        "eval_batch_size",
        "log_every",
        "save_every",
        "keep",
        "keep_best",
        "log",
        "profile",
        "progress",
    }
)


def decisive_options(config: TrainConfig) -> dict[str, Any]:
    """The options that determine what is trained, or what ranks do together, as text."""
    own = HARMLESS - {"eval_batch_size"}
    return {key: repr(value) for key, value in config.model_dump().items() if key not in own}


def wrap(objective: Objective, parallel: Parallel | None = None, unused: bool = False) -> nn.Module:
    """The module as a user's function wraps it; else in DistributedDataParallel.

    The wrapper averages gradients over the ranks.

    Args:
        objective: All that is trained. The weighting of the terms is left to
            `Ranks.finish_gradients`: its parameters are used outside the forward pass.
        parallel: The user's function.
        unused: Whether a backward pass leaves parameters out.

    Raises:
        ConfigError: the function returned no module.
    """
    if parallel is None and not any(p.requires_grad for p in objective.parameters()):
        return objective  # the optimizer reports it
    apart = [] if objective.weighting is None else tensors_by_name(objective.weighting)
    ignored = [f"weighting.{name}" for name in apart]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, ignored)  # type: ignore[no-untyped-call]
    if parallel is None:
        return DistributedDataParallel(objective, find_unused_parameters=unused)
    wrapped = parallel(objective)
    if not isinstance(wrapped, nn.Module):
        raise ConfigError(
            f"parallel= returned {type(wrapped).__name__}; expected the module that it was "
            "given, wrapped: parallel=lambda module: fully_shard(module)."
        )
    return wrapped


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def tensors_of(module: nn.Module, buffers_only: bool = False) -> list[Tensor]:
    """The values of a module that all ranks must have in common."""
    return [*module.buffers()] if buffers_only else [*tensors_by_name(module).values()]


def misses_some(objective: Objective, run: Callable[[], Mapping[str, Tensor]]) -> bool:
    """Whether the backward pass of a batch leaves out trainable parameters; nothing is changed."""
    kept = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    flags = [(part, part.training) for part in objective.modules()]
    cuda = {p.device for p in objective.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[*cuda]):
        objective.train()
        torch.stack([*run().values()]).sum().backward()  # type: ignore[no-untyped-call]
    apart = set() if objective.weighting is None else set(objective.weighting.parameters())
    trained = [p for p in objective.parameters() if p.requires_grad and p not in apart]
    missed = any(parameter.grad is None for parameter in trained)
    objective.zero_grad(set_to_none=True)
    for buffer, value in kept:
        buffer.copy_(value)
    for part, training in flags:
        part.training = training
    return missed


@contextmanager
def standing_in(module: nn.Module) -> Iterator[None]:
    """Inside the block a batch that does not count leaves no trace: in batch norms, in ranges."""
    quantizer = getattr(module, "quantizer", None)
    before = quantizer and dict(quantizer.seen)
    kinds = (nn.SyncBatchNorm,)  # these exchange statistics, in training mode on all ranks
    synced = [part for part in module.modules() if isinstance(part, kinds) and part.training]
    with batch_norms_in_eval(module):
        for part in synced:
            part.train()
        yield
    if quantizer is not None:
        quantizer.seen = before
