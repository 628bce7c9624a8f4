"""Student and losses as one trainable module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, suggest
from capdistill.fake_quantization import FakeQuantizer, release
from capdistill.losses.base import (
    DistillationLoss,
    Schedule,
    check_schedule,
    given,
    scheduled,
)
from capdistill.losses.divergence import cross_entropy
from capdistill.outputs import FEATURES_ONLY, Batch, CaptionerOutput
from capdistill.training.weighting import Weighting

Weight = Schedule | Mapping[str, Any]  # a mapping is a schedule as data
Weights = Mapping[str, Weight] | Weighting


def _require_untrained(losses: Mapping[str, DistillationLoss]) -> None:
    """Refuse losses with what another trainer has trained: its run would be passed on to this one.

    Raises:
        ConfigError: names the loss.
    """
    for name, loss in losses.items():
        if loss.was_trained and loss.state_dict():
            raise ConfigError(
                f"losses: '{name}' is a {type(loss).__name__} that another trainer has used, with "
                "the projections that it trained. Give each trainer a new one, or a name or a dict "
                'such as {"name": "feature"}, from which each makes its own. To go on with the '
                "trained ones on purpose, set loss.was_trained = False."
            )


class Objective(nn.Module):
    """The terms of a step: cross-entropy, and the distillation losses on the same forward pass.

    All trainable computation happens in `forward`. The projectors of the losses are submodules, so
    that optimizer, clipping, checkpoints and `to(device)` see them.

    Args:
        student: The captioner that is trained.
        losses: Distillation losses by term name.
        weights: Weights of the terms, including "ce": a number, a pair (first, last) that is
            interpolated linearly over the run, a function of the run's progress in [0, 1], or a
            schedule as data such as {"schedule": "cosine", "first": 1.0, "last": 0.0}. A term whose
            weight is 0 throughout is left out. A `Weighting` adapts its base weights.
        label_smoothing: Label smoothing of the cross-entropy term.

    Attributes:
        kept_in_eval: Modules that stay in evaluation mode: those shared with a teacher.
        quantizer: What rounds the student's weights and activations, or None.
        weighting: What adapts the weights, or None.
    """

    def __init__(
        self,
        student: Captioner,
        losses: Mapping[str, DistillationLoss],
        weights: Weights,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _require_untrained(losses)
        base = weights.base if isinstance(weights, Weighting) else weights
        options = weights.options if isinstance(weights, Weighting) else ()
        self.weights = check_weights(base, losses, options)
        self._base: dict[str, float] = {}  # of the current step
        self.student = student
        self.losses = nn.ModuleDict({k: loss for k, loss in losses.items() if k in self.weights})
        self.label_smoothing = label_smoothing
        self.kept_in_eval: Sequence[nn.Module] = ()
        self.quantizer: FakeQuantizer | None = None
        self.weighting: Weighting | None = None
        if isinstance(weights, Weighting):
            weights.build(list(self.weights), student)
            self.weighting = weights

    def quantize(
        self, scheme: str | None, compiled: object = False, teachers: Iterable[nn.Module] = ()
    ) -> None:
        """Let the student compute as its export to int8 will; not so if the scheme is None.

        Raises:
            ConfigError: it cannot, or a teacher would do so too.
        """
        if scheme is None:
            release(self.student)
            self.quantizer = None
            return
        if compiled:
            raise ConfigError(
                f"quantize={scheme!r} exchanges weights during a call, which a compiled model does "
                f"not see. Leave out compile={compiled!r}, or quantize."
            )
        self.quantizer = self.quantizer or FakeQuantizer(self.student)
        self.quantizer.require_apart(teachers)
        self.quantizer.attach()

    def release(self) -> None:
        """Give the student back: in evaluation mode, as it is saved."""
        self.student.eval()
        if self.quantizer is not None:
            self.quantizer.detach()

    @property
    def needed_outputs(self) -> frozenset[str]:
        """The outputs of both models that the losses need; features alone do not run a decoder."""
        return frozenset[str]().union(*(loss.needs for _, loss in self._losses()))

    @property
    def reads_words(self) -> bool:
        """Whether a term needs the decoder; otherwise it does not run."""
        return "ce" in self.weights or bool(self.needed_outputs - FEATURES_ONLY)

    def reachable(self) -> dict[str, nn.Parameter]:
        """The parameters that every backward pass reaches, by name: without an idle decoder's."""
        decoder: nn.Module = self.student.decoder
        apart: list[nn.Module] = [] if self.reads_words else [decoder]
        apart += [self.weighting] if self.weighting is not None else []
        idle = {id(p) for part in apart for p in part.parameters()}
        trained = ((n, p) for n, p in self.named_parameters() if p.requires_grad)
        return {name: parameter for name, parameter in trained if id(parameter) not in idle}

    @property
    def teacher_needs(self) -> dict[str | None, frozenset[str]]:
        """What the losses need of each teacher that they name; None is the teacher as a whole."""
        needs: dict[str | None, frozenset[str]] = {}
        for _, loss in self._losses():
            if loss.from_teacher:
                needs[loss.teacher] = needs.get(loss.teacher, frozenset()) | loss.needs
        return needs

    def forward(
        self,
        batch: Batch,
        teacher: CaptionerOutput | None = None,
        input_fn: Callable[[Batch, Tensor], Tensor] | None = None,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """The sum of every term over the batch, unweighted, as float32 scalars.

        Args:
            batch: Its targets are those of the cross-entropy.
            teacher: The teacher's output for the batch; of several, with those of `members`.
            input_fn: Returns the student's input instead of `batch.inputs`; see
                `Captioner.forward`.
            progress: Share of the run that is done, for schedules inside a loss.
        """
        needed = self.needed_outputs | ({"logits"} if "ce" in self.weights else set())
        with self.quantizer.watching(self.training) if self.quantizer else nullcontext():
            student: CaptionerOutput = self.student(batch, need=needed, input_fn=input_fn)
        sums = {}
        if "ce" in self.weights:
            logits = given("cross-entropy", "logits", "student", student.logits)
            mask, weights = batch.reference_mask, batch.caption_weights
            sums["ce"] = cross_entropy(logits, batch.targets, mask, self.label_smoothing, weights)
        for name, loss in self._losses():
            loss.progress = progress
            sums[name] = loss(student, teacher and teacher.of(loss.teacher), batch)
        return sums

    def train(self, mode: bool = True) -> Objective:
        """As `nn.Module.train`; modules shared with a teacher stay in evaluation mode."""
        super().train(mode)
        if mode and self.quantizer is not None:
            self.quantizer.attach()
        for module in self.kept_in_eval:
            module.eval()
        return self

    def counts(self, *batches: Batch) -> dict[str, float]:
        """The count of each term over all these batches, by which its sum is divided."""
        counts = dict.fromkeys(self.weights, 0.0)
        for batch in batches:
            if "ce" in counts:
                mask, each = batch.reference_mask, batch.caption_weights
                counts["ce"] += float((mask if each is None else mask * each[:, None]).sum())
            for name, loss in self._losses():
                counts[name] += float(loss.count(batch))
        return counts

    def start_step(
        self, progress: float, step: int, epoch: int, scale: float = 1.0
    ) -> dict[str, float | Tensor]:
        """The weights in force in the step that begins.

        Args:
            progress: Share of the run that is done.
            step: Optimizer steps done.
            epoch: Epochs done.
            scale: By which the loss is multiplied for its backward pass.
        """
        self._base = {name: self._base_weight(name, progress) for name in self.weights}
        if self.quantizer is not None:
            self.quantizer.forget()
        if self.weighting is not None:
            self.weighting.start_step(step, epoch, scale)
        in_force = self._in_force()
        return {n: w.detach() if isinstance(w, Tensor) else w for n, w in in_force.items()}

    def _in_force(self) -> dict[str, float | Tensor]:
        """Base weights times factors, with gradients where they are learned."""
        if self.weighting is None:
            return {**self._base}
        pairs = zip(self._base.items(), self.weighting.factors(), strict=True)
        return {name: base * factor for (name, base), factor in pairs}

    def total(
        self,
        sums: Mapping[str, Tensor],
        counts: Mapping[str, float],
        parts: int = 1,
    ) -> Tensor:
        """The loss of a micro-batch, one of `parts` of the step: weighted means and penalty."""
        weights = self._in_force()
        means = {name: value / (counts[name] or 1.0) for name, value in sums.items()}
        loss = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
        if self.weighting is None:
            return loss
        self.weighting.observe(means, self.student)
        present = [name for name, count in counts.items() if count]
        return loss + self.weighting.penalty(self._base, present) / parts

    def end_step(
        self,
        weights: Mapping[str, float | Tensor],
        sums: Mapping[str, float],
        counts: Mapping[str, float],
        highest: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """Let weighting and quantizer take in a step; returns its weights as numbers.

        Args:
            weights: From `start_step`.
            sums, counts: Of the terms over the step.
            highest: The highest of each value over all ranks; None if there is one.
        """
        for _, loss in self._losses():
            loss.was_trained = True
        if self.quantizer is not None:
            self.quantizer.update(highest)
        else:
            self.student.activation_ranges = None  # they would be those of other weights
        if self.weighting is not None:
            self.weighting.end_step(sums, counts)
        return {n: w.item() if isinstance(w, Tensor) else w for n, w in weights.items()}

    def weight(self, name: str, progress: float) -> float:
        """A term's weight at `progress` (0 to 1) of the run, as it would be in force now.

        Raises:
            ConfigError: a function returned something else than a finite number >= 0.
        """
        base = self._base_weight(name, progress)
        if self.weighting is None:
            return base
        factor = self.weighting.factors()[list(self.weights).index(name)]
        return base * (factor.item() if isinstance(factor, Tensor) else factor)

    def settings(self, progress: float) -> dict[str, dict[str, float]]:
        """What schedules inside the losses have reached: term -> {name: value}, if any."""
        found = {name: loss.settings(progress) for name, loss in self._losses()}
        return {name: values for name, values in found.items() if values}

    def _base_weight(self, name: str, progress: float) -> float:
        return scheduled(f"weights: '{name}'", self.weights[name], progress)

    def _losses(self) -> Iterator[tuple[str, DistillationLoss]]:
        return cast("Iterator[tuple[str, DistillationLoss]]", iter(self.losses.items()))


def check_weights(
    weights: Mapping[str, Any], losses: Iterable[str], options: Iterable[str] = ()
) -> dict[str, Schedule]:
    """The weights of the terms to build: each has its term, none is negative, 0 is left out.

    Example:
        >>> check_weights({"ce": 1, "token": [0.7, 0.1], "hidden": 0.0}, ["token", "hidden"])
        {'ce': 1.0, 'token': (0.7, 0.1)}

    Args:
        weights: By term.
        losses: The terms beside "ce".
        options: Names that may stand beside the weights, for the message.

    Raises:
        ConfigError: otherwise, with the names that exist.
    """
    known = ["ce", *losses]
    for name in weights:
        if name not in known:
            raise ConfigError(
                f"weights: there is no term '{name}'. {suggest(name, [*known, *options])}"
            )
    checked = {
        name: check_schedule(f"weights: '{name}'", weight) for name, weight in weights.items()
    }
    built = {name: weight for name, weight in checked.items() if weight not in (0.0, (0.0, 0.0))}
    if not built:
        raise ConfigError("weights: every term is 0, so there is nothing to train.")
    return built


def warn_of_untrained(objective: Objective) -> None:
    """Name the parameters that should get a gradient and got none in a backward pass."""
    trained = objective.reachable()
    left = [name for name, parameter in trained.items() if parameter.grad is None]
    if left:
        warnings.warn(
            f"{len(left)} of {len(trained)} trainable tensors get no gradient and will stay as "
            f"they are: {', '.join(left[:10])}{' ...' if len(left) > 10 else ''}. Use them in "
            "forward, remove them, or freeze them with requires_grad_(False).",
            stacklevel=3,
        )


def without_recurrent(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module without a recurrent layer, whose backward needs training mode.

    On CUDA, the backward pass of a recurrent layer in evaluation mode is refused.
    """
    if not any(isinstance(part, nn.RNNBase) for part in module.modules()):
        yield module
    elif not isinstance(module, nn.RNNBase):
        for child in module.children():
            yield from without_recurrent(child)
