"""A student as its own teacher: the average of its weights, moved after every step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError, ConfigError
from capdistill.teachers import Ensemble, MeanTeacher
from tests.training import tiny_models as tiny
from tests.training.conftest import colours, saveable  # noqa: F401

Make = Callable[..., Captioner]
BATCHES = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]
LOOP: dict[str, Any] = {**tiny.QUIET, "schedule": "constant", "learning_rate": 0.01}
FIT: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "learning_rate": 0.01, "epochs": 3}


def distiller(student: Captioner, decay: float = 0.9, **options: Any) -> Distiller:
    weights = {"ce": 1.0, "token": (0.0, 1.0)}
    teacher = MeanTeacher(student, decay)
    return Distiller(teacher, student, {"token": "token"}, weights, **{**LOOP, **options})


def test_it_begins_as_a_copy_that_no_gradient_reaches() -> None:
    student = tiny.make_student(dropout=0.5)
    run = distiller(student)
    teacher = run.teacher
    assert tiny.same_bits(teacher.state_dict(), student.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    run.steps_per_epoch = 1
    run.step(BATCHES[0])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in teacher.parameters()}


def test_after_every_step_it_is_the_average_of_the_formula() -> None:
    student = tiny.make_student(norm=True).double()
    run = distiller(student, decay=0.4)
    expected = tiny.weights_of(student)
    for n in range(6):
        run.step(*BATCHES[: 1 + n % 2])
        decay = min(0.4, (1 + n) / (10 + n))
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    found = run.teacher.state_dict()
    moving = [name for name, value in expected.items() if value.is_floating_point()]
    assert any("running_mean" in name for name in moving)
    for name in moving:
        assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert not tiny.same_bits(found, student.state_dict())


def test_the_loss_compares_the_student_with_the_average() -> None:
    student = tiny.make_student()
    run = distiller(student)
    run.step(BATCHES[0])  # at equality before it
    assert run.step(BATCHES[0])["terms"]["token"]["raw"] > 0
    again = distiller(tiny.make_student())
    assert again.step(BATCHES[0])["terms"]["token"]["raw"] == pytest.approx(0, abs=1e-9)


def test_frozen_weights_are_shared_and_never_stored() -> None:
    student = tiny.make_student(norm=True, trainable=False)
    teacher = MeanTeacher(student)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        assert (theirs[name] is parameter) == (not parameter.requires_grad)
    assert not [name for name in teacher.average.names if "conv" in name or "norm" in name]
    Distiller(teacher, student, {"token": "token"}, **LOOP).step(BATCHES[0])


def test_a_frozen_trunk_is_cached_once_for_both(colours: CaptionData, tmp_path: Path) -> None:  # noqa: F811
    runs = []
    for cached in (True, False):
        student = tiny.make_student(trainable=False)
        run = distiller(student, **{**FIT, "schedule": "warmup_cosine"})
        directory = tmp_path / "features" if cached else None
        run.fit(colours, colours, cache_features=cached, cache_dir=directory, augment=False)
        runs.append(run.history.epochs[-1]["train"]["loss"])
    assert len([*(tmp_path / "features").glob("*.json")]) <= 2  # training and validation images
    assert runs[0] == pytest.approx(runs[1], rel=1e-2)  # the cache holds halves


def test_trained_stages_of_the_teacher_are_not_cached(tmp_path: Path) -> None:
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    arguments = {"name": "test_efficientnet", "weights": False, "trainable": 1, "dim": 8}
    torch.manual_seed(0)
    encoder = cd.encoders.create("timm", **arguments)
    decoder = cd.decoders.create("lstm", dim=8, embed=6, hidden=8, layers=1, heads=2)
    student = Captioner(encoder, decoder, tokenizer)
    run = distiller(student, decay=0.5, **FIT)
    options = {"cache_features": True, "cache_dir": tmp_path, "captions_per_image": 1}
    run.fit(data.train.subset(4), epochs=1, **options)
    batch = next(iter(run.train_source.epoch(0)))
    key = student.encoder.cache_key()
    assert list(batch.cached) == [key] == [run.teacher.encoder.cache_key()]
    trained = [n for n in run.teacher.average.names if n.startswith("encoder.")]
    assert trained


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_stop_and_resume_equals_one_run(
    saveable: Make,  # noqa: F811
    colours: CaptionData,  # noqa: F811
    tmp_path: Path,
    epochs_before: int,
) -> None:
    class Stop:
        def on_epoch(self, trainer: Any, row: Any) -> None:
            trainer.stopping = row["epoch"] + 1 == epochs_before

    def run(name: str, seed: int = 1, **options: Any) -> Distiller:
        trainer = distiller(saveable(seed, dropout=0.3, norm=True), **FIT, ema_decay=0.8)
        trainer.fit(colours, colours, out=tmp_path / name, **options)
        return trainer

    whole = run("whole")
    run("parts", callbacks=[Stop()])
    rest = run("parts", seed=8, resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    assert tiny.same_bits(rest.teacher.state_dict(), whole.teacher.state_dict())
    assert rest.teacher.average.updates == whole.teacher.average.updates == 9
    rows = [[r["train"]["terms"] for r in each.history.epochs] for each in (rest, whole)]
    assert rows[0] == rows[1]


def test_another_decay_is_another_run() -> None:
    first = distiller(tiny.make_student(), decay=0.9)
    first.step(BATCHES[0])
    state = copy.deepcopy(first.state_dict())
    with pytest.raises(
        CheckpointError, match=r"average with decay 0\.9 .*-> average with decay 0\.5"
    ):
        distiller(tiny.make_student(), decay=0.5).load_state_dict(state)


def test_it_is_a_member_of_an_ensemble() -> None:
    student, other = tiny.make_student(), tiny.make_teacher()
    teacher = Ensemble({"mean": MeanTeacher(student, 0.9), "other": other})
    run = Distiller(teacher, student, {"token": "token"}, **LOOP)
    before = tiny.weights_of(other)
    run.step(BATCHES[0])
    assert teacher.members["mean"].average.updates == 1
    assert tiny.same_bits(before, tiny.weights_of(other))
    state = copy.deepcopy(run.state_dict())
    again = tiny.make_student(seed=4)
    members = {"mean": MeanTeacher(again, 0.9), "other": other}
    resumed = Distiller(Ensemble(members), again, {"token": "token"}, **LOOP)
    resumed.load_state_dict(state)
    assert tiny.same_bits(resumed.teacher.state_dict(), teacher.state_dict())


def test_it_captions_and_is_saved_like_any_captioner(saveable: Make, tmp_path: Path) -> None:  # noqa: F811
    student = saveable()
    run = distiller(student)
    run.step(BATCHES[0])
    run.teacher.save(tmp_path)
    loaded = Captioner.load(tmp_path)
    assert tiny.same_bits(loaded.state_dict(), run.teacher.state_dict())
    captions = [model.generate(BATCHES[0])[0].text for model in (loaded, run.teacher)]
    assert captions[0] == captions[1]


def test_check_moves_nothing() -> None:
    run = distiller(tiny.make_student())
    run.step(BATCHES[0])
    before = tiny.weights_of(run.teacher)
    assert run.check().ok
    assert tiny.same_bits(before, tiny.weights_of(run.teacher))
    assert run.teacher.average.updates == 1


# -- what is refused --------------------------------------------------------------------------


def test_the_average_of_another_student_is_refused() -> None:
    teacher = MeanTeacher(tiny.make_student())
    with pytest.raises(ConfigError, match=r"average of another model than 'student'.*MeanTeacher"):
        Distiller(teacher, tiny.make_student(), {"token": "token"}, **LOOP)


def test_what_was_frozen_when_it_was_made_must_stay_so() -> None:
    student = tiny.make_student(trainable=False)
    run = distiller(student)
    student.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"student\.encoder\.conv\.weight"):
        run.step(BATCHES[0])


class WithHead(Captioner):
    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.extra = nn.Linear(1, 1)


def own_weights() -> Captioner:
    student = tiny.make_student()
    return WithHead(student.encoder, student.decoder, student.tokenizer)


@pytest.mark.parametrize(
    ("student", "decay", "message"),
    [
        (lambda: nn.Linear(1, 1), 0.9, "Linear was given as the student"),
        (tiny.make_student, 1.0, "decay"),
        (lambda: tiny.make_student().requires_grad_(False), 0.9, "every parameter is frozen"),
        (lambda: tiny.make_student().bfloat16(), 0.9, r"torch\.bfloat16.*would not move"),
        (own_weights, 0.9, "WithHead whose forward or weights"),
    ],
    ids=["linear", "decay", "frozen", "half", "own"],
)
def test_what_cannot_be_averaged_is_refused(student: Any, decay: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeanTeacher(student(), decay)


@pytest.mark.parametrize("make", [MeanTeacher.load, MeanTeacher.create])
def test_it_is_not_read_or_made_without_a_student(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"Captioner\.load"):
        make("anything", tokenizer=tiny.TOKENIZER)


def test_born_again_a_frozen_copy_of_the_student_is_a_teacher() -> None:
    student = tiny.make_student()
    run = Distiller(copy.deepcopy(student), student, {"token": "token"}, **LOOP)
    before = tiny.weights_of(run.teacher)
    for batch in BATCHES:
        row = run.step(batch)
    assert row["terms"]["token"]["raw"] > 0
    assert tiny.same_bits(before, tiny.weights_of(run.teacher))
