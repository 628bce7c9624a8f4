"""A loop of your own over `step`, options of one fit, and batches of a single image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData, Loader
from capdistill.errors import IncompatibleModels
from capdistill.outputs import Batch
from capdistill.training.config import TrainConfig
from capdistill.training.optim import share_of_rate
from tests.training import tiny_models as tiny

BATCHES = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]


def rates(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step(BATCHES[n % 2])["learning_rates"]["model"] for n in range(steps)]


# -- the learning rate ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine_restarts", "warmup_cosine"])
def test_the_rate_stays_constant_while_the_number_of_steps_is_unknown(schedule: str) -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, schedule=schedule, learning_rate=2e-4)
    with pytest.warns(UserWarning, match=r"rate stays at 0\.0002.*steps_per_epoch") as caught:
        assert rates(trainer, 12) == pytest.approx([2e-4] * 12)
    assert len(caught) == 1


def test_a_constant_rate_needs_no_number_of_steps() -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, schedule="constant", learning_rate=0.5)
    assert rates(trainer, 3) == [0.5] * 3  # warnings are errors here


@pytest.mark.parametrize("when", ["first", "after state_dict", "after a step"])
@pytest.mark.filterwarnings("ignore:The learning rate stays:UserWarning")
def test_the_schedule_follows_steps_per_epoch_whenever_it_is_set(when: str) -> None:
    options = {"schedule": "warmup_cosine", "epochs": 3, "warmup": 0.3, "learning_rate": 0.1}
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, **options)
    share, done = share_of_rate(TrainConfig(**options), 4), 0
    if when == "after state_dict":
        trainer.state_dict()
    elif when == "after a step":
        rates(trainer, 1)
        done = 1
    trainer.steps_per_epoch = 4
    expected = [0.1 * share(step) for step in range(done, 12)]
    assert rates(trainer, 12 - done) == pytest.approx(expected)


def test_a_loop_of_your_own_equals_fit(colours: CaptionData) -> None:
    options = {**tiny.QUIET, "epochs": 2, "batch_size": 2, "learning_rate": 0.01}
    weights = {"ce": (1.0, 0.2), "token": lambda progress: progress}

    def make() -> Distiller:
        pair = tiny.make_teacher(), tiny.make_student(dropout=0.3)
        return Distiller(*pair, losses={"token": "token"}, weights=weights, **options)

    fitted, looped = make(), make()
    fitted.fit(colours, augment=False)
    options = {"batch_size": 2, "train": True, "crop": False}
    loader = Loader(colours, tiny.TOKENIZER, image_size=8, **options)
    looped.steps_per_epoch = len(loader)
    cd.runtime.seed_everything(0)
    for looped.epoch in range(2):
        for batch in loader.epoch(looped.epoch):
            looped.step(batch)
    assert tiny.same_bits(fitted.objective.state_dict(), looped.objective.state_dict())


def test_scheduled_weights_keep_their_first_value_while_the_steps_are_unknown() -> None:
    weights = {"ce": (1.0, 0.0), "token": (0.5, 2.0)}
    pair = tiny.make_teacher(), tiny.make_student()
    options = {**tiny.QUIET, "schedule": "constant", "epochs": 2}
    distiller = Distiller(*pair, losses={"token": "token"}, weights=weights, **options)

    def shares(row: Any) -> list[float]:
        return [term["weighted"] / term["raw"] for term in row["terms"].values()]

    for _ in range(3):
        assert shares(distiller.step(*BATCHES)) == pytest.approx([1.0, 0.5])
    distiller.steps_per_epoch = 3
    assert shares(distiller.step(*BATCHES)) == pytest.approx([0.5, 1.25])  # 3 of 6 steps
    distiller.step_count = 99
    assert shares(distiller.step(*BATCHES))[1] == pytest.approx(2.0)  # never beyond the last


def test_the_state_of_a_loop_of_your_own_can_be_saved_and_loaded() -> None:
    def make() -> Distiller:
        options = {**tiny.QUIET, "epochs": 2, "learning_rate": 0.02}
        return Distiller(tiny.make_teacher(), tiny.make_student(dropout=0.3), **options)

    whole, first, rest = make(), make(), make()
    for trainer in (whole, first, rest):
        trainer.steps_per_epoch = 3
    torch.manual_seed(5)
    rates(whole, 6)
    torch.manual_seed(5)
    rates(first, 2)
    rest.load_state_dict(first.state_dict())
    assert rest.step_count == 2
    rates(rest, 4)
    assert tiny.same_bits(whole.objective.state_dict(), rest.objective.state_dict())


# -- the batch to train on ------------------------------------------------------------------


class Longer(Distiller):
    """A distiller that replaces every batch by another one."""

    calls = 0

    def prepare_batch(self, batch: Batch) -> Batch:
        self.calls += 1
        return tiny.make_batch([7] * batch.num_images, first=20)


def test_what_prepare_batch_returns_is_counted_and_trained_on() -> None:
    options = {**tiny.QUIET, "schedule": "constant"}
    replaced = Longer(tiny.make_teacher(), tiny.make_student(), **options)
    direct = Distiller(tiny.make_teacher(), tiny.make_student(), **options)
    longer = tiny.make_batch([7, 7], first=20)
    rows = replaced.step(*BATCHES), direct.step(longer, longer)
    assert replaced.calls == 2
    assert rows[0]["counts"] == rows[1]["counts"]
    assert rows[0]["counts"]["ce"] == 2 * 2 * 8  # words and the end token
    assert rows[0]["loss"] == rows[1]["loss"]
    assert tiny.same_bits(replaced.objective.state_dict(), direct.objective.state_dict())
    replaced.objective.train()
    assert replaced.terms(BATCHES[0])["ce"].count == 16


def test_validation_is_on_the_batches_as_they_are() -> None:
    trainer = Longer(tiny.make_teacher(), tiny.make_student(), **tiny.QUIET, epochs=1)
    history = trainer.fit(BATCHES, BATCHES)
    assert trainer.calls == 2
    plain = Distiller(tiny.make_teacher(), tiny.make_student(), **tiny.QUIET)
    plain.captioner.load_state_dict(trainer.captioner.state_dict())
    plain.objective.load_state_dict(trainer.objective.state_dict())
    found, _ = plain.validate(SimpleNamespace(epoch=lambda n: iter(BATCHES)))
    assert history.epochs[0]["val"]["loss"] == pytest.approx(found["loss"], rel=1e-5)


# -- options of one fit -----------------------------------------------------------------------


def test_the_options_of_a_fit_hold_for_that_fit_only() -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, epochs=3)
    before = trainer.config
    lengths = [len(trainer.fit(BATCHES, **more).epochs) for more in ({"epochs": 1}, {}, {})]
    assert lengths == [1, 3, 3]
    assert trainer.config is before


def test_every_option_comes_back_also_after_a_fit_that_fails() -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET)
    before = trainer.config
    options = {"label_smoothing": 0.3, "precision": "bf16", "word_dropout": 0.5, "monitor": "loss"}

    def fail(trainer: Any, row: Any) -> None:
        assert trainer.config.label_smoothing == trainer.objective.label_smoothing == 0.3
        assert trainer.precision == "bf16"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.fit(BATCHES, callbacks=[SimpleNamespace(on_step=fail)], **options)
    assert trainer.config is before
    assert trainer.objective.label_smoothing == before.label_smoothing != 0.3
    assert trainer.precision == "fp32"
    assert not trainer.scaler.is_enabled()


def test_two_fits_in_a_row_train_as_two_trainers_would() -> None:
    options = {"epochs": 2, "learning_rate": 0.02, "label_smoothing": 0.1}
    one = Trainer(tiny.make_student(dropout=0.3), **tiny.QUIET)
    one.fit(BATCHES, epochs=1, learning_rate=0.05)
    one.fit(BATCHES, **options)
    two = Trainer(tiny.make_student(dropout=0.3), **tiny.QUIET)
    two.fit(BATCHES, epochs=1, learning_rate=0.05)
    two = Trainer(two.captioner, **tiny.QUIET, **options)
    history = two.fit(BATCHES)
    assert tiny.same_bits(one.captioner.state_dict(), two.captioner.state_dict())
    assert [row["train"] for row in one.history.epochs] == [r["train"] for r in history.epochs]


# -- batches of a single image ---------------------------------------------------------------


class Pooled(tiny.Patches):
    """An encoder that ends in a batch norm on a 1 x 1 map."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.tokens, self.grid = 1, (1, 1)

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.conv(self.normalise(images)).mean((2, 3), keepdim=True)
        return self.norm(pixels).flatten(2).transpose(1, 2)


def pooled() -> Captioner:
    torch.manual_seed(0)
    return Captioner(Pooled(), tiny.make_student().decoder, tiny.TOKENIZER)


@pytest.mark.parametrize("make", [Trainer, Distiller])
def test_a_last_batch_of_one_image_uses_running_statistics_and_is_counted(
    make: Callable[..., Trainer], colours: CaptionData
) -> None:
    models = [tiny.make_teacher()] if make is Distiller else []
    losses = {"losses": {"token": "token"}} if make is Distiller else {}
    trainer = make(*models, pooled(), **tiny.QUIET, **losses, epochs=2, batch_size=5)
    history = trainer.fit(colours, colours)
    assert [row["images"] for row in history.epochs] == [6, 6]
    assert [row["running_statistics"] for row in history.epochs] == [1, 1]
    assert trainer.captioner.encoder.norm.num_batches_tracked == 2  # none by a batch of one


def test_a_single_image_is_trained_on_with_the_running_statistics() -> None:
    trainer = Trainer(pooled(), **tiny.QUIET, schedule="constant", label_smoothing=0.0)
    batch = tiny.make_batch([3])
    frozen = pooled()
    frozen.encoder.norm.eval()
    mask = batch.target_mask
    expected = F.cross_entropy(frozen(batch).logits[mask], batch.targets[mask])
    row = trainer.step(batch)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["gradient_norm"] > 0
    assert trainer.captioner.encoder.norm.training  # for the next batch
    assert trainer.meter.running_statistics == 1


def test_several_images_never_use_running_statistics() -> None:
    trainer = Trainer(pooled(), **tiny.QUIET, schedule="constant")
    trainer.step(BATCHES[0])
    assert trainer.meter.running_statistics == 0
    assert trainer.captioner.encoder.norm.num_batches_tracked == 1


def test_other_value_errors_of_a_model_reach_the_caller() -> None:
    student = tiny.make_student()
    trainer = Trainer(student, **tiny.QUIET, schedule="constant")
    student.encoder.head = lambda tokens: (_ for _ in ()).throw(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        trainer.step(BATCHES[0])


# -- what is not trained -----------------------------------------------------------------------


def test_parameters_without_a_gradient_are_named_in_every_fit() -> None:
    student = tiny.make_student()
    student.decoder.never_used = torch.nn.Linear(2, 2)
    trainer = Trainer(student, **tiny.QUIET, epochs=2)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"never_used\.weight") as caught:
            trainer.fit(BATCHES)
        assert len(caught) == 1


def test_losses_that_do_not_fit_are_refused_by_a_loop_of_your_own_too() -> None:
    teacher = tiny.make_teacher()
    wrapped = cd.teachers.wrap(teacher, lambda m, batch: m(batch), teacher.tokenizer)
    losses = {"feature": cd.FeatureKD(match="grid")}
    distiller = Distiller(wrapped, tiny.make_student(), losses=losses, **tiny.QUIET)
    teacher.encoder.grid = None
    with warnings.catch_warnings(), pytest.raises(IncompatibleModels, match="grid"):
        distiller.terms(replace(BATCHES[0]))
    assert distiller.step_count == 0


def test_a_mixture_of_batch_sizes_is_one_step() -> None:
    row = Trainer(tiny.make_student(), **tiny.QUIET, schedule="constant").step(
        tiny.make_batch([2]), tiny.make_batch([1, 3], first=1)
    )
    assert_close(row["counts"], {"ce": 9.0})
