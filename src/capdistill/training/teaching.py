"""Which teacher each loss reads, where there are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias, cast

from torch import nn

from capdistill.compatibility import checked_forward
from capdistill.errors import ConfigError, suggest
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.teachers.ensemble import LOGITS, Ensemble

Teacher: TypeAlias = nn.Module | Mapping[str, nn.Module]
Needs: TypeAlias = Mapping[str | None, frozenset[str]]  # of each teacher by name; None: as a whole


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


def teachers_of(teacher: nn.Module) -> dict[str, nn.Module]:
    """The teachers that a loss may name: the members of an ensemble, or the only one there is."""
    if isinstance(teacher, Ensemble):
        return dict(teacher.members)
    return {str(getattr(teacher, "name", type(teacher).__name__)): teacher}


def require_named(losses: Mapping[str, DistillationLoss], teacher: nn.Module) -> None:
    """Check that every loss reads a teacher that there is.

    Of several teachers the mixture has logits; features, hidden states and attention are those of
    one of them.

    Raises:
        ConfigError: a loss names an unknown teacher, or none although it needs more than logits.
    """
    names = list(teachers_of(teacher))
    for term, loss in losses.items():
        if loss.teacher is not None and not loss.from_teacher:
            raise ConfigError(f"losses: '{term}' names a teacher, but reads none. Leave it out.")
        if loss.teacher is not None and loss.teacher not in names:
            hint = suggest(str(loss.teacher), names)
            raise ConfigError(f"losses: '{term}' names the teacher {loss.teacher!r}. {hint}")
        needed = ", ".join(sorted(loss.needs - LOGITS))
        if needed and len(names) > 1 and loss.from_teacher and loss.teacher is None:
            raise ConfigError(
                f"losses: '{term}' needs {needed}, which {len(names)} teachers do not have in "
                f'common. Name one of them: {{"name": ..., "teacher": "{names[0]}"}}, or '
                f"loss.teacher = '{names[0]}' (teachers: {', '.join(names)})."
            )


def specs(teacher: Any, needs: Needs, batch: Batch | None) -> dict[str | None, ModelSpec]:
    """The specification of each teacher that is read, by name.

    Raises:
        ConfigError: one has to be probed on a batch, and none was given.
    """
    named = teachers_of(teacher)
    readers = {name: teacher if name is None else named[name] for name in (None, *needs)}
    return {name: cast(Any, reader).spec(batch) for name, reader in readers.items()}


def checked_teaching(teacher: nn.Module, batch: Batch, needs: Needs) -> CaptionerOutput:
    """The outputs that the losses read, on the CPU, once the shapes of each are checked.

    Raises:
        IncompatibleModels: an output is not as in the specification of its teacher.
    """
    named = teachers_of(teacher)
    if len(named) == 1:
        return checked_forward(teacher, batch, frozenset[str]().union(*needs.values()))
    whole = checked_forward(teacher, batch, LOGITS) if None in needs else CaptionerOutput()
    outputs = {n: checked_forward(named[n], batch, needs[n]) for n in needs if n is not None}
    return replace(whole, members=outputs)
