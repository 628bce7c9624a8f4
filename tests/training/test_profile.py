"""`fit(profile=True)`: the slow part has the largest share; without it nothing is wrapped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from capdistill import Distiller
from capdistill.losses import TokenKD
from capdistill.training import Callback
from tests.training import tiny_models as tiny

TRAIN = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]
VAL = [replace(tiny.make_batch([3, 1], first=9), references=(("dog",), ("a",)))]
PAUSE = 0.1


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*args: Any, **options: Any) -> Any:
        time.sleep(PAUSE)
        return function(*args, **options)

    return wait


def distilling(**options: Any) -> Distiller:
    losses = {"token": TokenKD(2.0)}
    options = {**tiny.QUIET, "epochs": 1, "log_every": 1, **options}
    return Distiller(tiny.make_teacher(), tiny.make_student(), losses=losses, **options)


def slow_teacher(distiller: Distiller) -> None:
    distiller.teacher.forward = slow(distiller.teacher.forward)


def slow_student(distiller: Distiller) -> None:
    distiller.student.forward = slow(distiller.student.forward)


def slow_losses(distiller: Distiller) -> None:
    loss = distiller.objective.losses["token"]
    loss.forward = slow(loss.forward)


def slow_backward(distiller: Distiller) -> None:
    parameter = next(p for p in distiller.student.parameters() if p.requires_grad)
    parameter.register_hook(slow(lambda gradient: gradient))


def slow_optimizer(distiller: Distiller) -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            time.sleep(PAUSE)
            return super().step(closure)

    distiller.make_optimizer = lambda groups: Slow(groups)


def slow_preparation(distiller: Distiller) -> None:
    distiller.prepare_batch = slow(distiller.prepare_batch)


def slow_validation(distiller: Distiller) -> None:
    distiller.score = slow(slow(slow(distiller.score)))


class SlowData:
    skipped = ()

    def __len__(self) -> int:
        return len(TRAIN)

    def epoch(self, n: int, start: int = 0) -> Iterator[Any]:
        for batch in TRAIN[start:]:
            time.sleep(PAUSE)
            yield batch


CASES = {
    "teacher": slow_teacher,
    "student": slow_student,
    "losses": slow_losses,
    "backward": slow_backward,
    "optimizer": slow_optimizer,
    "prepare_batch": slow_preparation,
    "validation": slow_validation,
}


@pytest.mark.parametrize("part", CASES)
def test_the_slow_part_has_the_largest_share(part: str) -> None:
    distiller = distilling()
    CASES[part](distiller)
    row = distiller.fit(TRAIN, VAL, profile=True).epochs[0]
    assert next(iter(row["profile"])) == part
    assert sum(row["profile"].values()) == pytest.approx(1)


def test_slow_data_are_the_largest_share() -> None:
    row = distilling().fit(SlowData(), profile=True).epochs[0]
    assert next(iter(row["profile"])) == "data"


def test_workers_that_are_slow_are_waited_for() -> None:
    source = SlowData()
    source.num_workers = 2  # type: ignore[attr-defined]
    row = distilling().fit(source, profile=True).epochs[0]
    assert next(iter(row["profile"])) == "waiting"


def test_a_profile_changes_no_weight_and_leaves_nothing_behind() -> None:
    plain, profiled = distilling(epochs=2), distilling(epochs=2)
    history = plain.fit(TRAIN, VAL)
    profiled.fit(TRAIN, VAL, profile=True)
    weights = zip(plain.student.parameters(), profiled.student.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert not any("profile" in row for row in history)
    assert set(vars(profiled)) == set(vars(plain))
    for module in (profiled.objective, profiled.student):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    class Fails(Callback):
        def on_step(self, trainer: Any, row: Any) -> None:
            raise RuntimeError("no")

    distiller = distilling()
    with pytest.raises(RuntimeError, match="no"):
        distiller.fit(TRAIN, profile=True, callbacks=[Fails()])
    assert vars(distiller).keys().isdisjoint({"step", "teacher_output", "validate"})
    assert not distiller.objective._forward_hooks


def test_the_shares_stand_below_the_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    distiller = distilling(progress=None)
    slow_teacher(distiller)
    distiller.fit(TRAIN, profile=True)
    lines = capsys.readouterr().err.splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("epoch"))
    assert lines[number + 1].startswith("  time    teacher ")
