"""What a step does with numbers it should not follow: NaN, overflow, spikes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError, LossSpike, NotFiniteLoss
from capdistill.losses.base import DistillationLoss
from capdistill.training import replay_step
from capdistill.training.checkpoint import load_state
from capdistill.training.optim import ENOUGH, MAX_SKIPPED_STEPS, StepGuard
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 1, "log_every": 1}


class Drawing(DistillationLoss):
    """Draws from three generators; `harm(image ids, draw)` is a factor of the loss."""

    per = "image"
    harm: Callable[[tuple[str, ...], float], float] = staticmethod(lambda ids, draw: 1.0)

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        draw = random.random() + float(np.random.random()) + float(torch.rand(()))
        factor = 1.0 if not self.training else type(self).harm(batch.image_ids, draw)
        return (1 + draw / 100) * factor * student.logits.square().mean() * batch.num_images


def distiller(student: Captioner, **options: Any) -> Distiller:
    loss = {"mine": Drawing()}
    return Distiller(tiny.make_teacher(), student, losses=loss, weights={"mine": 1.0}, **options)


@pytest.fixture
def harm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what multiplies the loss."""

    def use(function: Callable[[tuple[str, ...], float], float]) -> None:
        monkeypatch.setattr(Drawing, "harm", staticmethod(function))

    return use


# -- the rule --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=140), st.floats(0, 20))
def test_a_spike_is_what_the_modified_z_score_says(losses: list[float], last: float) -> None:
    guard = StepGuard()
    for loss in losses:
        guard.losses.append(loss)
    recent = losses[-100:]
    middle = statistics.median(recent)
    mad = statistics.median([abs(loss - middle) for loss in recent])
    deviation = max(mad / 0.67449, 0.01 * middle)  # 0.67449: the third quartile of a normal law
    score = (last - middle) / deviation
    if abs(score - 8) < 1e-3:
        return
    expected = "spike" if len(recent) >= ENOUGH and score > 8 else "good"
    assert guard.judge({}, 1.0, last, False, "skip") == expected


def test_losses_that_fall_and_vary_as_in_training_are_no_spikes() -> None:
    guard, noise = StepGuard(), random.Random(0)
    for step in range(2000):
        loss = 2 + 5 * 0.99**step + noise.gauss(0, 0.3)
        assert guard.judge({}, 1.0, loss, False, "stop") == "good"


def test_a_level_that_stays_high_ends_the_run_and_is_no_endless_skip() -> None:
    guard = StepGuard()
    for _ in range(ENOUGH):
        guard.judge({}, 1.0, 1.0, False, "skip")
    for _ in range(MAX_SKIPPED_STEPS - 1):
        assert guard.judge({}, 1.0, 9.0, False, "skip") == "spike"
    with pytest.raises(LossSpike, match=r"the loss is 9 for 10 steps in a row, but 1 is usual"):
        guard.judge({}, 1.0, 9.0, False, "skip")


# -- spikes in a run -------------------------------------------------------------------------


def spike_at(*steps: int) -> Callable[[tuple[str, ...], float], float]:
    count = iter(range(1, 10**6))
    return lambda ids, draw: 50.0 if next(count) in steps else 1.0


def test_a_skipped_spike_changes_nothing_and_is_in_the_history(
    saveable: Make, colours: CaptionData, harm: Any
) -> None:
    harm(spike_at(25))
    seen: list[dict[str, torch.Tensor]] = []

    class Look:
        def on_step(self, trainer: Any, row: Any) -> None:
            seen.append(tiny.weights_of(trainer.captioner))

    options = {**OPTIONS, "epochs": 10, "log_every": 100, "on_spike": "skip"}
    trainer = distiller(saveable(), **options)
    history = trainer.fit(colours, callbacks=[Look()])
    assert [row["step"] for row in history.steps if row["spike"]] == [25]
    assert [row["spikes"] for row in history.epochs] == [0] * 8 + [1, 0]
    assert tiny.same_bits(seen[23], seen[24])
    assert not tiny.same_bits(seen[24], seen[25])
    assert trainer.schedule.last_epoch == 29


def test_without_the_option_nothing_is_skipped(colours: CaptionData, harm: Any) -> None:
    harm(spike_at(25))
    trainer = distiller(tiny.make_student(), **{**OPTIONS, "epochs": 10})
    history = trainer.fit(colours)
    assert not any(row["spike"] for row in history.steps)
    assert len(history.steps) == 30


def test_stop_ends_the_run_before_the_update(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    harm(spike_at(26))
    trainer = distiller(saveable(), **{**OPTIONS, "epochs": 10, "on_spike": "stop"})
    message = r"Step 26 \(epoch 9\): the loss is .* is usual .*the images g\d.png, g\d.png\..*run"
    with pytest.raises(LossSpike, match=message):
        trainer.fit(colours, out=tmp_path)
    assert load_state(tmp_path / "state.pt")["step"] == 24
    assert trainer.step_count == 25


@pytest.mark.filterwarnings("ignore:Interrupted:UserWarning")
def test_the_losses_behind_the_rule_are_part_of_the_state(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    options = {**OPTIONS, "epochs": 10, "on_spike": "skip"}

    class Interrupt:
        def on_step(self, trainer: Any, row: Any) -> None:
            trainer.history.interrupted = row["step"] == 22

    harm(spike_at(24))
    whole = distiller(saveable(), **options)
    whole.fit(colours)
    harm(spike_at(24))
    distiller(saveable(), **options).fit(colours, out=tmp_path, callbacks=[Interrupt()])
    rest = distiller(saveable(seed=5), **options)
    history = rest.fit(colours, out=tmp_path, resume=True)
    assert [row["step"] for row in history.steps if row["spike"]] == [24]
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    assert rest.guard.state_dict() == whole.guard.state_dict()


# -- NaN: the term, the images, and a file ----------------------------------------------------


def test_a_nan_names_the_term_and_the_images(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    harm(lambda ids, draw: float("nan") if "g4.png" in ids else 1.0)
    trainer = distiller(saveable(), **OPTIONS)
    with pytest.raises(NotFiniteLoss) as caught:
        trainer.fit(colours, out=tmp_path)
    text = str(caught.value)
    assert "mine is nan, over the images g" in text
    assert "g4.png" in text
    assert f"{tmp_path / 'failed_step.pt'}: capdistill.training.replay_step" in text


class Shaky(DistillationLoss):
    """Not finite for one image, with whatever others it comes."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        value = student.logits.square().mean(-1)[batch.target_mask].sum()
        return value * float("inf") if "g4.png" in batch.image_ids else value


def test_the_image_that_gives_the_nan_by_itself_is_named(
    colours: CaptionData, tmp_path: Path
) -> None:
    losses: Any = {"shaky": Shaky()}
    pair = tiny.make_teacher(), tiny.make_student()
    trainer = Distiller(*pair, losses=losses, **{**OPTIONS, "batch_size": 6})
    with pytest.raises(NotFiniteLoss, match=r"By themselves, these give it too: g4\.png\."):
        trainer.fit(colours)


def failed(saveable: Make, colours: CaptionData, out: Path, **options: Any) -> Distiller:
    """A run whose fifth step fails if, and only if, it draws what it drew then."""
    trainer = distiller(saveable(dropout=0.3), **{**OPTIONS, "epochs": 3, **options})
    with pytest.raises(NotFiniteLoss, match=r"Step 5 .*replay_step"):
        trainer.fit(colours, out=out)
    return trainer


def test_a_failed_step_is_run_again_from_its_file_bit_for_bit(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    drawn: list[float] = []

    def nan_at_the_fifth(ids: tuple[str, ...], draw: float) -> float:
        drawn.append(draw)
        return float("nan") if len(drawn) == 9 else 1.0  # two micro-batches a step

    harm(nan_at_the_fifth)
    options = {**OPTIONS, "epochs": 3, "accumulation_steps": 2, "batch_size": 1}
    trainer = failed(saveable, colours, tmp_path, **options)
    before = tiny.weights_of(trainer.captioner)

    def nan_for_that_draw(ids: tuple[str, ...], draw: float) -> float:
        return float("nan") if draw == drawn[8] else 1.0

    harm(nan_for_that_draw)
    again = distiller(saveable(seed=7, dropout=0.3), **options)
    with pytest.raises(NotFiniteLoss, match=r"Step 5 .*mine is nan"):
        replay_step(again, tmp_path / "failed_step.pt")
    assert tiny.same_bits(before, tiny.weights_of(again.captioner))

    harm(lambda ids, draw: 1.0)
    row = replay_step(again, tmp_path / "failed_step.pt")
    assert row["step"] == 5
    assert row["images"] == 2
    assert row["learning_rates"]["model"] > 0


def test_a_file_of_another_kind_or_trainer_is_refused(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    harm(lambda ids, draw: 1.0)
    trainer = distiller(saveable(), **OPTIONS)
    trainer.fit(colours, out=tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.pt is not a failed step of capdistill"):
        replay_step(trainer, tmp_path / "state.pt")
    count = iter(range(1, 100))
    harm(lambda ids, draw: float("nan") if next(count) == 5 else 1.0)
    failed(saveable, colours, tmp_path / "failed")
    with pytest.raises(CheckpointError, match="training state"):
        replay_step(Trainer(saveable(), **OPTIONS), tmp_path / "failed" / "failed_step.pt")


def test_a_new_start_removes_the_failed_step_of_the_earlier_one(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: Any
) -> None:
    count = iter(range(1, 100))
    harm(lambda ids, draw: float("nan") if next(count) == 5 else 1.0)
    failed(saveable, colours, tmp_path)
    assert (tmp_path / "failed_step.pt").exists()
    history = distiller(saveable(dropout=0.3), **{**OPTIONS, "epochs": 3}).fit(
        colours, out=tmp_path, resume=True
    )
    assert len(history.epochs) == 3
    assert not (tmp_path / "failed_step.pt").exists()


# -- with other methods ------------------------------------------------------------------------


def learned(student: Captioner, **options: Any) -> Trainer:
    weights = cd.training.Uncertainty({"ce": 1.0, "token": 1.0})
    losses = {"token": "token"}
    return Distiller(tiny.make_teacher(), student, losses=losses, weights=weights, **options)


def rewarded(student: Captioner, **options: Any) -> Trainer:
    return cd.SelfCritical(student, {"bleu_1": 1.0}, **{**options, "samples": 2})


@pytest.mark.parametrize("make", [Trainer, learned, rewarded], ids=["plain", "learned", "rewarded"])
def test_spikes_are_watched_whatever_is_trained(make: Any, colours: CaptionData) -> None:
    options = {**OPTIONS, "epochs": 8, "on_spike": "skip", "precision": "fp32"}
    trainer = make(tiny.make_student(), **options)
    seen = []

    class Spike:
        def on_step(self, trainer: Any, row: Any) -> None:
            seen.append(row["spike"])
            if row["step"] == 22:
                trainer.guard.losses.extend([-50.0, -50.1] * 50)  # then any loss is a spike

    history = trainer.fit(colours, callbacks=[Spike()])
    assert seen == [*[False] * 22, True, True]
    assert history.epochs[-1]["spikes"] == 2


def test_a_spike_is_skipped_with_loss_scaling_too() -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, schedule="constant", on_spike="skip")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = tiny.make_batch([2, 3])
    trainer.step(batch)
    trainer.guard.losses.extend([0.01, 0.011] * 50)
    before = tiny.weights_of(trainer.captioner)
    assert trainer.step(batch)["spike"]
    assert tiny.same_bits(before, tiny.weights_of(trainer.captioner))
    trainer.guard.losses.clear()
    assert not trainer.step(batch)["spike"]
    assert not tiny.same_bits(before, tiny.weights_of(trainer.captioner))
