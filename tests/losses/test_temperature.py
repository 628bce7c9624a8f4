"""A temperature that changes over the run: numbers, pairs and functions of the progress."""

from __future__ import annotations

import json

import pytest
import torch

import capdistill as cd
from capdistill.errors import ConfigError
from capdistill.losses.base import check_schedule, scheduled
from capdistill.training.run_directory import options_of
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output
from tests.training import tiny_models as tiny

LOSSES = ["token", "reverse_kl", "jsd", "decoupled", "top_k", "dist"]
each_loss = pytest.mark.parametrize("name", LOSSES)


def value(loss, progress=0.0):
    batch = make_batch([3, 1, 2, 3])
    loss.build(STUDENT, TEACHER)
    loss.progress = progress
    return loss(make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2), batch).item()


@each_loss
@pytest.mark.parametrize(("progress", "temperature"), [(0.0, 8.0), (0.25, 6.5), (1.0, 2.0)])
def test_a_pair_is_interpolated_linearly_over_the_run(name, progress, temperature):
    torch.manual_seed(0)
    expected = value(cd.losses.create(name, temperature=temperature))
    torch.manual_seed(0)
    assert value(cd.losses.create(name, temperature=[8, 2]), progress) == expected


@each_loss
def test_a_function_is_asked_at_the_progress_of_the_run(name):
    def steps(progress):
        return 1.0 if progress < 0.5 else 3.0

    for progress, temperature in ((0.2, 1.0), (0.5, 3.0)):
        torch.manual_seed(0)
        expected = value(cd.losses.create(name, temperature=temperature))
        torch.manual_seed(0)
        assert value(cd.losses.create(name, temperature=steps), progress) == expected


@each_loss
@pytest.mark.parametrize(
    "temperature",
    [0, -1.0, float("nan"), float("inf"), "4", None, True, (1, 2, 3), [4], (4.0, 0.0), ("1", 2)],
)
def test_what_cannot_be_a_temperature_is_refused_by_name(name, temperature):
    kind = cd.losses.get(name).__name__
    with pytest.raises(ConfigError, match=rf"^{kind}: temperature is .*; give a finite number > 0"):
        cd.losses.create(name, temperature=temperature)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), None, "hot"])
def test_a_function_that_gives_no_temperature_is_named_with_its_value(wrong):
    loss = cd.TokenKD(lambda progress: wrong)
    with pytest.raises(ConfigError, match=r"TokenKD: temperature gave .* at 40% of the run; give"):
        value(loss, 0.4)


def test_zero_is_allowed_where_a_schedule_need_not_be_positive():
    assert check_schedule("weights: 'ce'", [1, 0]) == (1.0, 0.0)
    assert scheduled("weights: 'ce'", lambda progress: 0, 0.5) == 0.0


def test_the_progress_of_a_run_is_no_option_of_the_loss_but_its_temperature_is():
    def rising(progress):
        return 1 + progress

    loss = cd.TokenKD((8.0, 2.0))
    before = options_of(loss)
    loss.progress = 0.7
    assert options_of(loss) == before
    assert "temperature=(8.0, 2.0)" in before
    assert "rising" in options_of(cd.TokenKD(rising))


def test_a_run_follows_the_schedule_and_writes_it_down(tmp_path):
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
    seen = []

    def falling(progress):
        seen.append(progress)
        return 4 - 2 * progress

    losses = {
        "soft": {"name": "token", "temperature": [8, 2]},
        "mine": {"name": "token", "temperature": falling},
    }
    distiller = cd.Distiller(teacher, student, losses, progress=False, batch_size=4)
    seen.clear()
    distiller.fit(data.train.subset(8), epochs=2, out=tmp_path)
    assert sorted({*seen}) == [0.0, 0.25, 0.5, 0.75, 1.0]  # the last for the row of the epoch
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["losses"]["soft"] == {"name": "token", "temperature": [8, 2]}
    assert "falling" in run["losses"]["mine"]["temperature"]


def test_the_history_records_a_temperature_that_changes() -> None:
    batches = [tiny.make_batch([1, 2, 3], first=3 * i) for i in range(2)]
    losses = {"soft": {"name": "token", "temperature": [8, 2]}, "fixed": "token"}
    distiller = cd.Distiller(tiny.make_teacher(), tiny.make_student(), losses, **tiny.QUIET)
    history = distiller.fit(batches, epochs=2, log_every=1)
    expected = [{"soft": {"temperature": value}} for value in (8.0, 6.5, 5.0, 3.5)]
    assert [row["settings"] for row in history.steps] == expected
    assert [row["settings"]["soft"]["temperature"] for row in history.epochs] == [5.0, 2.0]
