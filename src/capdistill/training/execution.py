"""How models run: compiled, or with activations that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, suggest
from capdistill.runtime import batch_norms
from capdistill.teachers.ensemble import leaves
from capdistill.training.config import TrainConfig

# What `place` reads.
PLACING = ("device", "precision", "compile", "gradient_checkpointing", "quantize")


class Execution:
    """Compiled encoders and decoders, and checkpointed blocks of the student, as options ask.

    Weights, names and results stay the same; with `compile`, up to rounding.

    Example:
        >>> layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))
        >>> execution = Execution()
        >>> execution.apply([layers], TrainConfig(gradient_checkpointing=True))
        >>> layers(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def apply(self, models: Sequence[nn.Module], config: TrainConfig) -> None:
        """Set it up, instead of what was set up before.

        Args:
            models: The model that is trained, whose blocks may be checkpointed, and its teachers.
            config: The options.

        Raises:
            ConfigError: there is no such backend.
        """
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        for block in repeated_blocks(models[:1]) if config.gradient_checkpointing else ():
            if "forward" not in vars(block):  # somebody's own
                vars(block)["forward"] = partial(_checkpointed, block, bool(batch_norms(block)))
                self._undo.append(partial(vars(block).pop, "forward", None))
        for part in _parts(models) if config.compile else ():
            if part._compiled_call_impl is None:
                _compile(part, "inductor" if config.compile is True else str(config.compile))
                self._undo.append(partial(setattr, part, "_compiled_call_impl", None))


def _compile(part: nn.Module, backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"compile={backend!r}: torch has no such backend. {suggest(backend, known)}"
        )
    part.compile(backend=backend)


def _parts(models: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The encoders and decoders of captioners."""
    for model in (leaf for each in models for leaf in leaves(each)):
        if isinstance(model, Captioner):
            yield from (model.encoder, model.decoder)


def repeated_blocks(models: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The blocks that models are stacked of: entries of a sequence that have parts themselves.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(1, 1))
        >>> len(list(repeated_blocks([nn.Sequential(block(), block(), nn.ReLU())])))
        2
    """
    for module in models:
        stack = isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1
        for child in module.children():
            if stack and any(True for _ in child.children()):
                yield child
            else:
                yield from repeated_blocks([child])


def _checkpointed(block: nn.Module, norms: bool, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a block, of which the backward pass keeps the inputs only."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in block.parameters()):
        return forward(*args, **kwargs)
    if not norms or torch.compiler.is_compiling():  # a compiled block changes statistics once
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), _statistics_stay(block)


@contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """Batch norms have seen the batch already: the second pass leaves their statistics alone."""
    norms: list[Any] = [norm for norm in batch_norms(block) if norm.training]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, seen in before:
            norm.momentum, norm.num_batches_tracked = 0.0, None if seen is None else seen.clone()
        yield
    finally:
        for norm, momentum, seen in before:
            norm.momentum, norm.num_batches_tracked = momentum, seen
