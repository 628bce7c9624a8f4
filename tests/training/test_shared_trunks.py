"""A frozen trunk that teacher and student share runs once for both, and changes no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.data.source import FixedBatches
from capdistill.teachers import Ensemble
from capdistill.training.on_policy import sharing_trunks
from tests.training import tiny_models as tiny

LOSSES = {"token": "token", "feature": {"name": "feature", "match": "pooled"}, "hidden": "hidden"}


def pair(trainable: bool = False, same_module: bool = False) -> tuple[cd.Captioner, cd.Captioner]:
    """Models whose trunks have equal weights."""
    student = tiny.make_student(dropout=0.2, trainable=trainable, norm=True)
    teacher = tiny.make_teacher(trainable=trainable, norm=True)
    teacher.encoder.conv.load_state_dict(student.encoder.conv.state_dict())
    if same_module:
        teacher.encoder.conv, teacher.encoder.norm = student.encoder.conv, student.encoder.norm
    return teacher, student


def seen(*models: Any) -> int:
    return sum(model.encoder.seen for model in models)


def run(teacher: Any, student: Any, **options: Any) -> cd.Distiller:
    options = {"losses": LOSSES, "schedule": "constant", **tiny.QUIET, **options}
    return cd.Distiller(teacher, student, **options)


@pytest.mark.parametrize("same_module", [False, True])
def test_the_trunk_runs_once_and_the_step_is_the_same(same_module: bool) -> None:
    batch = tiny.make_batch([3, 4, 2, 5], k=2)
    weights, steps = [], []
    for share in (True, False):
        teacher, student = pair(same_module=same_module)
        distiller = run(teacher, student)
        distiller.make_ready(batch)
        assert len(distiller._sharing) == 1
        if not share:
            distiller._sharing = []
        before = seen(teacher, student)
        torch.manual_seed(0)
        steps.append(distiller.step(batch)["terms"])
        assert seen(teacher, student) - before == (2 if share else 4)
        weights.append(tiny.weights_of(distiller.objective))
    assert steps[0] == steps[1]
    assert tiny.same_bits(*weights)


def test_trunks_that_are_trained_or_differ_are_not_shared() -> None:
    assert not sharing_trunks(pair(trainable=True))
    teacher, student = pair()
    with torch.no_grad():
        student.encoder.conv.weight.mul_(1.01)
    assert not sharing_trunks([teacher, student])


def test_members_of_an_ensemble_share_a_trunk_and_changed_weights_are_noticed() -> None:
    first, _ = pair()
    second = copy.deepcopy(first)
    other = tiny.make_student(7, trainable=False, norm=True)  # has another trunk
    batch = tiny.make_batch([3, 4, 2])
    distiller = run(Ensemble([first, second]), other, losses={"token": "token"})
    distiller.make_ready(batch)
    before = seen(first, second)
    distiller.step(batch)
    assert seen(first, second) - before == 3
    with torch.no_grad():
        second.encoder.conv.weight.mul_(2)
    before = seen(first, second)
    row = distiller.step(batch)
    assert seen(first, second) - before == 6
    assert row["terms"]["token"]["raw"] > 0


def test_validation_runs_the_trunk_once_for_captions_and_both_models() -> None:
    teacher, student = pair()
    distiller = run(teacher, student)
    batch = tiny.make_batch([3, 4, 2, 5], k=2)
    distiller.make_ready(batch)
    before = seen(teacher, student)
    distiller.validate(FixedBatches([batch]))
    assert seen(teacher, student) - before == 2
