"""What a step does with a loss or gradient that it should not follow: NaN, overflow, a spike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from capdistill.errors import LossSpike, NotFiniteLoss

MAX_SKIPPED_STEPS = 10  # in a row; loss scaling needs a few at the start of a run, not more
WINDOW, ENOUGH = 100, 20  # losses of recent steps that a new one is compared with
ROBUST_DEVIATIONS = 8.0  # a loss so far above the median is a spike
_LEAST_DEVIATION = 0.01  # of the median: where losses hardly vary, small steps are no spikes
_SHOWN = 8  # most image ids in a message

Verdict = Literal["good", "overflow", "spike"]
OnSpike = Literal["skip", "stop"]


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
