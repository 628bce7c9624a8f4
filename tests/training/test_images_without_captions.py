"""Training on images without captions: losses on features, what is refused, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill import Captioner, Distiller
from capdistill.data import CaptionData, Images
from capdistill.errors import ConfigError, DataError
from capdistill.tokenizer import WordTokenizer
from capdistill.training.sources import open_sources
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
POOLED = {"feature": {"name": "feature", "match": "pooled"}}
OPTIONS: dict[str, Any] = {
    **tiny.QUIET,
    **{"batch_size": 2, "learning_rate": 0.01, "epochs": 4, "monitor": "loss"},
}


def distiller(student: Captioner, **options: Any) -> Distiller:
    teacher = options.pop("teacher", None) or tiny.make_teacher()
    losses, weights = options.pop("losses", POOLED), options.pop("weights", {"ce": 0})
    return Distiller(teacher, student, losses, weights, **{**OPTIONS, **options})


@pytest.fixture
def photos(colours: CaptionData) -> Images:
    """The six pictures of `colours`, without their captions."""
    return Images(colours.examples[0].path.parent)


def test_the_encoder_comes_closer_to_the_teacher_on_other_images(photos: Images) -> None:
    parts = photos.split(val=0.4)
    student = tiny.make_student()
    decoder = tiny.weights_of(student.decoder)
    history = distiller(student, epochs=8).fit(parts.train, parts.val)
    losses = [row["val"]["loss"] for row in history.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert history.epochs[-1]["scores"] == {}
    assert history.epochs[-1]["val"]["images"] == len(parts.val) == 2
    assert tiny.same_bits(decoder, tiny.weights_of(student.decoder))
    assert student.caption(parts.val.examples[0].path) is not None


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "feature", "match": "grid"},
        {"name": "relational"},
        {"name": "contrastive"},
    ],
    ids=lambda loss: loss["name"],
)
def test_every_loss_on_features_can_be_used(photos: Images, loss: dict[str, Any]) -> None:
    student = tiny.make_student(seed=5)
    history = distiller(student, losses={"mine": loss}, batch_size=6, epochs=12).fit(photos)
    values = [row["train"]["loss"] for row in history.epochs]
    assert values[-1] < 0.5 * values[0]


def test_teacher_and_student_may_have_other_words(photos: Images) -> None:
    words = WordTokenizer(["another", "vocabulary"])
    decoder = cd.decoders.create("transformer", dim=8, width=8, layers=1, heads=2, ffn=8)
    teacher = Captioner(tiny.Patches(dim=8), decoder, words)
    history = distiller(tiny.make_student(), teacher=teacher).fit(photos)
    assert history.epochs[-1]["train"]["loss"] < history.epochs[0]["train"]["loss"]


def test_features_of_the_teacher_can_be_cached(photos: Images, tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"cache_features": True, "cache_dir": tmp_path, "augment": False}):
        student, teacher = tiny.make_student(), tiny.make_teacher(trainable=False)
        trainer = distiller(student, teacher=teacher, **{"augment": False, **options})
        encoder = teacher.encoder
        assert isinstance(encoder, tiny.Patches)
        encoder.seen = 0
        runs.append(trainer.fit(photos, photos).epochs[-1]["val"]["loss"])
        assert (encoder.seen == len(photos)) == bool(options)
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)  # tokens are kept as float16


class Stop:
    def on_epoch(self, trainer: Any, row: Any) -> None:
        trainer.stopping = row["epoch"] == 1


def test_a_stopped_run_resumes_and_captions_are_trained_on_afterwards(
    saveable: Make, photos: Images, colours: CaptionData, tmp_path: Path
) -> None:
    whole = distiller(saveable())
    whole.fit(photos, photos, out=tmp_path / "whole")
    distiller(saveable()).fit(photos, photos, out=tmp_path / "parts", callbacks=[Stop()])
    rest = distiller(saveable(seed=8))
    rest.fit(photos, photos, out=tmp_path / "parts", resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())

    student = Captioner.load(tmp_path / "parts" / "best")
    assert tiny.same_bits(student.encoder.state_dict(), rest.student.encoder.state_dict())
    options = {**OPTIONS, "monitor": "cider", "epochs": 1}
    history = Distiller(tiny.make_teacher(), student, **options).fit(colours, colours)
    assert set(history.epochs[0]["train"]["terms"]) == {"ce", "token", "feature", "hidden"}
    assert history.epochs[0]["scores"]["cider_d"] >= 0


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "weights", "named"),
    [
        (POOLED, {}, "ce"),
        ({**POOLED, "token": "token"}, {"ce": 0}, "token"),
        ({"token": "token", "hidden": "hidden"}, {}, "ce, token, hidden"),
    ],
)
def test_terms_that_read_captions_are_refused(
    photos: Images, losses: dict[str, Any], weights: dict[str, float], named: str
) -> None:
    trainer = distiller(tiny.make_student(), losses=losses, weights=weights)
    with pytest.raises(ConfigError, match=rf"read them: {named}\..*teachers\.caption"):
        trainer.fit(photos)
    assert trainer.step_count == 0
    failed = [row for row in trainer.check(photos).rows if row.status == "fail"]
    assert [row.topic for row in failed] == ["data"]
    assert named in failed[0].finding


def test_a_trainer_without_a_teacher_is_refused(photos: Images) -> None:
    with pytest.raises(ConfigError, match=r"no captions.* ce\."):
        cd.Trainer(tiny.make_student(), **tiny.QUIET).fit(photos)


def test_a_score_cannot_choose_the_epoch(photos: Images, colours: CaptionData) -> None:
    trainer = distiller(tiny.make_student(), monitor="cider")
    with pytest.raises(ConfigError, match=r"monitor='cider_d' chooses.*monitor='loss'"):
        trainer.fit(photos, photos)
    history = trainer.fit(photos, colours, epochs=1)
    assert "cider_d" in history.epochs[0]["scores"]


def test_check_finds_nothing_wrong_with_losses_on_images(photos: Images) -> None:
    report = distiller(tiny.make_student()).check(photos, photos)
    assert [row for row in report.rows if row.status == "fail"] == []


def test_they_cannot_be_scored(photos: Images) -> None:
    with pytest.raises(DataError, match="no references"):
        cd.evaluate(tiny.make_student(), photos, measure=False, progress=False, device="cpu")


# -- beside images with captions --------------------------------------------------------------


@pytest.fixture
def mixed(colours: CaptionData, photos: Images) -> CaptionData:
    return CaptionData([*colours.examples[:3], *photos.examples[3:]])


def test_captions_count_as_if_the_other_images_were_not_there(
    colours: CaptionData, mixed: CaptionData
) -> None:
    losses = {**POOLED, "token": "token", "hidden": "hidden"}
    trainer = distiller(tiny.make_student(), losses=losses, weights={}, augment=False, batch_size=6)
    trainer.objective.eval()
    found = []
    for data in (mixed, colours.subset(3)):
        source, _ = open_sources(trainer, data)
        (batch,) = source.epoch(0)
        with torch.no_grad():
            found.append(trainer.terms(batch))
    both, alone = found
    for name in ("ce", "token", "hidden"):
        assert both[name].count == alone[name].count > 0
        assert float(both[name].sum) == pytest.approx(float(alone[name].sum), rel=1e-5)
    assert (both["feature"].count, alone["feature"].count) == (6, 3)


def test_they_can_be_trained_on_together(mixed: CaptionData, photos: Images) -> None:
    losses = {"feature": "feature", "token": "token"}
    trainer = distiller(tiny.make_student(), losses=losses, weights={}, monitor="cider")
    history = trainer.fit(mixed, mixed, epochs=2)
    last = history.epochs[-1]
    assert last["val"]["images"] == 6
    assert last["scores"]["cider_d"] >= 0
    assert set(trainer._scorer._made[0][0]) == {"g0.png", "g1.png", "g2.png"}  # type: ignore[index]


def test_the_teacher_can_score_what_the_student_says_of_them(photos: Images) -> None:
    losses = {"token": "token"}
    student = tiny.make_student()
    trainer = distiller(student, losses=losses, on_policy=1.0, epochs=6, batch_size=6)
    history = trainer.fit(photos)
    values = [row["train"]["terms"]["token"]["raw"] for row in history.epochs]
    assert 0 < values[-1] < values[0]


def no_words(batches: Iterator[Any]) -> bool:
    return not any(batch.target_mask.any() for batch in batches)


def test_their_batches_hold_no_targets_in_training(photos: Images) -> None:
    source, _ = open_sources(distiller(tiny.make_student()), photos)
    assert no_words(source.epoch(0))
