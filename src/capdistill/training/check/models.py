"""The models before any step: sizes, vocabularies, shapes and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.compatibility import (
    as_read,
    checked_forward,
    checked_teaching,
    device_of,
    loss_value,
    probe_batch,
    recommended,
)
from capdistill.encoders.base import Encoder
from capdistill.errors import IncompatibleModels
from capdistill.losses.across_vocabularies import WordKD
from capdistill.losses.base import DistillationLoss
from capdistill.losses.divergence import cross_entropy
from capdistill.losses.token import ACROSS_VOCABULARIES, first_difference
from capdistill.outputs import Batch, CaptionerOutput, LossTerm, ModelSpec, part
from capdistill.registry import recipe_of
from capdistill.runtime import autocast, inference
from capdistill.teachers.ensemble import leaves
from capdistill.teachers.vocabularies import trimmed_parts
from capdistill.testing import double_batch, double_output, step_logits
from capdistill.training.check.trial import CheckRow, Trial, listed, millions, name_of, numel
from capdistill.training.objective import Objective

if TYPE_CHECKING:
    from capdistill.training.step import Stepper


UNTRAINED_SHARE = 0.9  # share of log V, the cross-entropy of random guesses


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
    """Compare the vocabularies entry by entry: what the teacher reads, and what can be learned."""
    student, *teachers = [model.tokenizer for model in trial.roles.values()]
    mine, *theirs = [each.vocabulary for each in (student, *teachers)]
    place = first_difference(mine, theirs[0]) if teachers else None
    if place is None:
        same = ", the same for both models" if teachers else ""
        yield CheckRow("vocabulary", "ok", f"{len(mine)} entries{same}")
        for trimmed in trimmed_parts(trial.roles.get("teacher")):
            whole = len(trimmed.retokenized.tokenizer.vocabulary)
            finding = f"'{trimmed.name}' has {whole} entries; the student keeps {len(mine)}"
            yield CheckRow("vocabulary", "ok", finding)
        return
    finding = (
        f"student and teacher differ at entry {place} ({len(mine)} and {len(theirs[0])} entries): "
        "the teacher reads the captions with its own tokenizer"
    )
    captions = [caption for caption in trial.batch.captions if caption]
    advice = recommended(student, teachers[0], captions)
    # Whether attention is needed is known once the losses are built.
    losses = cast("dict[str, DistillationLoss]", dict(trial.trainer.objective.losses.items()))
    across = {name: loss for name, loss in losses.items() if loss.across_vocabularies}
    by_position = [loss for name, loss in losses.items() if name not in across]
    if any(loss.from_teacher and loss.needs - {"features", "attention"} for loss in by_position):
        one = "Build both models with one tokenizer."
        raise IncompatibleModels(f"{finding}. {one} {ACROSS_VOCABULARIES} {advice.text}")
    best = advice.loss == "word" and any(isinstance(loss, WordKD) for loss in across.values())
    yield CheckRow("vocabulary", "ok" if best else "note", finding, advice.text)


def check_shapes(trial: Trial) -> Iterator[CheckRow]:
    """The specification of each model; that of a wrapped teacher is probed on the batch."""
    for role, model in trial.captioners.items():
        spec = model.spec(trial.batch.to(trial.trainer.device))
        yield CheckRow("shapes", "ok", f"{role}: {_describe(spec)}")


def check_outputs(trial: Trial) -> Iterator[CheckRow]:
    """Compare each model's output with its specification, for the outputs that the losses need."""
    tiny = probe_batch(trial.trainer.captioner, trial.trainer.models)
    checked_forward(trial.trainer.captioner, tiny, trial.need)
    if "teacher" in trial.roles:
        _taught(trial, tiny if _are_captioners(trial.roles["teacher"]) else trial.batch)
    yield CheckRow("shapes", "ok", "every output has the shape given by its specification")
    for role, model in trial.captioners.items():
        if isinstance(model, Captioner):
            yield from _check_steps(role, model, tiny)


def _are_captioners(teacher: nn.Module) -> bool:
    """Whether it reads a made-up batch; a wrapped teacher may not accept one."""
    return all(isinstance(each, Captioner) for each in leaves(teacher))


def _taught(trial: Trial, batch: Batch) -> CaptionerOutput | None:
    """What the losses read of the teacher, checked against its specification."""
    teacher = trial.roles.get("teacher")
    needs = trial.trainer.objective.teacher_needs
    return None if teacher is None else checked_teaching(teacher, batch, needs)


def _check_steps(role: str, captioner: Captioner, batch: Batch) -> Iterator[CheckRow]:
    """Generation uses `step` and training uses `forward`: both must give the same logits."""
    batch = batch.to(captioner.device)
    ids = batch.inputs % len(
        captioner.tokenizer.vocabulary
    )  # a teacher may have a smaller vocabulary
    with inference(captioner):
        steps, whole = step_logits(captioner.decoder, ids, captioner.encode(batch))
    gap = float((steps - whole).abs().max())
    if gap <= torch.finfo(whole.dtype).eps ** 0.5 * max(1.0, float(whole.abs().max())):
        return
    name = type(captioner.decoder).__name__
    finding = f"{role}: step and forward of {name} disagree: logits differ by up to {gap:.3g}"
    fix = "Fix the decoder; capdistill.testing.check_decoder tests each law."
    yield CheckRow("shapes", "fail", finding, fix)


def _describe(spec: ModelSpec) -> str:
    grid = f", grid {spec.grid[0]} x {spec.grid[1]}" if spec.grid else ""
    prefix = f", {spec.prefix_tokens} before the grid" if spec.prefix_tokens else ""
    hidden = " ".join(map(str, spec.hidden_dims)) or "not shown"
    return (
        f"{spec.tokens} tokens x {spec.feature_dim}{grid}{prefix}; hidden {hidden}; "
        f"{'with' if spec.has_attention else 'without'} attention; "
        f"vocabulary {len(spec.vocabulary)}"
    )


def check_weights(trial: Trial) -> Iterator[CheckRow]:
    """Detect untrained (random) weights."""
    for role, model in trial.captioners.items():
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, Encoder):
            continue
        if not _looks_random(encoder):
            yield CheckRow("weights", "ok", f"{role}: the encoder's weights look trained")
            continue
        stuck = not role.startswith("teacher") and encoder.trunk_frozen
        finding = f"{role}: encoder has random weights"
        finding += " and is frozen, so it never learns to see" if stuck else ""
        fix = "Create it with weights=True (from the hub) or weights='a local file'."
        yield CheckRow("weights", "note", finding, fix)
    one_vocabulary = trial.need - {"features"}  # otherwise the vocabularies may differ
    if one_vocabulary and "teacher" in trial.roles and trial.source is not None:
        yield from _check_teacher_knows(trial)


def _looks_random(encoder: Encoder) -> bool:
    """Whether the trunk's norms have initial values; without norms, use the recorded arguments."""
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
    recipe = recipe_of(encoder)
    return recipe is not None and recipe.kwargs.get("weights") is False


def _check_teacher_knows(trial: Trial) -> Iterator[CheckRow]:
    """Check that each teacher is better than guessing on real captions, at their positions."""
    trainer = trial.trainer
    for role, teacher in trial.captioners.items():
        if not role.startswith("teacher"):
            continue
        batch = as_read(teacher, trial.batch).to(device_of(teacher))
        with inference(teacher), autocast(trainer.device, trainer.precision):
            logits = teacher(batch).logits
        if logits is not None:  # else its most probable words are cached, which were checked
            yield _knowledge(role, logits, batch)
    for trimmed in trimmed_parts(trial.roles["teacher"]):
        mass, much = trimmed.dropped_mass, trimmed.dropped_mass > MUCH_DROPPED
        finding = f"{mass:.1%} of its probability is on entries that the student lacks"
        fix = "Keep the pieces of more captions: HuggingFace(..., keep=captions)." if much else ""
        yield CheckRow(
            "weights", "note" if much else "ok", f"teacher '{trimmed.name}': {finding}", fix
        )


MUCH_DROPPED = 0.1  # probability on dropped entries
CLEARLY = 0.8  # factor of the cross-entropy of logits that fit another position


def _knowledge(role: str, logits: Tensor, batch: Batch) -> CheckRow:
    """How well logits fit the targets, and the targets one position before and after."""
    losses = {shift: _shifted_loss(logits, batch, shift) for shift in (-1, 0, 1)}
    loss, best = losses[0], min(losses, key=losses.__getitem__)
    guesses = UNTRAINED_SHARE * math.log(logits.shape[-1])
    finding = (
        f"{role}: cross-entropy {loss:.2f} on a batch, chance is {math.log(logits.shape[-1]):.2f}"
    )
    if best and losses[best] < min(CLEARLY * loss, guesses):
        order, fits = ("ahead", "t + 1") if best > 0 else ("behind", "t - 1")
        finding += (
            f", but {losses[best]:.2f} for targets shifted by one: its logits are one position "
            f"{order}, those at position t fit target {fits}"
        )
        fix = (
            "Return the logits that follow batch.inputs: those at position t are read at "
            "batch.inputs[:, t] and predict batch.targets[:, t]. Look for a shift of labels in the "
            "model, or a slice of one position too many in adapt."
        )
        return CheckRow("alignment", "fail", finding, fix)
    if loss < guesses:
        shifted = f"{losses[-1]:.2f} and {losses[1]:.2f} one position before and after"
        return CheckRow("weights", "ok", f"{finding}; {shifted}")
    fix = "Train it first, or load trained weights (Captioner.load)."
    return CheckRow("weights", "note", f"{finding}: the teacher looks untrained", fix)


def _shifted_loss(logits: Tensor, batch: Batch, shift: int) -> float:
    """The mean cross-entropy of logits at t for the targets at t + shift; inf without any."""
    length = logits.shape[1]
    begin, end = max(shift, 0), length + min(shift, 0)
    targets, mask = batch.targets[:, begin:end], batch.target_mask[:, begin:end]
    count = int(mask.sum())
    if not count:
        return math.inf
    rows = logits[:, begin - shift : end - shift]
    return float(cross_entropy(rows, targets, mask)) / count


MIN_GRADIENT_SHARE = 1e-3  # a term with a smaller share of the gradient has no effect


def check_projectors(trial: Trial) -> Iterator[CheckRow]:
    """Let the losses create their projectors if they have not yet."""
    trial.trainer.prepare(trial.batch.to(trial.trainer.device))
    losses = trial.trainer.objective.losses
    made = [
        f"{name} {part.in_features} x {part.out_features}"
        for name, part in losses.named_modules()
        if isinstance(part, nn.Linear)
    ]
    if len(losses):
        finding = f"{', '.join(losses)}; projectors: {', '.join(made) or 'none'}"
        yield CheckRow(
            "losses", "ok", f"{finding}; {millions(numel(losses.parameters()))} parameters in them"
        )


def check_sums(trial: Trial) -> Iterator[CheckRow]:
    """A loss must be a sum over tokens or images: a doubled batch must give a doubled loss."""
    trainer = trial.trainer
    losses = cast("dict[str, DistillationLoss]", dict(trainer.objective.losses.items()))
    if not losses:
        return
    few = part(trial.batch, 0, min(2, trial.batch.num_images))
    student, taught = checked_forward(trainer.captioner, few, trial.need), _taught(trial, few)
    for name, loss in losses.items():
        # A loss without a teacher does not read the student's output in its place.
        teacher = student if taught is None else replace(taught.of(loss.teacher), members=None)
        once = float(loss_value(loss, student, teacher, few))
        doubled = double_output(student), double_output(teacher)
        twice = float(loss_value(loss, *doubled, double_batch(few)))
        yield from _check_sum(name, loss, once, twice, trainer.config)


def _check_sum(name: str, loss: Any, once: float, twice: float, config: Any) -> Iterator[CheckRow]:
    steps = config.accumulation_steps
    if loss.couples_batch and steps > 1:
        finding = (
            f"{name}: the loss looks across images, but sees {config.batch_size} at a time "
            f"with accumulation_steps={steps}"
        )
        yield CheckRow("losses", "note", finding, "Raise batch_size instead of accumulating.")
    if loss.couples_batch or math.isclose(twice, 2 * once, rel_tol=1e-3, abs_tol=1e-6):
        return
    finding = f"{name}: the loss is {once:.4g} for a batch and {twice:.4g} for the same batch twice"
    if math.isclose(twice, once, rel_tol=1e-3):
        fix = "Return the sum over tokens or images: the trainer divides by count(batch) once."
        yield CheckRow("losses", "fail", f"{finding}, so it is a mean", fix)
        return
    fix = "If it looks across the images of a batch, set couples_batch = True in its class."
    yield CheckRow("losses", "note", finding, fix)


def check_trained(trial: Trial) -> Iterator[CheckRow]:
    """Report the parameter groups of the optimizer."""
    parts: dict[str, int] = {}
    for group in _optimizer(trial.trainer).param_groups:
        key = f"{group.get('name', 'model')} at {group['initial_lr']:g}"
        parts[key] = parts.get(key, 0) + numel(group["params"])
    yield CheckRow("trained", "ok", "; ".join(f"{millions(n)} {key}" for key, n in parts.items()))


def _optimizer(trainer: Stepper) -> torch.optim.Optimizer:
    """The trainer's optimizer, without the warning about an unknown number of steps."""
    if trainer.steps_per_epoch is None:
        trainer.steps_per_epoch = 1
    return trainer.optimizer or trainer.make_ready()


def check_terms(trial: Trial) -> Iterator[CheckRow]:
    """One forward pass, then one backward pass per term, to compare the terms' gradients."""
    trainer = trial.trainer
    trainer.objective.train()
    terms = trainer.terms(trial.batch)
    bad = [name for name, term in terms.items() if not bool(torch.isfinite(term.sum))]
    if bad:
        yield from (_not_finite(name, f"is {float(terms[name].mean.detach())}") for name in bad)
        return
    peaks = {name: _peak_weight(trainer, name) for name in terms}
    norms, reached = {}, set[int]()
    for name, term in terms.items():
        raw, touched = _backward(trainer, term)
        norms[name], reached = raw * peaks[name], reached | touched
    for name, term in terms.items():
        yield _term_row(name, term, peaks[name], norms, trainer.precision)
    yield from _check_leading(peaks, norms)
    yield from _check_reached(trainer.objective, reached)


def _not_finite(name: str, what: str) -> CheckRow:
    fix = (
        f"Look for log(0), 0/0 or a root of 0 in the loss '{name}' and for NaN in the weights; "
        "try precision='fp32'."
    )
    return CheckRow("terms", "fail", f"{name}: the term {what} on the first batch", fix)


def _peak_weight(trainer: Stepper, name: str) -> float:
    """The largest weight of a term over the run: a scheduled weight may start at 0."""
    return max(trainer.objective.weight(name, progress) for progress in (0.0, 0.5, 1.0))


def _backward(trainer: Stepper, term: LossTerm) -> tuple[float, set[int]]:
    """The norm of a term's unweighted gradient on the captioner, and all parameters it reaches."""
    trainer.objective.zero_grad(set_to_none=True)
    if not term.sum.requires_grad:
        return 0.0, set()
    loss: Tensor = trainer.scaler.scale(term.mean)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    grads = [p.grad for p in trainer.captioner.parameters() if p.grad is not None]
    norm = torch.stack([g.float().norm() for g in grads]).norm() if grads else torch.zeros(())
    reached = {id(p) for p in trainer.objective.parameters() if p.grad is not None}
    return float(norm) / trainer.scaler.get_scale(), reached


def _term_row(
    name: str, term: LossTerm, peak: float, norms: dict[str, float], precision: str
) -> CheckRow:
    if not math.isfinite(norms[name]) and precision != "fp16":  # fp16 may overflow and recover
        return _not_finite(name, "is finite but its gradient is not")
    share = norms[name] / (sum(norms.values()) or 1.0)
    finding = (
        f"{name}: {float(term.mean.detach()):.4g} x weight {peak:g}; {share:.1%} of the gradient"
    )
    if share >= MIN_GRADIENT_SHARE or math.isnan(share):
        return CheckRow("terms", "ok", finding)
    reason = "it gives the model no gradient" if norms[name] == 0 else "too small to matter"
    fix = f"Raise weights['{name}'], or remove the term: it costs time and has no effect."
    return CheckRow("terms", "note", f"{finding}: {reason}", fix)


def _check_leading(weights: dict[str, float], norms: dict[str, float]) -> Iterator[CheckRow]:
    """The largest weight should give the largest gradient; losses differ in their natural scale."""
    first, leading = max(weights, key=weights.__getitem__), max(norms, key=norms.__getitem__)
    whole = sum(norms.values())
    clear = sum(weight == weights[first] for weight in weights.values()) == 1
    if not clear or first == leading or not 0 < whole < math.inf or norms[first] == 0:
        return
    suggested = weights[leading] * norms[first] / norms[leading]
    finding = (
        f"'{first}' has the largest weight ({weights[first]:g}), but '{leading}' gives most of the "
        f"gradient ({norms[leading] / whole:.0%}, '{first}' {norms[first] / whole:.0%})"
    )
    fix = (
        f"Shares change during training. To let '{first}' lead from the start, set "
        f"weights['{leading}'] to at most {suggested:.2g}."
    )
    yield CheckRow("terms", "note", finding, fix)


def _check_reached(objective: Objective, reached: set[int]) -> Iterator[CheckRow]:
    """Every parameter that requires a gradient must get one (law 4)."""
    trained = objective.reachable()
    left = [name for name, parameter in trained.items() if id(parameter) not in reached]
    if not left:
        finding = f"all {len(trained)} trainable tensors get a gradient"
        yield CheckRow("gradients", "ok", finding)
        return
    finding = f"{len(left)} of {len(trained)} trainable tensors get no gradient: {listed(left)}"
    fix = "Use them in forward, remove them, or freeze them with requires_grad_(False)."
    yield CheckRow("gradients", "fail", finding, fix)
