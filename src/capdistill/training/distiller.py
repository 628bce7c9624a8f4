"""`Distiller`: a `Trainer` whose student also learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from capdistill import losses as loss_registry
from capdistill.captioner import Captioner
from capdistill.compatibility import (
    checked_forward,
    probe_batch,
    require_one_vocabulary,
    require_scalars,
)
from capdistill.errors import ConfigError
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.runtime import inference, seeded
from capdistill.training.config import DistillConfig
from capdistill.training.objective import Weight
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
        >>> distiller = cd.Distiller(teacher, student, losses={"token": "token"},
        ...                          weights={"ce": 0.5, "token": 0.5}, progress=False)
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
        require_teacher(teacher)
        require_apart(teacher, student)
        built = make_losses(losses)
        self.objective = self._make_objective(built, complete_weights(weights, built))
        self.objective.at_rest = shared_modules(teacher, student)
        self._built = False
        if _spec_is_known(teacher):
            self._build_losses(None)
        self._try_models()

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
        with inference(self.teacher):
            output: CaptionerOutput = self.teacher(batch, need=self.objective.need)
        return output

    def _place(self) -> None:
        super()._place()
        self.teacher.to(self.device)

    def _prepare(self, batch: Batch | None) -> None:
        """Build the losses where the teacher's specification had to wait for a real batch."""
        super()._prepare(batch)
        if self._built or batch is None:
            return
        batch = batch.to(self.device)
        self._build_losses(batch)
        self.objective.to(self.device)
        self._try_losses(batch)

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            require_apart(self.teacher, self.captioner)  # freezing may have changed
        return super()._optimizer()

    def _build_losses(self, batch: Batch | None) -> None:
        """Let every loss see both specifications and make its projectors from the run's seed."""
        teacher: Any = self.teacher
        student_spec, teacher_spec = self.captioner.spec(), teacher.spec(batch)
        with seeded(self.config.seed):
            for loss in self._losses.values():
                loss.build(student_spec, teacher_spec)
        if self.objective.need - {"features"}:
            require_one_vocabulary(student_spec, teacher_spec)
        self._built = True

    def _try_models(self) -> None:
        """One tiny batch through the models that are ours; no random state, flag or buffer changes.

        A foreign teacher is tried on the first real batch: it may not like a made-up one.
        """
        batch = probe_batch(self.captioner, self.models)
        if isinstance(self.teacher, Captioner):
            self._try_losses(batch)
        else:
            checked_forward(self.captioner, batch, self.objective.need)

    def _try_losses(self, batch: Batch) -> None:
        """A batch through both models and every loss."""
        student, teacher = (
            checked_forward(model, batch, self.objective.need) for model in self.models
        )
        require_scalars(self._losses, student, teacher, batch)

    @property
    def _losses(self) -> dict[str, DistillationLoss]:
        return cast("dict[str, DistillationLoss]", dict(self.objective.losses.items()))


def make_losses(
    losses: Mapping[str, DistillationLoss | str | Mapping[str, Any]] | None,
) -> dict[str, DistillationLoss]:
    """Losses, names of losses, or {"name": ..., arguments} to losses.

    Example:
        >>> make_losses({"soft": {"name": "token", "temperature": 2.0}})["soft"].temperature
        2.0

    Raises:
        ConfigError: something else, or a name that cannot name a term.
    """
    if losses is None:
        losses = {name: name for name in REFERENCE_WEIGHTS if name != "ce"}
    return {name: _make_loss(name, loss) for name, loss in losses.items()}


def _make_loss(name: str, loss: DistillationLoss | str | Mapping[str, Any]) -> DistillationLoss:
    if name == "ce" or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"losses: '{name}' cannot name a term. Use a word of your own such as 'token'; 'ce' "
            "is the cross-entropy, which every trainer has."
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


def require_teacher(teacher: Any) -> None:
    """A teacher is a module that can be asked for its specification.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "spec"):
        raise ConfigError(
            f"The teacher is {type(teacher).__name__}. Give a capdistill.Captioner, or "
            "capdistill.teachers.wrap(model, adapt, tokenizer) for any other captioner."
        )


def _spec_is_known(teacher: Any) -> bool:
    try:
        teacher.spec()
    except ConfigError:  # to be probed on a real batch
        return False
    return True


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


def shared_modules(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """Modules that are part of both.

    Example:
        >>> eye = nn.Linear(1, 1)
        >>> shared_modules(nn.Sequential(eye, nn.ReLU()), nn.Sequential(eye, nn.ReLU())) == [eye]
        True
    """
    theirs = set(teacher.modules())
    return [module for module in student.modules() if module in theirs]
