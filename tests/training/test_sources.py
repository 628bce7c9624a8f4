"""What `fit` accepts, what it refuses and why, and broken pictures among good ones (case 3)."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData, Example
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.tokenizer import WordTokenizer
from capdistill.training.sources import open_sources
from tests.training import tiny_models as tiny

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")
BAD = {"half.jpg", "empty.jpg", "page.jpg", "stub.png", "flip.png"}


def trainer(**options: Any) -> Trainer:
    return Trainer(tiny.make_student(), **{**tiny.QUIET, "batch_size": 2, "epochs": 2, **options})


def encoded(form: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    return file.getvalue()


@pytest.fixture
def bad(tmp_path: Path) -> list[Example]:
    jpeg, png = encoded("JPEG"), bytearray(encoded("PNG"))
    png[len(png) // 2] ^= 255
    content = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "stub.png": b"\x89PNG\r\n\x1a\n",
        "flip.png": bytes(png),
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    return [Example(name, tmp_path / name, ("a broken thing",)) for name in content]


@pytest.fixture
def good(tmp_path: Path) -> list[Example]:
    examples = []
    for n, colour in enumerate(COLOURS):
        path = tmp_path / f"g{n}.jpg"
        Image.new("RGB", (64, 64), colour).save(path, quality=95)
        examples.append(Example(path.name, path, (f"a {colour} picture",)))
    return examples


class Seen:
    """Which images were trained on, each with its caption and its colour."""

    def __init__(self, watched: Trainer) -> None:
        self.images: list[tuple[str, str]] = []
        self.colours: dict[str, torch.Tensor] = {}

        def look(batch: Batch) -> Batch:
            self.images += zip(batch.image_ids, batch.captions, strict=True)
            self.colours |= dict(zip(batch.captions, batch.images, strict=True))
            return batch

        watched.prepare_batch = look  # type: ignore[method-assign]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_left_out_and_said(
    good: list[Example], bad: list[Example], workers: int
) -> None:
    train = CaptionData([good[0], bad[0], *bad[1:4], *good[1:]])
    val = CaptionData([good[0], bad[4], good[1]])
    tested = trainer(num_workers=workers, epochs=2, log_every=1)
    tested.captioner.tokenizer = WordTokenizer(["a", "picture", *COLOURS[:4]])
    seen = Seen(tested)
    with pytest.warns(UserWarning, match="5 images could not be used and were left out") as caught:
        history = tested.fit(train, val)

    expected = sorted((example.image_id, example.captions[0]) for example in good)
    assert sorted(seen.images) == sorted(expected * 2)
    for caption, image in seen.colours.items():
        assert image.float().mean((1, 2)).max() > 200, caption  # never a black picture
    first, second = history.epochs
    assert [row["images"] for row in (first, second)] == [6, 6]
    assert (first["skipped"], first["val"]["images"], first["val"]["skipped"]) == (4, 2, 1)
    named = {Path(problem.split(":")[0]).name for problem in first["problems"]}
    assert named == BAD
    assert all("corrupt image (" in problem for problem in first["problems"])
    assert second["problems"] == []
    assert sum("could not be used" in str(w.message) for w in caught) == 1
    assert all(name in str(caught[0].message) for name in BAD)


def test_strict_reading_names_the_path(good: list[Example], bad: list[Example]) -> None:
    with pytest.raises(DataError, match=r"half\.jpg"):
        trainer(errors="raise").fit(CaptionData([*good, bad[0]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_broken_pictures_is_one_error_before_the_first_step(
    good: list[Example], bad: list[Example], workers: int
) -> None:
    for train, val in ((bad, None), (good, bad)):
        tested = trainer(num_workers=workers)
        with pytest.raises(DataError, match=r"(?s)None of the 5 images.*5 corrupt image"):
            tested.fit(CaptionData(train), val and CaptionData(val))
        assert tested.step_count == 0


# -- kinds of data --------------------------------------------------------------------------


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        return torch.full((3, 10, 9), 40 * index, dtype=torch.uint8), ["a red dog", "a cat"]


class Again:
    """Batches, as often as they are asked for."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Stream(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        yield tiny.make_batch([2, 1])
        yield tiny.make_batch([3], first=2)


BATCHES = [tiny.make_batch([2, 1]), tiny.make_batch([3], first=2)]


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (lambda: Pairs(), 5),
        (lambda: [Pairs()[i] for i in range(3)], 3),
        (lambda: BATCHES, 3),
        (lambda: tuple(BATCHES), 3),
        (lambda: Again(*BATCHES), 3),
        (lambda: Stream(), 3),
        (lambda: torch.utils.data.DataLoader(Stream(), batch_size=None), 3),
    ],
    ids=["dataset", "pairs", "list", "tuple", "iterable", "stream", "loader"],
)
def test_data_of_every_kind_are_trained_and_validated_on(
    make: Callable[[], Any], images: int
) -> None:
    history = trainer().fit(make(), make())
    assert [row["images"] for row in history.epochs] == [images, images]
    assert [row["val"]["images"] for row in history.epochs] == [images, images]
    assert all(0 <= row["scores"]["bleu_1"] <= 1 for row in history.epochs)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: iter(BATCHES), ConfigError, "one-shot iterator"),
        (lambda: (batch for batch in BATCHES), ConfigError, "one-shot iterator"),
        (lambda: [], DataError, "training data are empty"),
        (lambda: CaptionData([]), DataError, "no image"),
        (lambda: Again(("image", "caption")), ConfigError, r"yield tuple.*capdistill\.Batch"),
        (lambda: 3, ConfigError, "int is not a data set"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    make: Callable[[], Any], error: type[Exception], said: str
) -> None:
    tested = trainer()
    with pytest.raises(error, match=said):
        tested.fit(make())
    assert tested.step_count == 0


def test_empty_validation_data_are_called_so() -> None:
    with pytest.raises(DataError, match="validation data are empty: a list of length 0"):
        trainer().fit(BATCHES, [])


def test_validation_without_references_is_refused_before_the_first_step() -> None:
    tested = trainer()
    with pytest.raises(ConfigError, match=r"no references.*would mislead.*references="):
        tested.fit(BATCHES, [dataclasses.replace(batch, references=None) for batch in BATCHES])
    assert tested.step_count == 0


def test_validation_equals_the_loss_of_all_its_tokens_and_changes_nothing() -> None:
    tested = trainer(epochs=1, label_smoothing=0.0)
    tested.fit(BATCHES)
    source_like = tested.train_source
    assert source_like is not None
    flags = [module.training for module in tested.objective.modules()]
    before = tiny.weights_of(tested.objective)
    found, scores = tested.validate(source_like)
    batch = tiny.merge(BATCHES)
    mask = batch.target_mask
    logits = tested.captioner(batch).logits
    expected = torch.nn.functional.cross_entropy(logits[mask], batch.targets[mask])
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert set(scores) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d"}
    assert [module.training for module in tested.objective.modules()] == flags
    assert tiny.same_bits(before, tiny.weights_of(tested.objective))


def test_validation_runs_a_frozen_trunk_once_an_image() -> None:
    tested = Trainer(tiny.make_student(trainable=False), **tiny.QUIET)
    tested.fit(BATCHES, epochs=1)
    tested.captioner.encoder.seen = 0
    assert tested.train_source is not None
    tested.validate(tested.train_source)
    assert tested.captioner.encoder.seen == 3


def test_other_references_of_the_same_images_are_scored_anew() -> None:
    tested = trainer()
    said = {"1": "a red dog", "2": "a cat"}
    perfect = tested.score({key: (text,) for key, text in said.items()}, said)
    other = tested.score({"1": ("blue",), "2": ("lime",)}, said)
    assert perfect["bleu_1"] == pytest.approx(1.0)
    assert other["bleu_1"] < 0.1


def test_the_number_of_captions_that_the_data_decide_is_recorded(
    tmp_path: Path, saveable: Callable[..., Captioner]
) -> None:
    images = [np.full((8, 8, 3), 40 * n, np.uint8) for n in range(4)]
    two = [(image, ["a red dog", "a dog"]) for image in images]
    three = [(image, ["a red dog", "a dog", "a cat"]) for image in images]
    trainer = Trainer(saveable(), **{**tiny.QUIET, "batch_size": 2, "epochs": 1})
    for data, expected in ((two, 2), (three, 3)):
        trainer.fit(data, out=tmp_path / str(expected))
        assert next(iter(trainer.train_source.epoch(0))).captions_per_image == expected
        written = json.loads((tmp_path / str(expected) / "run.json").read_text())
        assert written["config"]["captions_per_image"] == expected
    trainer.fit(three, captions_per_image=1)
    assert next(iter(trainer.train_source.epoch(0))).captions_per_image == 1


@pytest.mark.parametrize("sides", [(8, 12), (12, 8)])
def test_images_are_loaded_at_the_larger_size_of_the_models(
    colours: CaptionData, sides: tuple[int, int]
) -> None:
    teacher, student = tiny.make_teacher(), tiny.make_student()
    plain = Trainer(student, **tiny.QUIET)
    pair = Distiller(teacher, student, losses={}, **tiny.QUIET)
    teacher.encoder.image_size, student.encoder.image_size = sides
    for trainer, side in ((plain, sides[1]), (pair, 12)):
        for source in open_sources(trainer, colours, colours):
            assert next(iter(source.epoch(0))).images.shape[1:] == (3, side, side)


def test_options_of_decoding_stand_beside_those_of_training() -> None:
    trainer = Trainer(tiny.make_student(), beam_size=2, generation={"min_length": 1})
    assert trainer.config.generation.beam_size == 2
    assert trainer.config.generation.min_length == 1
    images = [np.full((8, 8, 3), 40 * n, np.uint8) for n in range(2)]
    data = [(image, ["a red dog"]) for image in images]
    used: list[Any] = []
    look = SimpleNamespace(on_step=lambda trainer, row: used.append(trainer.config))
    trainer.fit(data, **tiny.QUIET, epochs=1, no_repeat_ngram=2, seed=7, callbacks=[look])
    found = used[0].generation
    assert (found.beam_size, found.min_length, found.no_repeat_ngram, found.seed) == (2, 1, 2, 0)
    assert used[0].seed == 7  # training's own
    with pytest.raises(ConfigError, match="beam_size must be at least 1, got 0"):
        trainer.fit(data, beam_size=0)
