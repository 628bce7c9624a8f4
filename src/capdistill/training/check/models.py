"""The models before any step: sizes, vocabularies, shapes and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.compatibility import ask, probe_batch
from capdistill.encoders.base import Encoder
from capdistill.errors import IncompatibleModels
from capdistill.losses.divergence import cross_entropy
from capdistill.losses.token import first_difference
from capdistill.outputs import ModelSpec
from capdistill.registry import stamp_of
from capdistill.runtime import asking, autocast
from capdistill.training.check.report import CheckRow
from capdistill.training.check.trial import Trial, millions, name_of, numel

_UNTAUGHT = 0.9  # of log V: the cross-entropy of a teacher that knows no words


def check_sizes(trial: Trial) -> Iterator[CheckRow]:
    """Parameters of each model, and the student's share."""
    totals = {role: numel(model.parameters()) for role, model in trial.roles.items()}
    for role, model in trial.roles.items():
        finding = f"{role} '{name_of(model)}': {millions(totals[role])} parameters"
        if role != "teacher":
            trained = numel(p for p in model.parameters() if p.requires_grad)
            finding += f", {millions(trained)} of them trained"
        yield CheckRow("models", "ok", finding)
    if "teacher" not in totals:
        return
    share = totals["student"] / max(totals["teacher"], 1)
    finding = f"the student has {share:.0%} of the teacher's parameters"
    fix = "" if share < 1 else "To get a smaller model, choose another preset (capdistill models)."
    yield CheckRow("models", "note" if fix else "ok", finding, fix)


def check_vocabularies(trial: Trial) -> Iterator[CheckRow]:
    """Entry by entry: the teacher reads the student's ids."""
    student, *teachers = [model.tokenizer.vocabulary for model in trial.roles.values()]
    place = first_difference(student, teachers[0]) if teachers else None
    if place is None:
        same = ", the same for both models" if teachers else ""
        yield CheckRow("vocabulary", "ok", f"{len(student)} entries{same}")
        return
    finding = (
        f"student and teacher differ at entry {place} ({len(student)} and {len(teachers[0])} "
        "entries), so that the teacher reads other words than were written"
    )
    if trial.need - {"features"}:  # ids that the teacher lacks would break even a CUDA context
        raise IncompatibleModels(f"{finding}. Build both models with one tokenizer.")
    fix = "Compare features alone, as here, or build both models with one tokenizer."
    yield CheckRow("vocabulary", "note", finding, fix)


def check_shapes(trial: Trial) -> Iterator[CheckRow]:
    """Compare what each model gives with what it promises; a foreign one may need a real batch."""
    tiny = probe_batch(trial.trainer.captioner, trial.trainer.models)
    for role, model in trial.roles.items():
        batch = tiny if isinstance(model, Captioner) else trial.batch
        ask(model, batch, trial.need)
        yield CheckRow("shapes", "ok", f"{role}: {_describe(model.spec())}")


def _describe(spec: ModelSpec) -> str:
    grid = f", grid {spec.grid[0]} x {spec.grid[1]}" if spec.grid else ""
    prefix = f", {spec.prefix_tokens} before the grid" if spec.prefix_tokens else ""
    hidden = " ".join(map(str, spec.hidden_dims)) or "not shown"
    return (
        f"{spec.tokens} tokens x {spec.feature_dim}{grid}{prefix}; hidden {hidden}; "
        f"attention {'shown' if spec.has_attention else 'not shown'}; "
        f"vocabulary {len(spec.vocabulary)}"
    )


def check_weights(trial: Trial) -> Iterator[CheckRow]:
    """Weights that no training has touched."""
    for role, model in trial.roles.items():
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, Encoder):
            continue
        if not _looks_random(encoder):
            yield CheckRow("weights", "ok", f"{role}: the encoder's weights look trained")
            continue
        stuck = role != "teacher" and encoder.trunk_frozen
        finding = f"{role}: encoder has random weights"
        finding += " and is frozen, so that it never learns to see" if stuck else ""
        fix = "Create it with weights=True (from the hub) or weights='a local file'."
        yield CheckRow("weights", "note", finding, fix)
    if "teacher" in trial.roles and trial.source is not None:
        yield from _check_teacher_knows(trial)


def _looks_random(encoder: Encoder) -> bool:
    """Whether the trunk's norms are as they were made; without norms, what the registry knows."""
    trunk = {id(p) for p in encoder.trunk_parameters()}
    biases = [
        getattr(part, name)
        for part in encoder.modules()
        if "Norm" in type(part).__name__ and id(getattr(part, "bias", None)) in trunk
        for name in ("bias", "running_mean")
        if isinstance(getattr(part, name, None), Tensor)
    ]
    if biases:
        return not any(bool(bias.any()) for bias in biases)
    stamp = stamp_of(encoder)
    return stamp is not None and stamp.kwargs.get("weights") is False


def _check_teacher_knows(trial: Trial) -> Iterator[CheckRow]:
    """A teacher no better than chance on real captions teaches noise."""
    trainer, batch = trial.trainer, trial.batch.to(trial.trainer.device)
    teacher = trial.roles["teacher"]
    with asking(teacher), autocast(trainer.device, trainer.precision):
        output = teacher(batch, need=trial.need)
    surprise = float(cross_entropy(output.logits, batch.targets, batch.target_mask))
    surprise /= max(int(batch.target_mask.sum()), 1)
    chance = math.log(output.logits.shape[-1])
    finding = f"teacher: cross-entropy {surprise:.2f} on a batch, chance is {chance:.2f}"
    if surprise < _UNTAUGHT * chance:
        yield CheckRow("weights", "ok", finding)
        return
    fix = "Train it first, or load trained weights (Captioner.load)."
    yield CheckRow("weights", "note", f"{finding}: the teacher looks untrained", fix)
