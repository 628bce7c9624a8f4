"""The losses, and what one backward pass of each moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capdistill.outputs import LossTerm
from capdistill.training.check.report import CheckRow
from capdistill.training.check.trial import Trial, listed, millions, numel

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_FAINT = 1e-3  # a term with a smaller share of the gradient teaches nothing


def check_projectors(trial: Trial) -> Iterator[CheckRow]:
    """Let the losses create their projectors where they have not yet."""
    trial.trainer._prepare(trial.batch.to(trial.trainer.device))
    losses = trial.trainer.objective.losses
    made = [
        f"{name} {part.in_features} x {part.out_features}"
        for name, part in losses.named_modules()
        if isinstance(part, nn.Linear)
    ]
    if len(losses):
        finding = f"{', '.join(losses)}; projectors: {', '.join(made) or 'none'}"
        yield CheckRow("losses", "ok", f"{finding}; {millions(numel(losses.parameters()))} in them")


def check_trained(trial: Trial) -> Iterator[CheckRow]:
    """The optimizer's groups."""
    parts: dict[str, int] = {}
    for group in trial.trainer._optimizer().param_groups:
        key = f"{group.get('name', 'model')} at {group['lr']:.0e}"
        parts[key] = parts.get(key, 0) + numel(group["params"])
    yield CheckRow("trained", "ok", "; ".join(f"{millions(n)} {key}" for key, n in parts.items()))


def check_terms(trial: Trial) -> Iterator[CheckRow]:
    """One forward; then one backward for each term, to see what it moves and how strongly."""
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
    yield from _check_reached(trainer.objective, reached)


def _not_finite(name: str, what: str) -> CheckRow:
    fix = (
        f"Look for log(0), 0/0 or a root of 0 in the loss '{name}' and for NaN in the weights; "
        "try precision='fp32'."
    )
    return CheckRow("terms", "fail", f"{name}: the term {what} on the first batch", fix)


def _peak_weight(trainer: Trainer, name: str) -> float:
    """The largest weight a term gets, so that one that starts at 0 is not called useless."""
    return max(trainer.objective.weight(name, progress) for progress in (0.0, 0.5, 1.0))


def _backward(trainer: Trainer, term: LossTerm) -> tuple[float, set[int]]:
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
    if share >= _FAINT or math.isnan(share):
        return CheckRow("terms", "ok", finding)
    reason = "it gives the model no gradient" if norms[name] == 0 else "too little to matter"
    fix = f"Raise weights['{name}'], or leave the term out: it costs time and teaches nothing."
    return CheckRow("terms", "note", f"{finding}: {reason}", fix)


def _check_reached(objective: nn.Module, reached: set[int]) -> Iterator[CheckRow]:
    """Every parameter that requires grad must get one (law 4)."""
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    left = [name for name, parameter in trained.items() if id(parameter) not in reached]
    if not left:
        finding = f"all {len(trained)} trainable tensors get a gradient"
        yield CheckRow("gradients", "ok", finding)
        return
    finding = f"{len(left)} of {len(trained)} trainable tensors get none: {listed(left)}"
    fix = "Use them in forward, remove them, or freeze them with requires_grad_(False)."
    yield CheckRow("gradients", "fail", finding, fix)
