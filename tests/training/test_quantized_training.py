"""`quantize="int8"` in training: the laws hold, and what it is combined with keeps working."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, SelfCritical, Trainer, int8
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError, ConfigError
from capdistill.training.sources import open_sources
from tests.training import tiny_models as tiny
from tests.training.test_execution import steps
from tests.training.test_resume import At, distiller, stop, timeless


@pytest.fixture(autouse=True)
def small_matrices_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "LEAST", 1)


QUIET: dict[str, Any] = {**tiny.QUIET, "schedule": "constant", "quantize": "int8"}


def sgd(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def trained(*given: Any, **options: Any) -> Distiller:
    trainer = Distiller(tiny.make_teacher(), tiny.make_student(mix=True), **{**QUIET, **options})
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    for micro_batches in given:
        trainer.step(*micro_batches)
    return trainer


def test_a_step_over_two_micro_batches_is_one_over_both():
    """Ranges included: the first step finds them and rounds no input, whatever its parts."""
    parts = [tiny.make_batch([2, 5], first=1), tiny.make_batch([4], first=7)]
    several, whole = trained(parts, parts), trained([tiny.merge(parts)], [tiny.merge(parts)])
    assert several.objective.quantizer.complete
    for name, value in several.objective.state_dict().items():
        assert_close(value, whole.objective.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_validation_and_samples_leave_the_ranges_alone():
    batch = tiny.make_batch([2, 5])
    trainer = trained([batch])
    before = trainer.objective.quantizer.ranges.clone()
    trainer.validate(cd.data.source.FixedBatches([tiny.make_batch([3], first=5)]))
    trainer.student.generate(batch)
    trainer.objective.quantizer.update()
    assert torch.equal(trainer.objective.quantizer.ranges, before)


def test_the_student_is_given_back_as_it_is_saved(saveable: Any, colours: Any, tmp_path: Path):
    trainer = distiller(saveable(mix=True), quantize="int8", epochs=2)
    trainer.fit(colours, colours, out=tmp_path)
    student, batch = trainer.student, tiny.make_batch([3])
    best = Captioner.load(tmp_path / "best")
    assert torch.equal(student(batch).logits, best(batch).logits)
    assert student.activation_ranges == best.activation_ranges is not None
    assert set(best.activation_ranges) == {"encoder.mix", "encoder.mix.output"}
    trainer.objective.train()
    assert not torch.equal(student(batch).logits, best(batch).logits)  # rounded again
    Distiller(tiny.make_teacher(), student, **tiny.QUIET)  # another run, without
    assert torch.equal(student(batch).logits, best(batch).logits)


def test_training_without_it_forgets_the_ranges():
    student, batch = tiny.make_student(mix=True), tiny.make_batch([2, 5])
    Trainer(student, **QUIET).step(batch)
    assert student.activation_ranges
    trainer = Trainer(student, **{**QUIET, "quantize": None})
    assert student.activation_ranges  # nothing was trained yet
    trainer.step(batch)
    assert student.activation_ranges is None


@pytest.mark.parametrize("frozen", [False, True])
def test_epochs_of_two_runs_are_those_of_one_bit_for_bit(
    saveable: Callable[..., Captioner], colours: CaptionData, tmp_path: Path, frozen: bool
):
    how: dict[str, Any] = {"quantize": "int8", "ema_decay": 0.9, "word_dropout": 0.3}
    how |= {"cache_features": True, "cache_dir": str(tmp_path / "cache")} if frozen else {}
    options: dict[str, Any] = {"dropout": 0.3, "trainable": not frozen, "mix": True}
    whole = distiller(saveable(**options), **how)
    whole.fit(colours, colours, out=tmp_path / "whole")
    callback = At(stop, epoch=1)
    distiller(saveable(**options), **how).fit(
        colours, colours, out=tmp_path / "parts", callbacks=[callback]
    )
    rest = distiller(saveable(seed=8, **options), **how)
    history = rest.fit(colours, colours, out=tmp_path / "parts", resume=True)
    assert timeless(history) == timeless(whole.history)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    ranges = [Captioner.load(tmp_path / n / "final").activation_ranges for n in ("whole", "parts")]
    assert ranges[0] == ranges[1] is not None
    with pytest.raises(CheckpointError, match=r"quantize: int8 -> absent"):
        distiller(saveable(**options), **{**how, "quantize": None}).fit(
            colours, colours, out=tmp_path / "parts", resume=True
        )


@pytest.mark.parametrize("preset", ["debug_teacher", "debug_student"])
def test_checkpointed_blocks_compute_with_the_same_rounded_values(preset: str):
    losses, plain, _ = steps(preset, quantize="int8")
    again, weights, trainer = steps(preset, quantize="int8", gradient_checkpointing=True)
    assert losses == again
    assert tiny.same_bits(plain, weights)
    assert trainer.objective.quantizer.complete


def test_frozen_stages_are_rounded_in_a_cache_of_their_own(tmp_path: Path):
    data = cd.data.sample().train.subset(8)
    how: dict[str, Any] = {**tiny.QUIET, "batch_size": 4, "augment": False}
    how |= {"cache_dir": str(tmp_path)}
    found: dict[object, Any] = {}
    for key in ((None, True), ("int8", True), ("int8", False)):
        torch.manual_seed(0)
        made = cd.Captioner.create(
            "debug_student",
            tokenizer=tiny.TOKENIZER,
            weights=False,
            encoder={"trainable": 1, "image_size": 64, "dropout": 0.0},
        )
        trainer = Trainer(made, quantize=key[0], cache_features=key[1], **how)
        source, _ = open_sources(trainer, data)
        batch = next(iter(source.epoch(0)))
        with torch.no_grad():
            encoder = made.eval().encoder
            features = made.encode(batch)
            if not batch.cached:  # as it is stored: in float16
                stored = encoder.frozen_stages(batch.images).half().float()
                features = encoder.head(encoder.remaining_stages(stored))
        found[key] = features, batch.cached.keys(), made.activation_ranges
    (plain, key, _), (cached, own, ranges), (whole, none, same) = found.values()
    assert len(key) == len(own) == 1
    assert key != own
    assert not none
    assert ranges == same is not None
    assert_close(cached, whole)
    assert not torch.allclose(cached, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"on_policy": 0.5},
        {"scheduled_sampling": 1.0},
        {"weights": cd.training.GradNorm(every=1)},
        {"weights": cd.training.Uncertainty()},
        {"ema_decay": 0.9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_learns_together_with(options: dict[str, Any]):
    trainer = trained(**options)
    given = [tiny.make_batch([2, 5, 3, 4])]
    losses = [trainer.step(*given)["terms"]["ce"]["raw"] for _ in range(12)]
    assert losses[-1] < losses[0]
    assert trainer.objective.quantizer.complete


def test_self_critical_samples_and_scores_the_rounded_captioner():
    batch = tiny.make_batch([3, 3])
    references = dict(zip(batch.image_ids, batch.references, strict=True))
    trainer = SelfCritical(tiny.make_student(mix=True), "bleu_1", references=references, **QUIET)
    assert all("reward" in trainer.step(batch)["terms"] for _ in range(2))
    assert trainer.objective.quantizer.complete


def test_training_wins_back_what_rounding_loses():
    """A channel with one large weight has few steps left for the others: they are relearned."""
    torch.manual_seed(0)
    given = [tiny.make_batch([2, 5, 3, 4], k=2)]

    def start() -> Captioner:
        made = tiny.make_student()
        with torch.no_grad():
            made.decoder.output.weight[:, 0] = 300.0
        return made

    def loss(student: Captioner) -> float:
        trainer = Trainer(student, **QUIET)
        trainer.objective.eval()
        return trainer.terms(given[0])["ce"].mean.item()

    found = {}
    for quantize in (None, "int8"):
        trainer = Trainer(start(), **{**QUIET, "quantize": quantize, "learning_rate": 0.02})
        for _ in range(60):
            trainer.step(*given)
        found[quantize] = loss(trainer.captioner)
    assert found["int8"] < 0.9 * found[None]


def test_the_teacher_stays_in_full_precision_or_is_refused():
    batch, teacher = tiny.make_batch([2, 3]), tiny.make_teacher()
    expected = teacher.eval()(batch).logits
    trainer = Distiller(teacher, tiny.make_student(), {"token": "token"}, **QUIET)
    trainer.step(batch)
    assert torch.equal(trainer.teacher_output(batch).logits, expected)
    student, shared = tiny.make_student(trainable=False, mix=True), tiny.make_teacher(dim=6)
    other = Captioner(student.encoder, shared.decoder, shared.tokenizer)
    with pytest.raises(ConfigError, match=r"shares encoder\.mix with a teacher.*deepcopy"):
        Distiller(other, student, {"token": "token"}, **QUIET)


def test_what_cannot_be_combined_is_refused_when_the_trainer_is_made():
    with pytest.raises(ConfigError, match="compiled model does not see"):
        Trainer(tiny.make_student(), compile="eager", **QUIET)
    with pytest.raises(ConfigError, match="int8"):
        Trainer(tiny.make_student(), **{**QUIET, "quantize": "int4"})
    assert "quantize" in Trainer(tiny.make_student(), **QUIET).needs_whole_weights()
