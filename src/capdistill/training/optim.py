"""AdamW over parameter groups, and the schedules of their learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError
from capdistill.training.config import TrainConfig

Scheduler = lr_scheduler.LambdaLR
WEIGHTING = "weighting"  # the group of learned weights of the terms, which is not clipped


def parameter_groups(
    module: nn.Module, captioner: Captioner, config: TrainConfig
) -> list[dict[str, object]]:
    """Trainable parameters, grouped by learning rate (trunk, weights of terms, the rest) and decay.

    Args:
        module: Everything that is trained: the captioner, the losses' projectors and the
            `weighting` of the terms, which has a learning rate of its own.
        captioner: Its trunk gets `encoder_lr_scale` times the learning rate.
        config: Rates and decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    weighting: Any = getattr(module, WEIGHTING, None)
    special = {id(p): "encoder" for p in captioner.encoder.trunk_parameters()}
    special |= {id(p): WEIGHTING for p in weighting.parameters()} if weighting else {}
    plain = _without_decay(module)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = (special.get(id(parameter), "model"), id(parameter) not in plain)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError(
            "Nothing to train: every parameter is frozen. Create the encoder with trainable='all' "
            "or a number of stages, or unfreeze parameters with requires_grad_(True)."
        )
    rate = {
        "encoder": config.learning_rate * config.encoder_lr_scale,
        "model": config.learning_rate,
        WEIGHTING: getattr(weighting, "learning_rate", 0.0),
    }
    return [
        {
            "params": parameters,
            "lr": rate[name],
            "weight_decay": config.weight_decay if decay else 0.0,
            "name": name,
        }
        for (name, decay), parameters in groups.items()
    ]


def _without_decay(module: nn.Module) -> set[int]:
    """Ids of biases, norms and embeddings: vectors, word embeddings, and those that models name.

    timm's models name their position embeddings and class tokens in `no_weight_decay()`.
    """
    plain = {id(p) for p in module.parameters() if p.ndim < 2}
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            plain.update(id(p) for p in part.parameters(recurse=False))
        named: Any = getattr(part, "no_weight_decay", None)
        if callable(named):
            parameters = dict(part.named_parameters())
            plain.update(id(parameters[name]) for name in named() if name in parameters)
    return plain


def make_schedule(
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    steps_per_epoch: int | None,
    done: int = 0,
) -> Scheduler:
    """The configured schedule, to be stepped after every optimizer step.

    The rate is a function of the step alone, so a run resumed with other options follows the new
    ones. With "cosine_restarts" and its defaults (10 epochs, then 20), 30 epochs end at a minimum.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> config = TrainConfig(schedule="cosine_restarts", restart_epochs=2)
        >>> schedule = make_schedule(optimizer, config, steps_per_epoch=2)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.1, 0.0854, 0.05, 0.0146, 0.1]

    Args:
        optimizer: The scheduled optimizer; each group starts from its own rate.
        config: Kind and lengths.
        steps_per_epoch: Optimizer steps; None keeps the rate constant.
        done: Steps that a resumed run has done.

    Source:
        Loshchilov and Hutter (2017), SGDR, equation 5.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return lr_scheduler.LambdaLR(optimizer, share_of_rate(config, steps_per_epoch), done - 1)


def warn_of_constant_rate(config: TrainConfig) -> None:
    """Say that no schedule is followed, where the number of steps is not known."""
    if config.schedule != "constant":
        warnings.warn(
            f"The learning rate stays at {config.learning_rate:g}: the number of steps is not "
            f"known, so that schedule='{config.schedule}' cannot be followed. Set steps_per_epoch "
            "on the trainer, or schedule='constant'.",
            stacklevel=3,
        )


def share_of_rate(config: TrainConfig, steps_per_epoch: int | None) -> Callable[[int], float]:
    """Optimizer steps done -> the share of the learning rate that the next one takes.

    Example:
        >>> share = share_of_rate(TrainConfig(schedule="warmup_cosine", epochs=10, warmup=0.2), 1)
        >>> [round(share(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if config.schedule == "constant" or steps_per_epoch is None:
        return lambda step: 1.0
    if config.schedule == "warmup_cosine":
        total = config.epochs * steps_per_epoch
        climb = max(round(config.warmup * total), 1)
        return lambda step: _warmup_cosine(step, climb, max(total - climb, 1))
    first = config.restart_epochs * steps_per_epoch
    return lambda step: _cosine_restarts(step, first, config.restart_factor)


def _warmup_cosine(step: int, climb: int, fall: int) -> float:
    return (step + 1) / climb if step < climb else _cosine(min((step - climb) / fall, 1.0))


def _cosine_restarts(step: int, period: int, factor: int) -> float:
    if factor == 1:
        return _cosine(step % period / period)
    while step >= period:
        step, period = step - period, period * factor
    return _cosine(step / period)


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2
