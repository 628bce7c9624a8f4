"""`Distiller`: a `Trainer` whose student also learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from capdistill import losses as loss_registry
from capdistill.averaging import WeightAverage
from capdistill.captioner import Captioner
from capdistill.compatibility import (
    build_losses,
    checked_forward,
    checked_teaching,
    device_of,
    output_to,
    probe_batch,
    require_apart,
    require_named_teachers,
    require_scalars,
    shared_modules,
    teacher_specs,
    teachers_of,
)
from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import autocast, evaluating, seeded
from capdistill.teachers.cached import (
    CachedTeacher,
    cached_parts,
    made_up_targets,
    no_samples,
    require_kept,
)
from capdistill.teachers.ensemble import Ensemble, leaves
from capdistill.teachers.vocabularies import for_student, share_dropped_mass, with_dropped_mass
from capdistill.training.config import DEFAULT_WEIGHTS, DistillConfig, DistillOptions
from capdistill.training.gradnorm import GradNorm
from capdistill.training.objective import Objective, Weights
from capdistill.training.on_policy import (
    replace_captions,
    require_scored,
    sharing_trunks,
    with_shared_tokens,
)
from capdistill.training.run_directory import options_of
from capdistill.training.sharding import is_placed_teacher
from capdistill.training.trainer import Trainer
from capdistill.training.weighting import LossRatio, Uncertainty, Weighting

Teacher: TypeAlias = nn.Module | Mapping[str, nn.Module]


class Distiller(Trainer):
    """Train a student on the references and on the outputs of a teacher.

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
        teacher: A captioner, or what `capdistill.teachers.wrap` or `cache` returned. It runs in
            evaluation mode and without gradients; its flags are restored afterwards. Several are a
            mapping of names to teachers, or a `capdistill.teachers.Ensemble`: losses of logits then
            read their mixture, and any loss reads the one that it names. For a teacher of another
            vocabulary see `capdistill.teachers.TrimmedTeacher` and `RetokenizingTeacher`.
        student: The captioner that is trained.
        losses: Term name -> loss, or a registered name, or {"name": ..., arguments}. By default
            token, feature and hidden. "teacher" among the arguments: the name or place of one.
        weights: Weights of "ce" and of each loss; see `Objective`. A loss without a weight gets its
            default: 0.3 for ce, 0.7 for token, 0.2 for feature, 0.1 for hidden, 1 for any other. A
            term of weight 0 is not built. `Uncertainty`, `GradNorm` and `LossRatio` adapt them.
        config: A `DistillConfig` as a whole.
        options: Fields of `DistillConfig`, instead of those of `config`.

    Raises:
        IncompatibleModels: the models do not fit each other or a loss; the message says what.
        ConfigError: unknown names, or a parameter that is both the teacher's and trained.
    """

    config_class: type[DistillConfig] = DistillConfig
    config: DistillConfig

    def __init__(
        self,
        teacher: Teacher,
        student: Captioner,
        losses: Mapping[str, DistillationLoss | str | Mapping[str, Any]] | None = None,
        weights: Weights | None = None,
        config: DistillConfig | None = None,
        **options: Unpack[DistillOptions],
    ) -> None:
        self._start(as_teacher(teacher), student, config, options)
        built = make_losses(losses)
        self._set_up(built, complete_weights(weights, built))

    def _start(
        self,
        teacher: nn.Module | None,
        student: Captioner,
        config: DistillConfig | None,
        options: Mapping[str, Any],
    ) -> None:
        self.teacher: nn.Module | None = for_student(teacher, student)
        self._sharing: list[Captioner] = []  # one for each frozen trunk that several models have
        super().__init__(student, config, **options)

    def _set_up(self, losses: Mapping[str, DistillationLoss], weights: Weights) -> None:
        """Build the objective; fit the models to each other and to the losses."""
        self.objective = Objective(self.student, losses, weights, self.config.label_smoothing)
        self._teacher_is_placed = is_placed_teacher(self.teacher)
        self._teacher_parts = [] if self.teacher is None else list(self.teacher.modules())
        self._followers = self._find_followers()
        if self.teacher is not None:
            require_named_teachers(self._losses, self.teacher)
            if cached_parts(self.teacher):
                require_kept(self._losses, teachers_of(self.teacher))
        self.loss_options = {name: options_of(loss) for name, loss in self._losses.items()}
        self._keep_apart()
        self._built = False
        self.check_options()
        if self._specs_are_known():
            self._build_losses(None)
        self.place()
        self._try_models()

    @property
    def student(self) -> Captioner:
        """The captioner that is trained."""
        return self.captioner

    @property
    def models(self) -> list[nn.Module]:
        """Student and teacher."""
        return [self.captioner, *([] if self.teacher is None else [self.teacher])]

    def prepare(self, batch: Batch) -> None:
        """Build the losses if the teacher's specification had to be probed on a real batch."""
        if self._built:
            return
        batch = batch.to(self.device)
        self._build_losses(batch)
        self.objective.to(self.device)
        self._try_losses(batch)

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch, with the share `on_policy` of its captions sampled from the student."""
        config = self.config
        if not config.on_policy:
            return batch
        with autocast(self.device, self.precision):
            return replace_captions(
                self.captioner,
                batch.to(self.device),
                config.share_on_policy(self.progress),
                temperature=config.on_policy_temperature,
                top_k=config.on_policy_top_k,
                seed=config.seed,
                epoch=self.epoch,
            )

    def teacher_output(self, batch: Batch) -> CaptionerOutput | None:
        """The teacher's output for a batch: evaluation mode, no gradients, no dropout.

        `fit` sets the mode once; elsewhere flags are restored. Each of several teachers runs once.
        """
        if self.teacher is None or not self.objective.teacher_needs:
            return None
        given = batch.to(device_of(self.teacher)) if self._teacher_is_placed else batch
        trains = any(part.training for part in self._teacher_parts)
        with torch.no_grad(), evaluating(self.teacher) if trains else nullcontext():
            output = self._taught(self.teacher, given)
        return output_to(output, self.device) if self._teacher_is_placed else output

    def _taught(self, teacher: nn.Module, batch: Batch) -> CaptionerOutput:
        """The outputs that the losses read; the mixture of several teachers if one reads it."""
        needs = self.objective.teacher_needs
        if isinstance(teacher, Ensemble) and len(teacher.members) > 1:
            named = {name: need for name, need in needs.items() if name is not None}
            draw = (self.config.seed, self.epoch) if self.objective.training else None
            return teacher.outputs(batch, named, mixed=None in needs, draw=draw)
        return cast(CaptionerOutput, teacher(batch, need=frozenset[str]().union(*needs.values())))

    def make_ready(self, batch: Batch | None = None) -> torch.optim.Optimizer:
        """As `Stepper.make_ready`; no parameter of the teacher may be trained."""
        if batch is not None:
            self.prepare(batch)
        self._keep_apart()  # freezing may have changed
        several = [] if self.teacher is None else [self.student, *leaves(self.teacher)]
        self._sharing = sharing_trunks(several)
        return super().make_ready(batch)

    def _forward(self, batch: Batch, module: nn.Module | None = None) -> dict[str, Tensor]:
        """As in `Stepper`; a frozen trunk that several models have runs once."""
        if self._sharing:
            with autocast(self.device, self.precision):
                shared = with_shared_tokens(self._sharing, batch.to(self.device))
            batch = replace(batch, cached=shared.cached)
        return super()._forward(batch, module)

    @property
    def averages(self) -> dict[str, WeightAverage]:
        """As in `Stepper`, and those of teachers that follow the student; see `MeanTeacher`."""
        return {**super().averages, **self._followers}

    def needs_whole_weights(self) -> dict[str, object]:
        """As in `Stepper`; and what samples from the student, or follows its weights."""
        own = {"on_policy": self.config.samples_on_policy, "MeanTeacher": self._followers}
        return super().needs_whole_weights() | own

    def _make_callbacks(self, out: Any, monitor: Any, callbacks: Any) -> list[Any]:
        return super()._make_callbacks(out, monitor, with_dropped_mass(callbacks, self.teacher))

    def _emit(self, event: str, *row: Any) -> None:
        if self.ranks.several:
            share_dropped_mass(event, self.teacher, self.ranks)
        super()._emit(event, *row)

    def _find_followers(self) -> dict[str, WeightAverage]:
        parts = {} if self.teacher is None else dict(self.teacher.named_modules(prefix="teacher"))
        named = {name: getattr(part, "average", None) for name, part in parts.items()}
        found = {name: each for name, each in named.items() if isinstance(each, WeightAverage)}
        if not all(each.follows(self.student) for each in found.values()):
            raise ConfigError(
                f"The teacher is an average of another model than '{self.student.name}', which is "
                "trained. Give MeanTeacher(student) and the same student to the distiller."
            )
        return found

    def check_options(self) -> None:
        """As in `Trainer`; captions sampled from the student must teach it something."""
        super().check_options()
        if self.config.samples_on_policy:
            require_scored(self._losses, self.config.on_policy, "ce" in self.objective.weights)
            for cached in cached_parts(self.teacher):
                raise ConfigError(f"on_policy={self.config.on_policy}: {no_samples(cached)}")

    def _keep_apart(self) -> None:
        if self.teacher is not None:
            require_apart(self.teacher, self.objective)
            self.objective.kept_in_eval = shared_modules(self.teacher, self.objective)

    def _build_losses(self, batch: Batch | None) -> None:
        """Build every loss with both specifications; projectors are seeded by the run."""
        student, theirs = self.captioner.spec(), self._teacher_specs(batch)
        with seeded(self.config.seed):
            build_losses([*self._losses.values()], student, theirs)
        self._keep_apart()  # the projectors just created
        self._built = True

    def _teacher_specs(self, batch: Batch | None) -> dict[str | None, ModelSpec]:
        if self.teacher is None:
            return {None: self.captioner.spec()}
        return teacher_specs(self.teacher, self.objective.teacher_needs, batch)

    def _specs_are_known(self) -> bool:
        with suppress(ConfigError):  # otherwise to be probed on a real batch
            self._teacher_specs(None)
            return True
        return False

    def _try_models(self) -> None:
        """Run one tiny batch through our models; no random state, flag or buffer changes.

        A foreign teacher is tried on the first real batch: it may not accept a made-up one.
        """
        batch, ours = probe_batch(self.captioner, self.models), (Captioner, CachedTeacher)
        if self.teacher is None or all(isinstance(each, ours) for each in leaves(self.teacher)):
            with made_up_targets(self.teacher):
                self._try_losses(batch)
        else:
            checked_forward(self.captioner, batch, self.objective.needed_outputs)

    def _try_losses(self, batch: Batch) -> None:
        """Run a batch through both models and every loss."""
        student = checked_forward(self.captioner, batch, self.objective.needed_outputs)
        teacher = None
        if self.teacher is not None:
            teacher = checked_teaching(self.teacher, batch, self.objective.teacher_needs)
        require_scalars(self._losses, student, teacher, batch)

    @property
    def _losses(self) -> dict[str, DistillationLoss]:
        return cast("dict[str, DistillationLoss]", dict(self.objective.losses.items()))


def as_teacher(teacher: Any) -> nn.Module:
    """One module: a mapping of names to teachers becomes an ensemble with equal weights.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> as_teacher({"one": captioner, "other": captioner}).weights
        {'one': 0.5, 'other': 0.5}

    Raises:
        ConfigError: no module with a specification.
        IncompatibleModels: several teachers with different vocabularies.
    """
    if isinstance(teacher, Mapping):
        return Ensemble(teacher)
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "spec"):
        raise ConfigError(
            f"The teacher is {type(teacher).__name__}. Give a capdistill.Captioner, or "
            "capdistill.teachers.wrap(model, adapt, tokenizer) for any other captioner. Several "
            "are a mapping of names to teachers, or a capdistill.teachers.Ensemble."
        )
    return teacher


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
        losses = {name: name for name in DEFAULT_WEIGHTS if name != "ce"}
    if not isinstance(losses, Mapping):
        raise ConfigError(
            f"losses: {losses!r} was given. Give a mapping of term names to losses, for instance "
            'losses={"token": "token"} or {"token": {"name": "token", "temperature": 2.0}}.'
        )
    return {name: _make_loss(name, loss) for name, loss in losses.items()}


def _make_loss(name: str, loss: DistillationLoss | str | Mapping[str, Any]) -> DistillationLoss:
    if name == "ce" or not str(name).isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"losses: '{name}' cannot name a term. Use an identifier such as 'token'; 'ce' is the "
            "cross-entropy, which every trainer has."
        )
    if isinstance(loss, DistillationLoss):
        return loss
    if isinstance(loss, str):
        return loss_registry.create(loss)
    if isinstance(loss, Mapping) and "name" in loss:
        arguments = {key: value for key, value in loss.items() if key not in ("name", "teacher")}
        made = loss_registry.create(loss["name"], **arguments)
        if loss.get("teacher") is not None:
            made.teacher = loss["teacher"]
        return made
    raise ConfigError(
        f"losses: '{name}' was given {loss!r}. Give a DistillationLoss, a registered name "
        f"({', '.join(loss_registry.names())}), or a dict with 'name' and its arguments."
    )


def complete_weights(weights: Weights | None, losses: Mapping[str, object]) -> Weights:
    """The given weights, and the defaults of the terms without one.

    Example:
        >>> complete_weights({"token": 1.0}, {"token": None, "mine": None})
        {'ce': 0.3, 'token': 1.0, 'mine': 1.0}
    """
    require_weights(weights)
    defaults = {name: DEFAULT_WEIGHTS.get(name, 1.0) for name in ("ce", *losses)}
    if isinstance(weights, Mapping) and isinstance(weights.get("name"), str):
        weights = make_weighting(weights)
    if isinstance(weights, Weighting):
        weights.base = {**defaults, **weights.base}
        return weights
    return {**defaults, **(weights or {})}


def require_weights(weights: object) -> None:
    """Refuse what is neither a mapping nor a `Weighting`."""
    if not (weights is None or isinstance(weights, (Mapping, Weighting))):
        raise ConfigError(
            f"weights: {weights!r} was given. Give a mapping of term names to weights, for "
            'instance weights={"ce": 0.5, "token": 0.5}, or a capdistill.training.Weighting.'
        )


_WEIGHTINGS: dict[str, type[Weighting]] = {w.kind: w for w in (Uncertainty, GradNorm, LossRatio)}


def make_weighting(values: Mapping[str, Any]) -> Weighting:
    """A weighting from a run file: its name, its options, and base weights by term.

    Example:
        >>> made = make_weighting({"name": "gradnorm", "alpha": 1.0, "ce": 0.3, "token": 0.7})
        >>> made.alpha, made.base
        (1.0, {'ce': 0.3, 'token': 0.7})

    Raises:
        UnknownName: there is no such weighting; the message lists those there are.
        ConfigError: an invalid option.
    """
    name = values["name"]
    if name not in _WEIGHTINGS:
        raise UnknownName(
            f"weights: there is no weighting '{name}'. {suggest(str(name), _WEIGHTINGS)}"
        )
    kind = _WEIGHTINGS[name]
    options = {key: value for key, value in values.items() if key in kind.options}
    base = {k: value for k, value in values.items() if k not in (*kind.options, "name")}
    return kind(base, **options)
