"""`Distiller`: a `Trainer` whose student also learns from a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from capdistill import losses as loss_registry
from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.training.config import DistillConfig
from capdistill.training.objective import Weight
from capdistill.training.probe import probe_batch, require_output
from capdistill.training.runtime import autocast
from capdistill.training.trainer import Trainer

REFERENCE_WEIGHTS = {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}


class Distiller(Trainer):
    """Train a student on the references and on what a teacher says of them.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> distiller = cd.Distiller(teacher, student, losses={"token": cd.TokenKD(temperature=2)},
        ...                          weights={"ce": 0.5, "token": 0.5}, device="cpu", progress=False)
        >>> history = distiller.fit(data.train.subset(8), epochs=1, batch_size=8)
        >>> sorted(history.epochs[0]["train"]["terms"])
        ['ce', 'token']

    Args:
        teacher: A captioner, or what `capdistill.teachers.wrap` gives. It is only asked: in
            evaluation mode, without gradients; its flags are restored after each step.
        student: The captioner that is trained.
        losses: Term name -> loss, or a registered name, or {"name": ..., arguments}. The three of
            the reference unless given: token, feature, hidden.
        weights: Of "ce" and of each loss; see `Objective`. A loss without one gets the
            reference's, or 1; a term of weight 0 is not built.
        options: Fields of `DistillConfig`.

    Raises:
        IncompatibleModels: the models do not fit each other or a loss; the message says what.
        ConfigError: unknown names, or a parameter that both models would share and train.
    """

    config_class = DistillConfig

    def __init__(
        self,
        teacher: nn.Module,
        student: Captioner,
        losses: Mapping[str, DistillationLoss | str | Mapping[str, Any]] | None = None,
        weights: Mapping[str, Weight] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, **options)
        self.teacher = teacher
        require_apart(teacher, student)
        built = make_losses(losses)
        self.objective = self._make_objective(built, complete_weights(weights, built))
        self._built = False
        if isinstance(teacher, Captioner):
            self._build_losses(None)

    @property
    def student(self) -> Captioner:
        """The captioner that is trained."""
        return self.captioner

    @property
    def models(self) -> list[nn.Module]:
        """Student and teacher."""
        return [self.captioner, self.teacher]

    def teach(self, batch: Batch) -> CaptionerOutput | None:
        """What the teacher says of a batch: evaluation mode, no gradients, no dropout."""
        if not self.objective.losses:
            return None
        with asking(self.teacher), torch.no_grad():
            output: CaptionerOutput = self.teacher(batch, need=self.objective.need)
        return output

    def _place(self) -> None:
        super()._place()
        self.teacher.to(self.device)

    def _prepare(self, batch: Batch | None) -> None:
        super()._prepare(batch)
        if not self._built:
            self._build_losses(batch)
            self.objective.to(self.device)

    def step(self, *micro_batches: Batch) -> dict[str, Any]:
        """One optimizer step over all the given batches, as if they were one."""
        if not self._built:
            self._build_losses(micro_batches[0])
        return super().step(*micro_batches)

    def _build_losses(self, batch: Batch | None) -> None:
        """Let every loss see both specifications, then run both models on one tiny batch."""
        teacher: Any = self.teacher
        student_spec, teacher_spec = self.captioner.spec(), teacher.spec(batch)
        for loss in self.objective.losses.values():
            assert isinstance(loss, DistillationLoss)
            loss.build(student_spec, teacher_spec)
        self._built = True
        if batch is None:
            self._try_both()

    def _try_both(self) -> None:
        """One tiny batch through both models; no random state, flag or buffer changes."""
        need = self.objective.need
        for model in (self.captioner, self.teacher):
            device = next(model.parameters()).device
            batch = probe_batch(self.captioner, self.models).to(device)
            with torch.random.fork_rng(), asking(model), torch.no_grad(), autocast(device, "fp32"):
                require_output(model, model(batch, need=need), batch, need)


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, whatever the caller did; every flag comes back after it."""
    from capdistill.captioner import evaluating

    with evaluating(model):
        yield


def make_losses(
    losses: Mapping[str, DistillationLoss | str | Mapping[str, Any]] | None,
) -> dict[str, DistillationLoss]:
    """Losses, names of losses, or {"name": ..., arguments} to losses.

    Example:
        >>> make_losses({"soft": {"name": "token", "temperature": 2.0}})["soft"].temperature
        2.0

    Raises:
        ConfigError: something else, or a name that can not name a term.
    """
    if losses is None:
        losses = {name: name for name in REFERENCE_WEIGHTS if name != "ce"}
    return {name: _make_loss(name, loss) for name, loss in losses.items()}


def _make_loss(name: str, loss: DistillationLoss | str | Mapping[str, Any]) -> DistillationLoss:
    if name == "ce" or not name.isidentifier():
        raise ConfigError(
            f"losses: '{name}' can not name a term. Use a word such as 'token'; 'ce' is the "
            "cross-entropy, which every trainer has."
        )
    if isinstance(loss, DistillationLoss):
        return loss
    if isinstance(loss, str):
        return loss_registry.create(loss)
    if isinstance(loss, Mapping) and "name" in loss:
        arguments = {key: value for key, value in loss.items() if key != "name"}
        return loss_registry.create(loss["name"], **arguments)
    raise ConfigError(
        f"losses: '{name}' was given {loss!r}. Give a DistillationLoss, a registered name "
        f"({', '.join(loss_registry.names())}), or a dict with 'name' and its arguments."
    )


def complete_weights(
    weights: Mapping[str, Weight] | None, losses: Mapping[str, object]
) -> dict[str, Weight]:
    """The given weights, and for the terms without one the reference's, or 1.

    Example:
        >>> complete_weights({"token": 1.0}, {"token": None, "mine": None})
        {'ce': 0.3, 'token': 1.0, 'mine': 1.0}
    """
    defaults = {name: REFERENCE_WEIGHTS.get(name, 1.0) for name in ("ce", *losses)}
    return {**defaults, **(weights or {})}


def require_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Teacher and student may share frozen modules, but nothing that is trained.

    Raises:
        ConfigError: they do; names the parameters.
    """
    theirs = {id(p) for p in teacher.parameters()}
    shared = [n for n, p in student.named_parameters() if p.requires_grad and id(p) in theirs]
    if shared:
        raise ConfigError(
            f"Teacher and student share trainable parameters: {', '.join(shared[:5])}"
            f"{' ...' if len(shared) > 5 else ''}. Give the student its own copy "
            "(copy.deepcopy), or freeze them with requires_grad_(False)."
        )


__all__ = ["Distiller", "IncompatibleModels"]
