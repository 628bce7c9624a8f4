"""AdamW over parameter groups, and the schedules of their learning rates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import lr_scheduler

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError
from capdistill.training.config import TrainConfig

Scheduler = lr_scheduler.LRScheduler


def parameter_groups(
    module: nn.Module, captioner: Captioner, config: TrainConfig
) -> list[dict[str, object]]:
    """Trainable parameters by learning rate (the encoder's trunk or the rest) and decay.

    Args:
        module: Everything that is trained: the captioner and the losses' projectors.
        captioner: Whose trunk gets `encoder_rate` of the learning rate.
        config: Rates and decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    trunk = {id(p) for p in captioner.encoder.trunk_parameters()}
    plain = _without_decay(module)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = ("encoder" if id(parameter) in trunk else "model", id(parameter) not in plain)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError(
            "Nothing to train: every parameter is frozen. Set trainable= or unfreeze."
        )
    rate = {"encoder": config.learning_rate * config.encoder_rate, "model": config.learning_rate}
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
    """Ids of biases, norms and embeddings: vectors, and what embeds words."""
    embeddings: Iterable[nn.Module] = (m for m in module.modules() if isinstance(m, nn.Embedding))
    plain = {id(p) for m in embeddings for p in m.parameters(recurse=False)}
    return plain | {id(p) for p in module.parameters() if p.ndim < 2}


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> Scheduler:
    """The configured schedule, to be stepped after every optimizer step.

    With the defaults (10 epochs, then 20) thirty epochs end at a minimum.

    Source:
        Loshchilov and Hutter (2017), SGDR, equation 5.
    """
    total = max(config.epochs * steps_per_epoch, 1)
    if config.schedule == "cosine_restarts":
        return lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, max(config.restart_epochs * steps_per_epoch, 1), config.restart_factor
        )
    if config.schedule == "constant":
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    climb = max(round(config.warmup * total), 1)
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 1.0 / climb, total_iters=climb - 1 or 1),
            lr_scheduler.CosineAnnealingLR(optimizer, max(total - climb, 1)),
        ],
        milestones=[climb],
    )
