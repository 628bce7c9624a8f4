"""What a step does to the weights: parameter groups, schedules of their rates, and a guard."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import lr_scheduler

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, LossSpike, NotFiniteLoss
from capdistill.training.config import TrainConfig
from capdistill.training.history import Verdict

Scheduler = lr_scheduler.LambdaLR
WEIGHTING = "weighting"  # the group of learned weights of the terms, which is not clipped
MAX_SKIPPED_STEPS = 10  # in a row; loss scaling needs a few at the start of a run, not more
WINDOW, ENOUGH = 100, 20  # losses of recent steps that a new one is compared with
ROBUST_DEVIATIONS = 8.0  # a loss so far above the median is a spike
_LEAST_DEVIATION = 0.01  # of the median: where losses hardly vary, small steps are no spikes
_SHOWN = 8  # most image ids in a message
OnSpike = Literal["skip", "stop"]


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


class StepGuard:
    """Judges every step before it changes the weights.

    A loss is a spike if it lies more than 8 robust standard deviations (1.4826 times the median
    absolute deviation, at least 1 % of the median) above the median of the last 100 losses that
    were none. The first 20 steps of a run are no spikes.

    Example:
        >>> guard = StepGuard()
        >>> for loss in (2.0, 2.1) * 10:
        ...     assert guard.judge({}, 1.0, loss, False, "skip") == "good"
        >>> guard.judge({}, 1.0, 9.0, False, "skip")
        'spike'

    Attributes:
        skipped_steps: Steps in a row that loss scaling skipped.
        spikes: Spikes in a row.

    Source:
        Iglewicz, Hoaglin (1993), How to detect and handle outliers: the modified z-score.
        Chowdhery et al. (2022), PaLM, section 5.1: batches at a spike are skipped.
    """

    def __init__(self) -> None:
        self.skipped_steps = self.spikes = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def judge(
        self,
        bad: Mapping[str, float],
        norm: float,
        loss: float,
        scaled: bool,
        on_spike: OnSpike | None = None,
        where: str = "This step",
        images: Sequence[str] = (),
    ) -> Verdict:
        """Whether a step may change the weights. All ranks must give the same numbers.

        Args:
            bad: The terms whose sum over the step is NaN or infinite.
            norm: The norm of the gradient.
            loss: The weighted loss of the step.
            scaled: Whether loss scaling is on, which skips a gradient that overflowed.
            on_spike: What a spike does; None does not look for any.
            where: The step; a message begins with it.
            images: Ids of the images of the step.

        Raises:
            NotFiniteLoss: a term is bad, or the gradient is, repeatedly with loss
                scaling.
            LossSpike: the loss jumped and `on_spike` is "stop", or it jumped 10 times in a row.
        """
        overflowed = not bad and not math.isfinite(norm)
        self.skipped_steps = self.skipped_steps + 1 if overflowed else 0
        if overflowed and (not scaled or self.skipped_steps >= MAX_SKIPPED_STEPS):
            bad = {"the gradient": norm}
        if bad:
            values = ", ".join(f"{name} is {value}" for name, value in bad.items())
            times = f" for {self.skipped_steps} steps in a row" if overflowed and scaled else ""
            raise NotFiniteLoss(
                f"{where}: {values}{times}{_of(images)}. The weights were not changed by this step "
                "and the last checkpoint is intact. Try a smaller learning_rate, max_grad_norm=, "
                "or precision='fp32'."
            )
        if overflowed:
            return "overflow"
        return "good" if on_spike is None else self._compare(loss, on_spike, where, images)

    def _compare(
        self, loss: float, on_spike: OnSpike, where: str, images: Sequence[str]
    ) -> Verdict:
        limit = self.limit()
        if loss <= limit:
            self.spikes = 0
            self.losses.append(loss)
            return "good"
        self.spikes += 1
        if on_spike == "skip" and self.spikes < MAX_SKIPPED_STEPS:
            return "spike"
        times = f" for {self.spikes} steps in a row" if on_spike == "skip" else ""
        raise LossSpike(
            f"{where}: the loss is {loss:.4g}{times}, but {median(self.losses):.4g} is usual and "
            f"more than {limit:.4g} is a spike{_of(images)}. The weights were not changed by this "
            "step and the last checkpoint is intact. Try a smaller learning_rate, "
            "max_grad_norm=, or on_spike=None."
        )

    def limit(self) -> float:
        """The largest loss that is no spike; infinite until there are enough losses."""
        if len(self.losses) < ENOUGH:
            return math.inf
        middle = median(self.losses)
        deviation = 1.4826 * median(abs(loss - middle) for loss in self.losses)
        return middle + ROBUST_DEVIATIONS * max(deviation, _LEAST_DEVIATION * abs(middle))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        counts = {"skipped_steps": self.skipped_steps, "spikes": self.spikes}
        return {**counts, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.skipped_steps, self.spikes = state["skipped_steps"], state["spikes"]
        self.losses = deque(state["losses"], maxlen=WINDOW)


def _of(images: Sequence[str]) -> str:
    """The images of a step, for a message."""
    if not images:
        return ""
    more = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
    return f", over the images {', '.join(images[:_SHOWN])}{more}"
