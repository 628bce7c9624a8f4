"""A trainer and its models are as before, whatever was tried in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from capdistill.runtime import seed_everything

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Afterwards weights, buffers, gradients, flags, chance, devices and trainer are as before."""
    about, losses = dict(vars(trainer)), trainer.objective.losses
    numbers, python = np.random.get_state(), random.getstate()
    modules = [trainer.objective, *trainer.models]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        restore = [_remember(module) for module in modules]
        if not getattr(trainer, "_built", True):  # what a real run builds starts from its seed
            trainer.objective.losses = copy.deepcopy(losses)
        seed_everything(trainer.config.seed)
        try:
            yield
        finally:
            trainer.objective.losses = losses
            for undo in reversed(restore):
                undo()
            vars(trainer).clear()
            vars(trainer).update(about)
            np.random.set_state(numbers)
            random.setstate(python)


def _remember(module: nn.Module) -> Callable[[], None]:
    """What puts a module back: its device, each part's attributes, buffers and gradients."""
    device = next((p.device for p in module.parameters()), None)
    parts = [(part, part.training, dict(vars(part))) for part in module.modules()]
    buffers = [
        (part._buffers, key, buffer, buffer.clone())
        for part in module.modules()
        for key, buffer in part._buffers.items()
        if buffer is not None
    ]
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in grads:
        parameter.grad = None

    def undo() -> None:
        if any(p.device != device for p, _ in grads):
            for parameter, _ in grads:
                parameter.grad = None
            module.to(device)
        for part, training, attributes in parts:
            vars(part).clear()
            vars(part).update(attributes)
            part.training = training
        for table, key, buffer, value in buffers:
            table[key] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad

    return undo
