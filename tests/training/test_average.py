"""Averaged weights of a run: validated, kept and saved, while training continues on the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from capdistill import Captioner, Distiller, Trainer
from capdistill.averaging import WeightAverage
from capdistill.data import CaptionData
from capdistill.data.source import FixedBatches
from capdistill.errors import ConfigError
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
BATCHES = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]
OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "learning_rate": 0.01, "epochs": 3}
LOOP: dict[str, Any] = {**tiny.QUIET, "schedule": "constant", "learning_rate": 0.01}


def distiller(student: Captioner, **options: Any) -> Distiller:
    return Distiller(tiny.make_teacher(), student, **{**OPTIONS, "ema_decay": 0.9, **options})


def averaged_weights(trainer: Trainer) -> dict[str, Any]:
    with trainer.averaged():
        return tiny.weights_of(trainer.captioner)


# -- what is averaged -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Trainer, lambda s, **o: Distiller(tiny.make_teacher(), s, **o)])
def test_the_average_of_a_run_follows_its_formula(make: Callable[..., Trainer]) -> None:
    trainer = make(tiny.make_student().double(), **LOOP, ema_decay=0.3)
    trainer.make_ready(BATCHES[0])
    expected = tiny.weights_of(trainer.objective)
    for n in range(5):
        trainer.step(BATCHES[n % 2])
        decay = min(0.3, (1 + n) / (10 + n))
        for name, value in trainer.objective.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    with trainer.averaged():
        assert_close(tiny.weights_of(trainer.objective), expected, rtol=1e-6, atol=1e-8)
    assert not tiny.same_bits(tiny.weights_of(trainer.objective), expected)


def test_training_itself_does_not_notice_the_average(colours: CaptionData) -> None:
    class Weights:
        def __init__(self) -> None:
            self.seen: list[dict[str, Any]] = []

        def on_epoch(self, trainer: Any, row: Any) -> None:
            self.seen.append(tiny.weights_of(trainer.objective))

    plain, averaged = Weights(), Weights()
    rows = []
    for decay, weights in ((None, plain), (0.9, averaged)):
        trainer = distiller(tiny.make_student(dropout=0.3), ema_decay=decay)
        history = trainer.fit(colours, colours, callbacks=[weights])
        rows.append([row["train"] for row in history.epochs])
    assert rows[0] == rows[1]
    pairs = zip(plain.seen, averaged.seen, strict=True)
    assert all(tiny.same_bits(one, other) for one, other in pairs)


def test_accumulated_batches_are_one_update() -> None:
    trainer = Trainer(tiny.make_student(), **LOOP, ema_decay=0.9)
    trainer.step(*BATCHES)
    assert trainer.average is not None
    assert trainer.average.updates == 1


def test_a_step_that_loss_scaling_skips_is_no_update() -> None:
    trainer = Trainer(tiny.make_student(), **LOOP, ema_decay=0.9)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    trainer.objective.weights["ce"] = 1e6
    assert not math.isfinite(trainer.step(BATCHES[0])["gradient_norm"])
    assert trainer.average is not None
    assert trainer.average.updates == 0
    trainer.scaler.update(1.0)
    trainer.step(BATCHES[0])
    assert trainer.average.updates == 1


def test_a_frozen_trunk_is_not_stored() -> None:
    trainer = Trainer(tiny.make_student(norm=True, trainable=False), **LOOP, ema_decay=0.9)
    trainer.make_ready()
    assert trainer.average is not None
    assert not [name for name in trainer.average.names if "conv" in name or "norm" in name]
    trained = [n for n, p in trainer.objective.named_parameters() if p.requires_grad]
    assert trainer.average.names == trained


def test_trained_batch_norms_are_averaged_and_shared_ones_left_alone() -> None:
    student = tiny.make_student(norm=True, dim=8)
    trainer = Trainer(student, **LOOP, ema_decay=0.9)
    start = student.encoder.norm.running_mean.clone()
    trainer.step(BATCHES[0])
    moved = student.encoder.norm.running_mean.clone()
    assert not torch.equal(start, moved)
    with trainer.averaged():
        assert_close(student.encoder.norm.running_mean, 0.1 * start + 0.9 * moved)

    teacher = tiny.make_teacher(norm=True)
    teacher.encoder.requires_grad_(False)
    shared = Captioner(teacher.encoder, tiny.make_student(dim=8).decoder, tiny.TOKENIZER)
    shared_run = Distiller(teacher, shared, losses={"token": "token"}, **LOOP, ema_decay=0.9)
    shared_run.make_ready(BATCHES[0])
    assert shared_run.average is not None
    assert not [name for name in shared_run.average.names if "encoder" in name]


def test_tied_weights_are_averaged_once() -> None:
    student = tiny.make_student()
    student.again = student.encoder.project  # type: ignore[assignment]
    trainer = Trainer(student, **LOOP, ema_decay=0.9)
    trainer.step(BATCHES[0])
    assert trainer.average is not None
    assert [n for n in trainer.average.names if "again" in n] == []
    with trainer.averaged():
        assert student.again.weight is student.encoder.project.weight


# -- what is validated, kept and saved ---------------------------------------------------------


def test_validation_scores_the_average_and_best_and_final_hold_it(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    class Look:
        def on_epoch(self, trainer: Any, row: Any) -> None:
            seen.append((tiny.weights_of(trainer.captioner), averaged_weights(trainer)))
            assert trainer.validate(trainer.val_source) == (row["val"], row["scores"])

    trainer = distiller(saveable(), monitor="loss")
    history = trainer.fit(colours, colours, out=tmp_path, callbacks=[Look()])
    own, average = seen[-1]
    assert not tiny.same_bits(own, average)
    final = Captioner.load(tmp_path / "final")
    assert tiny.same_bits(final.state_dict(), average)
    assert history.best is not None
    best = seen[history.best["epoch"]][1]
    assert tiny.same_bits(Captioner.load(tmp_path / "best").state_dict(), best)
    assert tiny.same_bits(trainer.captioner.state_dict(), best)
    val, scores = trainer.validate(trainer.val_source)  # of the weights that were kept
    assert val["terms"]["ce"]["raw"] == history.best["val"]["terms"]["ce"]["raw"]
    assert scores == history.best["scores"]


@pytest.mark.parametrize("directory", [True, False])
def test_without_validation_the_last_average_is_kept(
    saveable: Make, colours: CaptionData, tmp_path: Path, directory: bool
) -> None:
    seen = []
    callback = type("Look", (), {"on_epoch": lambda _, t, row: seen.append(averaged_weights(t))})()
    trainer = distiller(saveable(), epochs=2)
    trainer.fit(colours, out=tmp_path if directory else None, callbacks=[callback])
    assert tiny.same_bits(trainer.captioner.state_dict(), seen[-1])
    for name in ("best", "final") if directory else ():
        assert tiny.same_bits(Captioner.load(tmp_path / name).state_dict(), seen[-1])


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_stop_and_resume_equals_one_run(
    saveable: Make, colours: CaptionData, tmp_path: Path, epochs_before: int
) -> None:
    class Stop:
        def on_epoch(self, trainer: Any, row: Any) -> None:
            trainer.stopping = row["epoch"] + 1 == epochs_before

    def run(name: str, **options: Any) -> Distiller:
        trainer = distiller(saveable(dropout=0.3))
        trainer.fit(colours, colours, out=tmp_path / name, **options)
        return trainer

    whole = run("whole")
    run("parts", callbacks=[Stop()])
    rest = run("parts", resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    finals = [Captioner.load(tmp_path / name / "final") for name in ("whole", "parts")]
    assert tiny.same_bits(finals[0].state_dict(), finals[1].state_dict())
    assert [r["val"] for r in rest.history.epochs] == [r["val"] for r in whole.history.epochs]


def test_a_state_between_steps_continues_bit_for_bit() -> None:
    def make() -> Trainer:
        return Trainer(tiny.make_student(), **LOOP, ema_decay=0.9)

    first = make()
    for batch in BATCHES:
        first.step(batch)
    state = copy.deepcopy(first.state_dict())
    second = make()
    second.load_state_dict(state)
    for trainer in (first, second):
        trainer.step(BATCHES[0])
    assert tiny.same_bits(averaged_weights(first), averaged_weights(second))
    assert not tiny.same_bits(averaged_weights(first), tiny.weights_of(first.captioner))


@pytest.mark.filterwarnings("ignore:The resumed run continues with other options:UserWarning")
def test_an_average_may_begin_or_end_where_a_run_is_resumed() -> None:
    plain = Trainer(tiny.make_student(), **LOOP)
    plain.step(BATCHES[0])
    later = Trainer(tiny.make_student(seed=5), **LOOP, ema_decay=0.9)
    later.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert tiny.same_bits(averaged_weights(later), tiny.weights_of(plain.captioner))
    later.step(BATCHES[1])
    again = Trainer(tiny.make_student(seed=6), **LOOP)
    again.load_state_dict(copy.deepcopy(later.state_dict()))
    assert tiny.same_bits(tiny.weights_of(again.captioner), tiny.weights_of(later.captioner))


def test_a_step_while_the_average_is_applied_is_refused() -> None:
    trainer = Trainer(tiny.make_student(), **LOOP, ema_decay=0.9)
    trainer.step(BATCHES[0])
    with trainer.averaged(), pytest.raises(ConfigError, match="Leave the block"):
        trainer.step(BATCHES[0])


def test_without_an_average_the_block_does_nothing_and_validation_scores_the_weights() -> None:
    trainer = Trainer(tiny.make_student(), **LOOP)
    trainer.step(BATCHES[0])
    own = tiny.weights_of(trainer.captioner)
    with trainer.averaged():
        assert tiny.same_bits(tiny.weights_of(trainer.captioner), own)
    val, _ = trainer.validate(FixedBatches(BATCHES))
    assert val["loss"] > 0


def test_check_leaves_a_trainer_with_an_average_as_it_was() -> None:
    trainer = Trainer(tiny.make_student(), **LOOP, ema_decay=0.9)
    trainer.step(BATCHES[0])
    own, average = tiny.weights_of(trainer.captioner), averaged_weights(trainer)
    assert trainer.check().ok
    assert tiny.same_bits(tiny.weights_of(trainer.captioner), own)
    assert tiny.same_bits(averaged_weights(trainer), average)


def test_the_average_of_noisy_steps_is_nearer_to_the_optimum_than_its_last_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, 0.99)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    last = []
    for step in range(600):
        optimizer.zero_grad()
        (layer.weight - torch.randn(())).square().sum().div(2).backward()  # the optimum is 0
        optimizer.step()
        average.update()
        if step >= 300:
            last.append((abs(layer.weight.item()), abs(average.average[0].item())))
    own, mean = (sum(values) / len(values) for values in zip(*last, strict=True))
    assert mean < own / 3
