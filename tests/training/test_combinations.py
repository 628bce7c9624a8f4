"""The methods of training combine, each with each; what cannot combine is refused.

Every pair trains for two epochs. A run that continues from a state within the second must end with
the same weights.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.data import CaptionData, Curriculum
from capdistill.errors import ConfigError
from capdistill.teachers import Ensemble, MeanTeacher, cache
from capdistill.teachers import caption as caption_with
from capdistill.training import GradNorm, LossRatio, Uncertainty
from tests.teachers.test_vocabularies import SUBWORDS, captioner
from tests.training import tiny_models as tiny

OPTIONS: dict[str, Any] = {**tiny.QUIET, "epochs": 2, "batch_size": 2, "learning_rate": 0.01}
WEIGHTS = {"ce": 0.5, "token": 0.5, "feature": 0.3}


@dataclass
class Plan:
    """What a method changes of a run."""

    student: cd.Captioner
    train: Any
    folder: Path
    teacher: Any = field(default_factory=lambda: tiny.make_teacher())
    losses: dict[str, Any] = field(
        default_factory=lambda: {"token": {"name": "token"}, "feature": {"name": "feature"}}
    )
    weights: Any = field(default_factory=lambda: dict(WEIGHTS))
    options: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[..., cd.Trainer] = cd.Distiller

    def make(self) -> cd.Trainer:
        options = {**OPTIONS, **self.options}
        if self.trainer is cd.SelfCritical:
            terms = {"teacher": self.teacher, "losses": self.losses, "weights": self.weights}
            return cd.SelfCritical(self.student, **terms, samples=2, **options)
        return self.trainer(self.teacher, self.student, self.losses, self.weights, **options)


def several_teachers(plan: Plan) -> None:
    plan.teacher = {"one": tiny.make_teacher(2), "other": tiny.make_teacher(5)}
    plan.losses["feature"] = {**plan.losses["feature"], "teacher": "other"}


def drawn_teacher(plan: Plan) -> None:
    plan.teacher = Ensemble([tiny.make_teacher(2), tiny.make_teacher(5)], mixing="draw")
    plan.losses.pop("feature")
    plan.weights.pop("feature")


def mean_teacher(plan: Plan) -> None:
    plan.teacher = MeanTeacher(plan.student, decay=0.9)


def another_vocabulary(plan: Plan) -> None:
    plan.teacher = captioner(SUBWORDS)
    plan.losses["token"] = {**plan.losses["token"], "name": "word"}
    plan.losses["feature"] = {"name": "feature", "match": "pooled"}


def options(**values: Any) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        plan.options |= values

    return change


def adaptive(kind: Callable[..., Any]) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        plan.weights = kind(plan.weights)

    return change


def temperature(plan: Plan) -> None:
    plan.losses["token"] = {**plan.losses["token"], "temperature": [4.0, 1.0]}


def curriculum(plan: Plan) -> None:
    plan.train = Curriculum(plan.train, "length", start=0.5, until=0.5)


def sequences(plan: Plan) -> None:
    data = plan.train.data if isinstance(plan.train, Curriculum) else plan.train
    plan.train = caption_with(
        tiny.make_teacher(7).eval(),
        data,
        plan.folder / "captions.jsonl",
        num_return=2,
        mix=1,
        reweight=1.0,
        beam_size=3,
        max_length=6,
        progress=False,
        device="cpu",
        precision="fp32",
    )


def self_critical(plan: Plan) -> None:
    plan.trainer = cd.SelfCritical


def cached_targets(plan: Plan) -> None:
    data = plan.train.data if isinstance(plan.train, Curriculum) else plan.train
    views = plan.options.get("cache_views", 1)
    keep, place = ("features", "attention"), plan.folder / "targets"
    plan.teacher = cache(plan.teacher, data, place, cache_views=views, keep=keep, **tiny.QUIET)
    plan.options["augment"] = False


# In this order they are applied: the wrapping of data and weights comes last.
METHODS: dict[str, Callable[[Plan], None]] = {
    "on_policy": options(on_policy=0.5),
    "ema": options(ema_decay=0.9),
    "word_dropout": options(word_dropout=0.3),
    "scheduled_sampling": options(scheduled_sampling=0.5),
    "accumulation": options(accumulation_steps=2),
    "views": options(cache_features=True, cache_views=2),
    "temperature": temperature,
    "another_vocabulary": another_vocabulary,
    "several_teachers": several_teachers,
    "drawn_teacher": drawn_teacher,
    "mean_teacher": mean_teacher,
    "sequences": sequences,
    "curriculum": curriculum,
    "self_critical": self_critical,
    "uncertainty": adaptive(Uncertainty),
    "grad_norm": adaptive(GradNorm),
    "loss_ratio": adaptive(LossRatio),
    "cached_targets": cached_targets,
}
TEACHERS = {"another_vocabulary", "several_teachers", "drawn_teacher", "mean_teacher"}
ADAPTIVE = {"uncertainty", "grad_norm", "loss_ratio"}
REFUSED = {
    ("on_policy", "self_critical"): "on_policy",
    ("word_dropout", "self_critical"): "word_dropout",
    ("scheduled_sampling", "self_critical"): "scheduled_sampling",
    ("self_critical", "uncertainty"): "reward",
    ("self_critical", "grad_norm"): "reward",
    ("self_critical", "loss_ratio"): "reward",
    ("on_policy", "cached_targets"): "sampled from the student are new in every step",
    ("self_critical", "cached_targets"): "sampled from the student are new in every step",
    ("mean_teacher", "cached_targets"): "changes with every step",
}
PAIRS = [
    pair
    for pair in combinations(METHODS, 2)
    if not (set(pair) <= TEACHERS or set(pair) <= ADAPTIVE)  # one value takes one of them
]


@pytest.fixture
def make_plan(
    saveable: Callable[..., cd.Captioner],
    colours: CaptionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Plan]:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power fails during these tests

    def make(*methods: str) -> Plan:
        frozen = "views" in methods
        plan = Plan(saveable(dropout=0.2, trainable=not frozen), colours, tmp_path)
        plan.options["cache_dir"] = str(tmp_path / "cache")
        for name in METHODS:
            if name in methods:
                METHODS[name](plan)
        return plan

    return make


class CopyBeforeLastStep:
    """Copies the directory of a run as it would be if the run were killed before its last step."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy

    def on_step(self, trainer: Any, row: Any) -> None:
        if row["step"] == trainer.config.epochs * trainer.steps_per_epoch - 1:
            trainer.checkpoints.save(trainer)
            shutil.copytree(trainer.checkpoints.out, self.copy)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in REFUSED], ids="+".join)
def test_two_methods_train_together_and_resume_exactly(
    pair: tuple[str, str], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, killed = make_plan(*pair), tmp_path / "killed"
    whole = plan.make()
    history = whole.fit(plan.train, out=tmp_path / "run", callbacks=[CopyBeforeLastStep(killed)])
    assert all(math.isfinite(row["train"]["loss"]) for row in history.epochs)

    again = make_plan(*pair)
    resumed = again.make()
    continued = resumed.fit(again.train, out=killed, resume=True)
    assert [row["train"] for row in continued.epochs] == [row["train"] for row in history.epochs]
    expected = whole.captioner.state_dict()
    for name, value in resumed.captioner.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_what_cannot_combine_is_refused_with_the_reason(
    pair: tuple[str, str], make_plan: Callable[..., Plan]
) -> None:
    with pytest.raises(ConfigError, match=REFUSED[pair]):
        make_plan(*pair).make()


def test_all_methods_that_combine_train_together(make_plan: Callable[..., Plan]) -> None:
    methods = set(METHODS) - {"drawn_teacher", "mean_teacher", "self_critical", "cached_targets"}
    methods -= {"another_vocabulary"}
    plan = make_plan(*(methods - {"grad_norm", "loss_ratio"}))
    history = plan.make().fit(plan.train)
    assert len(history.epochs) == 2
    assert set(history.epochs[-1]["train"]["terms"]) == {"ce", "token", "feature"}
