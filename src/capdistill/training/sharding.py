"""Models that lie in parts on several ranks (FSDP2) or on several devices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner, require_loaded
from capdistill.errors import ConfigError
from capdistill.runtime import is_placed, members_of


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor lies on several ranks, a part on each."""
    return hasattr(value, "full_tensor")


def any_sharded(*modules: nn.Module) -> bool:
    """Whether a parameter of the modules lies on several ranks."""
    return any(is_sharded(p) for module in modules for p in module.parameters())


def is_placed_teacher(teacher: nn.Module | None) -> bool:
    """Whether there is a teacher that somebody has placed.

    Raises:
        ConfigError: it is a captioner of ours some of whose weights are not loaded.
    """
    for part in () if teacher is None else teacher.modules():
        if isinstance(part, Captioner):
            require_loaded(part)
    return teacher is not None and is_placed(teacher)


def move(module: nn.Module, device: torch.device, model: nn.Module | None = None) -> None:
    """Move a module to a device, unless somebody else has placed it.

    Args:
        module: What is moved.
        device: Where to.
        model: The part of it that may have been placed; by default all of it.
    """
    if not is_placed(module if model is None else model):
        module.to(device)


def move_models(models: Sequence[nn.Module], device: torch.device) -> None:
    """Move models to a device, except those that somebody else has placed.

    Models may share parts, as a mean teacher and its student do. So all are looked at before one is
    moved: afterwards the parts of another would lie on two devices.

    Args:
        models: The model that is trained, and its teachers.
        device: Where to.

    Raises:
        ConfigError: a captioner has no values yet, or weights that cannot be trained.
    """
    for model in models:
        if isinstance(model, Captioner) and not is_placed(model):
            require_loaded(model)
    _require_trainable(models[0])
    own = [part for model in models for part in members_of(model) if not is_placed(part)]
    for part in own:
        part.to(device)


def _require_trainable(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if value.requires_grad and value.dtype == torch.float16:
            raise ConfigError(
                f"The weights to train are float16 ({name}): their updates are too small for it. "
                "Call captioner.float(); precision='fp16' or 'bf16' computes in half precision."
            )
        if value.is_inference():
            raise ConfigError(
                f"{name} was made under torch.inference_mode() and cannot be trained. Make or load "
                "the captioner outside of it."
            )


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; all ranks call it for the same tensors."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def spread(value: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of rank 0 as parts on all ranks, in the layout of `like`."""
    from torch.distributed.tensor import distribute_tensor

    layout = cast(Any, like)
    return distribute_tensor(value.detach(), layout.device_mesh, layout.placements)


@contextmanager
def gathered(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, keep: bool = False
) -> Iterator[None]:
    """Inside the block sharded weights and moments of the optimizer are whole, on every rank.

    All ranks enter it. It does nothing where nothing is sharded.

    Args:
        module: Its parameters are replaced.
        optimizer: Its state is replaced.
        keep: Whether the values at the end of the block, of rank 0, become those of all ranks.
    """
    if not any_sharded(module):
        yield
        return
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    full = {p: nn.Parameter(whole(p).detach().clone(), p.requires_grad) for _, _, p in places}
    moments = {} if optimizer is None else {p: dict(s) for p, s in optimizer.state.items()}
    owners = {part: part._load_state_dict_post_hooks for part, _, _ in places}
    for owner in owners:  # the hooks of FSDP2 look for sharded values
        owner._load_state_dict_post_hooks = OrderedDict()
    for part, name, parameter in places:
        part._parameters[name] = full[parameter]
    if optimizer is not None:
        for trained, state in moments.items():
            optimizer.state[trained] = {name: _whole_value(v) for name, v in state.items()}
    try:
        yield
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter
        for owner, hooks in owners.items():
            owner._load_state_dict_post_hooks = hooks
        if keep:
            _spread_all(full, optimizer)
        elif optimizer is not None:
            optimizer.state.update(moments)


@torch.no_grad()
def _spread_all(
    full: Mapping[nn.Parameter, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> None:
    for parameter, value in full.items():
        parameter.copy_(spread(value, parameter))
    for trained, state in () if optimizer is None else list(optimizer.state.items()):
        alike = {name: spread(v, trained) for name, v in state.items() if _is_like(v, trained)}
        state.update(alike)


def _is_like(value: Any, parameter: Tensor) -> bool:
    tensor = isinstance(value, Tensor) and not is_sharded(value)
    return tensor and is_sharded(parameter) and value.shape == parameter.shape


def _whole_value(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside the block the parts of FSDP2 are whole, also for what is not their forward pass.

    All ranks enter it. It does nothing where nothing is sharded.
    """
    for part in _fsdp_parts(module):
        part.unshard()
    yield
    for part in _fsdp_parts(module):
        part.reshard()


def _fsdp_parts(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "unshard")]


def require_shardable(module: nn.Module, unsuited: Mapping[str, object]) -> None:
    """Refuse what needs the whole of a model that is sharded now.

    Args:
        module: What is trained.
        unsuited: What cannot be combined -> whether it is in use.

    Raises:
        ConfigError: names it.
    """
    used = [name for name, value in unsuited.items() if value]
    if used and any_sharded(module):
        raise ConfigError(
            f"parallel= shards the model over the ranks, which {', '.join(used)} cannot work with: "
            "it needs whole weights in every step. Leave it out, or leave parallel out, so that "
            "DistributedDataParallel keeps the whole model on every rank."
        )
