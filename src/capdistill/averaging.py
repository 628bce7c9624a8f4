"""Averages of weights: of the steps of a training (a moving average), and of several trainings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from capdistill.errors import CheckpointError, ConfigError, require_number
from capdistill.runtime import batch_norms, evaluating


class WeightAverage:
    """The exponential moving average of a module's trained weights, in float32 or more.

    Update n (from 0) makes it `d * average + (1 - d) * weights` with the decay
    d = min(decay, (1 + n) / (10 + n)): the first weights are soon forgotten. The running
    statistics of batch norms that are trained are averaged in the same way: copied ones would be
    those of other weights. What is frozen is neither averaged nor stored.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> average = WeightAverage(layer, decay=0.5)
        >>> _ = nn.init.ones_(layer.weight)
        >>> average.update()  # n = 0: 0.1 * 0 + 0.9 * 1
        >>> with average.applied():
        ...     round(layer.weight.item(), 4)
        0.9
        >>> layer.weight.item()
        1.0

    Args:
        module: Its parameters that require a gradient now are followed.
        decay: Share of the average that an update keeps, from 0 to below 1.
        into: A copy of the module that holds the average; by default it is held here.

    Attributes:
        updates: Number of updates so far.

    Raises:
        ConfigError: the decay is out of range, or nothing is trained.

    Source:
        Polyak and Juditsky (1992); the decay of the first updates: TensorFlow's
        ExponentialMovingAverage.
    """

    def __init__(self, module: nn.Module, decay: float, into: nn.Module | None = None) -> None:
        self.decay = require_number("WeightAverage: decay", decay, minimum=0, below=1)
        self.names = _moving(module)
        self.updates = 0
        self._weights = _places(module, self.names)
        self._into = None if into is None else _places(into, self.names)
        self._values = [] if into is not None else [_copy(value) for value in self.weights]
        moving = {name.rpartition(".")[0] for name in self.names}
        fixed = [n for n, _ in module.named_buffers() if n.rpartition(".")[0] not in moving]
        self._fixed = [] if into is None else [_places(each, fixed) for each in (module, into)]
        self._applied = False

    @property
    def weights(self) -> list[Tensor]:
        """The module's own values, in the order of `names`."""
        return _values(self._weights)

    @property
    def average(self) -> list[Tensor]:
        """The averaged values, in the order of `names`."""
        return self._values if self._into is None else _values(self._into)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; to be called after every optimizer step.

        Raises:
            ConfigError: within `applied()`, where the module holds the average itself.
        """
        if self._applied:
            raise ConfigError(
                "A step was made inside averaged(), where the model holds its averaged weights. "
                "Leave the block before training continues."
            )
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = self.average
        weights = [w.to(a.dtype) for w, a in zip(self.weights, average, strict=True)]
        get_ema_multi_avg_fn(decay)(average, weights, None)  # type: ignore[no-untyped-call]
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the average; afterwards its own weights again."""
        if self._applied:
            yield
            return
        own = [value.detach().clone() for value in self.weights]
        self._applied = True
        try:
            self.assign()
            yield
        finally:
            _assign(self.weights, own)
            self._applied = False

    def assign(self) -> None:
        """Give the module the average for good."""
        _assign(self.weights, self.average)

    def restart(self) -> None:
        """Begin again with the weights as they are."""
        _assign(self.average, self.weights)
        self._copy_fixed()
        self.updates = 0

    def follows(self, module: nn.Module) -> bool:
        """Whether the weights are those of this module or its parts."""
        parts = set(module.modules())
        return all(part in parts for part, _ in self._weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        values = dict(zip(self.names, (a.detach() for a in self.average), strict=True))
        return {"updates": self.updates, "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: it is of other weights; nothing was changed.
        """
        values = state["values"]
        mine = {n: tuple(a.shape) for n, a in zip(self.names, self.average, strict=True)}
        theirs = {name: tuple(value.shape) for name, value in values.items()}
        if mine != theirs:
            differing = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
            raise CheckpointError(
                "The averaged weights of the training state are of another model; they differ in "
                f"{', '.join(differing[:5])}. Give the same model and trainable parts, or start "
                "again with resume=False."
            )
        _assign(self.average, [values[name] for name in self.names])
        self._copy_fixed()
        self.updates = state["updates"]

    def _copy_fixed(self) -> None:
        """Give a copy the buffers of frozen parts, after others were loaded."""
        if self._fixed:
            own, copied = map(_values, self._fixed)
            _assign(copied, own)


def average_weights(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of the state dicts of models that were trained from the same weights.

    Weights of one start that were trained in different ways can often be averaged: the result is
    better than each, at the cost of one. Weights of different starts cannot.

    Example:
        >>> one, other = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}
        >>> average_weights([one, other], [3, 1])
        {'w': tensor([2.])}

    Args:
        states: State dicts with the same names and shapes, such as `captioner.state_dict()`.
        weights: A number > 0 for each, divided by their sum; by default they are equal.

    Returns:
        The mean, computed in float64, in the types of the first. Values that are no floating-point
        numbers are those of the first.

    Raises:
        ConfigError: no state, states of different models, or wrong weights.

    Source:
        Wortsman et al. (2022), Model soups, section 2; of weights before and after a reward was
        maximised: Rame et al. (2024), WARP, section 3.
    """
    several = isinstance(states, Iterable) and not isinstance(states, (str, Mapping))
    states = list(states) if several else [states]  # type: ignore[list-item]
    if not states:
        raise ConfigError("average_weights: no state dict was given; expected one or more.")
    for state in states:
        if not isinstance(state, Mapping) or not several:
            raise ConfigError(
                f"average_weights: {type(state).__name__} was given; expected a list of state "
                "dicts, such as [model.state_dict(), other.state_dict()]."
            )
    shares = [1.0] * len(states) if weights is None else list(weights)
    if len(shares) != len(states):
        raise ConfigError(
            f"average_weights: {len(shares)} weights were given for {len(states)} state dicts. "
            "Give one for each."
        )
    shares = [require_number("average_weights: a weight", share, above=0) for share in shares]
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        differing = [n for n in {**shapes[0], **other} if shapes[0].get(n) != other.get(n)]
        if differing:
            raise ConfigError(
                "average_weights: the state dicts are of different models; they differ in "
                f"{', '.join(differing[:5])}. Give those of one model after several trainings."
            )
    total = sum(shares)

    def mean(name: str, first: Tensor) -> Tensor:
        if not first.is_floating_point():
            return first.clone()
        parts = (s[name].double() * (w / total) for s, w in zip(states, shares, strict=True))
        return sum(parts, torch.zeros_like(first, dtype=torch.float64)).to(first.dtype)

    return {name: mean(name, value.detach()) for name, value in states[0].items()}


def _moving(module: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient, and of statistics that training moves."""
    with evaluating(module):
        module.train()  # frozen parts stay in evaluation mode
        norms = {id(norm) for norm in batch_norms(module) if norm.training}
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            "There is nothing to average: every parameter is frozen. Unfreeze some with "
            "requires_grad_(True) first."
        )
    statistics = [
        f"{name}.{key}"
        for name, part in module.named_modules()
        if id(part) in norms
        for key, value in part.named_buffers(recurse=False)
        if value.is_floating_point()
    ]
    return [*trained, *statistics]


def _places(module: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    """The part and the attribute of each name: moving a module to a device replaces its buffers."""
    parts = dict(module.named_modules())
    pairs = [name.rpartition(".") for name in names]
    return [(parts[part], key) for part, _, key in pairs]


def _values(places: Sequence[tuple[nn.Module, str]]) -> list[Tensor]:
    return [getattr(part, key) for part, key in places]


def _copy(value: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to(wide, copy=True)


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
