"""What a trainer refuses before the first step, and what stays out of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData, Splits
from capdistill.errors import ConfigError, DataError, NotFiniteLoss, UnknownName
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch
from tests.training import tiny_models as tiny

QUIET = {**tiny.QUIET, "schedule": "constant", "learning_rate": 0.05}
TRAIN = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]


# -- nothing of the teacher is trained ---------------------------------------------------------


class WithTeacher(DistillationLoss):
    """A loss that holds (a part of) the teacher, from the start or once it is built."""

    def __init__(self, teacher: Captioner, how: str) -> None:
        super().__init__()
        self.how, self.hidden = how, (teacher,)  # a tuple hides it from nn.Module
        self.own = nn.Parameter(torch.ones(()))
        if how == "whole":
            self.teacher = teacher
        elif how == "part":
            self.head = teacher.decoder.output
        elif how == "memory":
            self.weight = nn.Parameter(teacher.decoder.output.weight.data)
        elif how == "view":
            self.weight = nn.Parameter(teacher.decoder.output.weight.data[:2])

    def build(self, student: Any, teacher: Any) -> None:
        if self.how == "build":
            self.head = self.hidden[0].decoder.output

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        used = self.hidden[0].decoder.output.weight.sum() + self.own
        return used * student.logits.square().mean(-1)[batch.target_mask].sum()


@pytest.mark.parametrize("how", ["whole", "part", "memory", "view", "build"])
def test_a_loss_that_would_train_the_teacher_is_refused_by_name(how: str) -> None:
    teacher = tiny.make_teacher()
    loss = WithTeacher(teacher, how)
    with pytest.raises(ConfigError, match=r"losses\.mine\.\w+.*deepcopy.*requires_grad_\(False\)"):
        Distiller(teacher, tiny.make_student(), losses={"mine": loss}, **QUIET)


def test_a_loss_that_uses_a_frozen_teacher_trains_only_its_own_parameters() -> None:
    teacher = tiny.make_teacher(dropout=0.5, norm=True).requires_grad_(False)
    loss = WithTeacher(teacher, "whole")
    distiller = Distiller(teacher, tiny.make_student(), losses={"mine": loss}, **QUIET)
    before = tiny.weights_of(teacher)
    distiller.fit(TRAIN, TRAIN, epochs=2)
    assert tiny.same_bits(before, tiny.weights_of(teacher))
    trained = {id(p) for group in distiller.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    assert id(loss.own) in trained
    assert loss.own.item() != 1.0


def test_a_teacher_unfrozen_within_a_loss_is_refused_at_the_next_start() -> None:
    teacher = tiny.make_teacher().requires_grad_(False)
    losses = {"mine": WithTeacher(teacher, "part")}
    distiller = Distiller(teacher, tiny.make_student(), losses=losses, **QUIET)
    teacher.requires_grad_(True)
    for start in (lambda: distiller.step(*TRAIN), lambda: distiller.fit(TRAIN, epochs=1)):
        with pytest.raises(ConfigError, match=r"losses\.mine\.head\.weight"):
            start()


def test_a_student_whose_parameters_lie_in_the_teachers_memory_is_refused() -> None:
    teacher, student = tiny.make_teacher(dim=6), tiny.make_student()
    student.encoder.conv.weight = nn.Parameter(teacher.encoder.conv.weight.data)
    with pytest.raises(ConfigError, match=r"student\.encoder\.conv\.weight"):
        Distiller(teacher, student, **QUIET)


# -- gradients that are not finite ---------------------------------------------------------------


class BadGradient(DistillationLoss):
    """A finite value whose gradient is not finite, from a given call on."""

    def __init__(self, first: int, last: int, kind: str) -> None:
        super().__init__()
        self.calls, self.first, self.last, self.kind = 0, first, last, kind

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        self.calls += self.training
        total: Tensor = student.logits.sum() * 0.0
        if not self.training or not self.first <= self.calls <= self.last:
            return total
        return total.sqrt() if self.kind == "nan" else total.abs().add(1e-30).sqrt() * 1e30


def scaled(first: int, last: int, kind: str) -> Distiller:
    losses, weights = {"mine": BadGradient(first, last, kind)}, {"ce": 1, "mine": 1}
    pair = tiny.make_teacher(), tiny.make_student()
    distiller = Distiller(*pair, losses=losses, weights=weights, **QUIET)
    place = distiller.place

    def placed() -> None:  # what a CUDA device does in fp16
        place()
        distiller.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    distiller.place = placed  # type: ignore[method-assign]
    distiller.place()
    return distiller


def test_loss_scaling_excuses_a_few_steps_in_a_row_not_a_run() -> None:
    distiller = scaled(3, 10**6, "nan")
    with pytest.raises(NotFiniteLoss, match=r"Step 12 .*the gradient is nan for 10 steps in a row"):
        distiller.fit(TRAIN * 10, epochs=1, log_every=1)
    assert [row["skipped_steps"] for row in distiller.history.steps] == [0, 0, *range(1, 10)]
    assert distiller.scaler.get_scale() > 0


@pytest.mark.parametrize("last", [3, 9])
def test_skipped_steps_are_in_the_history_and_training_continues(last: int) -> None:
    distiller = scaled(1, last, "nan")
    before = tiny.weights_of(distiller.captioner)
    history = distiller.fit(TRAIN * 6, epochs=1, log_every=1)
    assert history.epochs[0]["skipped_steps"] == last
    assert [row["skipped_steps"] for row in history.steps] == [
        *range(1, last + 1),
        *[0] * (12 - last),
    ]
    assert distiller.schedule.last_epoch == 12 - last
    assert not tiny.same_bits(before, tiny.weights_of(distiller.captioner))


def test_skipped_steps_in_a_row_are_counted_across_a_resumed_run() -> None:
    distiller = scaled(1, 10**6, "nan")
    for _ in range(6):
        distiller.step(*TRAIN)
    again = scaled(1, 10**6, "nan")
    again.load_state_dict(distiller.state_dict())
    for _ in range(3):
        again.step(*TRAIN)
    with pytest.raises(NotFiniteLoss, match="10 steps in a row"):
        again.step(*TRAIN)


# -- several processes ------------------------------------------------------------------------


def test_several_processes_that_cannot_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    trainer = Trainer(tiny.make_student(), **QUIET)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .*RANK, MASTER_ADDR, MASTER_PORT is not"):
        trainer.fit(TRAIN)
    assert trainer.step_count == 0
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='two' .*whole number"):
        trainer.fit(TRAIN)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert trainer.fit(TRAIN, epochs=1).epochs


# -- arguments of another kind -------------------------------------------------------------------


def test_a_list_of_losses_or_weights_is_refused_with_an_example() -> None:
    pair = tiny.make_teacher(), tiny.make_student()
    for losses in (["token"], "token", cd.TokenKD()):
        with pytest.raises(ConfigError, match=r'losses: .*losses=\{"token": "token"\}'):
            Distiller(*pair, losses=losses)  # type: ignore[arg-type]
    for weights in ([0.5], 0.5, "ce"):
        with pytest.raises(ConfigError, match=r"weights: .*mapping"):
            Distiller(*pair, weights=weights)  # type: ignore[arg-type]


def test_only_a_captioner_can_be_trained() -> None:
    model = tiny.make_teacher()
    wrapped = cd.teachers.wrap(model, lambda m, batch: m(batch), tiny.TOKENIZER)
    for wrong in (wrapped, nn.Linear(1, 1), None, "student"):
        with pytest.raises(ConfigError, match=r"Trainer was given \w+ to train.*teachers: wrap"):
            Trainer(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"Distiller was given \w+ to train"):
            Distiller(tiny.make_teacher(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("teacher", [None, "runs/teacher", nn.Linear(1, 1), tiny.make_teacher])
def test_what_is_no_teacher_is_refused_with_the_fix(teacher: Any) -> None:
    with pytest.raises(ConfigError, match=r"The teacher is .*teachers\.wrap"):
        Distiller(teacher, tiny.make_student())


def test_a_whole_data_set_is_refused_with_the_names_of_its_splits(colours: CaptionData) -> None:
    splits = Splits({"train": colours, "val": colours})
    trainer = Trainer(tiny.make_student(), **QUIET)
    for data in ((splits,), (colours, splits)):
        with pytest.raises(ConfigError, match=r"data\.train.*data\.val"):
            trainer.fit(*data)
    assert trainer.step_count == 0


@pytest.mark.parametrize(
    "callbacks", [SimpleNamespace(on_step=print), [3], [SimpleNamespace], [SimpleNamespace()], None]
)
def test_callbacks_that_no_event_reaches_are_refused(callbacks: Any) -> None:
    trainer = Trainer(tiny.make_student(), **QUIET)
    with pytest.raises(ConfigError, match=r"callbacks=.*on_fit_start, on_step, on_epoch"):
        trainer.fit(TRAIN, callbacks=callbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": True}, "'epochs' was given True"),
        ({"epochs": "three"}, "'epochs' was given 'three'"),
        ({"epochs": 2.5}, "'epochs' was given 2.5"),
        ({"learning_rate": True}, "'learning_rate' was given True"),
        ({"learning_rate": float("inf")}, "'learning_rate' was given inf"),
        ({"learning_rate": float("nan")}, "'learning_rate' was given nan"),
        ({"max_grad_norm": float("inf")}, "'max_grad_norm' was given inf"),
        ({"seed": True}, "'seed' was given True"),
        ({"seed": 2**70}, "'seed' was given"),
        ({"metrics": 3}, "'metrics' was given 3"),
        ({"monitor": 3}, "'monitor' was given 3"),
        ({"save_every": True}, "'save_every' was given True: expected a number of steps"),
        ({"save_every": "10 minutes"}, "such as 500, or a time in s, min or h, such as '10min'"),
        ({"save_every": "0s"}, "'save_every' was given '0s': expected"),
        ({"save_every": 0}, "'save_every' was given 0: expected"),
        ({"save_every_steps": 5}, "Did you mean 'save_every'"),
        ({"keep": 0}, "'keep' was given 0"),
        ({"beam_size": True}, "beam_size"),
        ({"lerning_rate": 0.1}, "Did you mean 'learning_rate'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_of_another_kind_are_refused_wherever_they_are_given(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"Trainer.*{message}"):
        Trainer(tiny.make_student(), **options)
    trainer = Trainer(tiny.make_student(), **QUIET)
    before = trainer.config
    with pytest.raises(ConfigError, match=rf"Trainer\.fit.*{message}"):
        trainer.fit(TRAIN, **options)
    assert trainer.config is before
    assert trainer.step_count == 0


def test_unknown_metrics_are_refused_before_the_first_step() -> None:
    trainer = Trainer(tiny.make_student(), **QUIET, metrics=["bleu", "cidre"])
    with pytest.raises(UnknownName, match="cidre"):
        trainer.fit(TRAIN, TRAIN)
    assert trainer.step_count == 0


# -- validation images are told apart ---------------------------------------------------------


def renamed(batch: Batch, *ids: str) -> Batch:
    return Batch(**{**vars(batch), "image_ids": ids})


class Named(list[Any]):
    """A data set of pairs with ids of its own."""

    image_ids = ("x", "x", "y")


class Once:
    """Batches that are made when they are read."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def test_an_image_id_that_occurs_twice_in_validation_is_refused_by_name() -> None:
    twice = [renamed(TRAIN[0], "x", "y"), renamed(TRAIN[1], "z", "x")]
    trainer = Trainer(tiny.make_student(), **QUIET)
    with pytest.raises(DataError, match="id 'x' occurs twice"):
        trainer.fit(TRAIN, twice)
    assert trainer.step_count == 0  # a list is looked at before the run
    with pytest.raises(DataError, match="id 'x' occurs twice"):
        trainer.fit(TRAIN, Once(*twice))
    pairs = Named([(torch.zeros(3, 8, 8, dtype=torch.uint8), "a red dog")] * 3)
    with pytest.raises(DataError, match="'x'"):
        trainer.fit(TRAIN, pairs)


# -- what the caller has set for all of torch -----------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
def test_a_fit_is_the_same_whatever_surrounds_it(around: Callable[[], Any]) -> None:
    plain, student = (tiny.make_student(seed=3) for _ in range(2))
    Trainer(plain, **QUIET).fit(TRAIN, TRAIN, epochs=2)
    trainer, state = Trainer(student, **QUIET), torch.get_rng_state()
    with around():
        trainer.fit(TRAIN, TRAIN, epochs=2)
    assert tiny.same_bits(tiny.weights_of(plain), tiny.weights_of(student))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_cannot_be_trained_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"float16 \(encoder.*captioner\.float\(\)"):
        Trainer(tiny.make_student().half(), **QUIET)
    with torch.inference_mode():
        student = tiny.make_student()
    with pytest.raises(ConfigError, match=r"encoder.*under torch\.inference_mode\(\)"):
        Trainer(student, **QUIET)
    with pytest.raises(ConfigError, match=r"device 'meta'.*no values"):
        Trainer(tiny.make_student().to("meta"), **QUIET)
