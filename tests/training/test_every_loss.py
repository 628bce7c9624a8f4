"""Every loss that has a name trains a student, alone and together with all the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill import Captioner, Distiller
from tests.training import tiny_models as tiny

NAMES = cd.losses.registry._builtins  # not those of installed plugins
TRAIN = [tiny.make_batch([3, 1, 2, 3, 2, 1, 3, 3]), tiny.make_batch([2, 2, 1, 3], first=8)]
each_name = pytest.mark.parametrize("name", sorted(NAMES))


def distiller(losses: dict[str, Any], student: Any = None, **options: Any) -> Distiller:
    weights = {"ce": 0.01, **dict.fromkeys(losses, 1.0)}
    models = tiny.make_teacher(dropout=0.5), student or tiny.make_student()
    return Distiller(*models, losses, weights, **{**tiny.QUIET, "learning_rate": 0.01, **options})


@each_name
def test_two_steps_train_student_and_projectors(name: str) -> None:
    trainer = distiller({name: name})
    trainer.make_ready(TRAIN[0])
    before = {n: p.detach().clone() for n, p in trainer.objective.named_parameters()}
    reached = dict.fromkeys(before, False)
    trainer.steps_per_epoch = 1
    for batch in TRAIN:
        trainer.terms(batch)[name].weighted.backward()
        for n, p in trainer.objective.named_parameters():
            reached[n] |= p.grad is not None and bool(p.grad.any())
        row = trainer.step(batch)
        assert math.isfinite(row["terms"][name]["raw"])
    moved = {n for n, p in trainer.objective.named_parameters() if not torch.equal(before[n], p)}
    assert {n for n, r in reached.items() if r} <= moved
    assert any(n.startswith("student.") and r for n, r in reached.items())
    assert all(r for n, r in reached.items() if n.startswith("losses."))


@each_name
def test_steps_on_a_batch_make_its_term_smaller(name: str) -> None:
    trainer = distiller({name: name}, schedule="constant")
    values = [trainer.step(TRAIN[0])["terms"][name]["raw"] for _ in range(25)]
    assert values[-1] < 0.95 * values[0]


def test_all_losses_train_together_and_resume_exactly(
    tmp_path: Path, saveable: Callable[..., Captioner]
) -> None:
    losses = {name: {"name": name} for name in NAMES}
    losses["token"] = {"name": "token", "temperature": [8.0, 2.0]}
    options = {"accumulation_steps": 2, "epochs": 2, "log_every": 1}
    whole = distiller(losses, saveable(), **options)
    terms = whole.fit(TRAIN).epochs[-1]["train"]["terms"]
    assert set(terms) == {"ce", *NAMES}
    assert all(math.isfinite(term["raw"]) for term in terms.values())

    class Stop:
        def on_step(self, trainer: Any, row: Any) -> None:
            trainer.history.interrupted = row["step"] == 1

    first = distiller(losses, saveable(), **options)
    with pytest.warns(UserWarning, match="Interrupted after step 1"):
        first.fit(TRAIN, out=tmp_path, callbacks=[Stop()])
    second = distiller(losses, saveable(), **options)
    second.fit(TRAIN, out=tmp_path, resume=True)
    pairs = zip(whole.objective.parameters(), second.objective.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_check_of_all_losses_finds_no_problem() -> None:
    report = distiller({name: name for name in NAMES}).check(TRAIN)
    problems = [row for row in report.rows if row.status not in ("ok", "note")]
    assert problems == []
