"""A recipe of several trainings of one student: order, resume, and errors that name the stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError, ConfigError
from capdistill.training import Uncertainty, run_stages
from tests.training import tiny_models as tiny

Make = Callable[..., cd.Captioner]
OPTIONS: dict[str, Any] = {**tiny.QUIET, "epochs": 2, "batch_size": 3, "learning_rate": 0.01}
CAPTIONS = {"beam_size": 2, "max_length": 5}
STAGES: list[dict[str, Any]] = [
    {"method": "train", "name": "cross-entropy", "epochs": 3},
    {"method": "distill", "captions": CAPTIONS, "losses": {"token": "token"}, "word_dropout": 0.2},
    {"method": "self_critical", "samples": 2, "weights": {"token": 0.1}},
]


class Interrupt:
    def __init__(self, trainer: type, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step(self, trainer: Any, row: Any) -> None:
        if type(trainer) is self.trainer and row["step"] == self.step:
            trainer.history.interrupted = True


def run(student: cd.Captioner, data: CaptionData, out: Path, **how: Any) -> Any:
    how = {"stages": STAGES, "teacher": tiny.make_teacher(), **how}
    return run_stages(student, data, data, out=out, **{**OPTIONS, **how})


def test_stages_follow_each_other_and_the_table_has_a_row_each(
    saveable: Callable[..., cd.Captioner], colours: CaptionData, tmp_path: Path
) -> None:
    table = run(saveable(), colours, tmp_path)
    assert [row.name for row in table.rows] == ["cross-entropy", "distill", "self_critical"]
    assert [row.directory for row in table.rows] == ["1-cross-entropy", "2-distill",
                                                     "3-self_critical"]  # fmt: skip
    assert [row.epochs for row in table.rows] == [3, 2, 2]
    assert str(table).split()[:3] == ["stage", "parameters", "epochs"]  # there is one student
    assert json.loads((tmp_path / "stages.json").read_text())["rows"][2]["stage"] == 3
    captions = (tmp_path / "2-distill.jsonl").read_text().splitlines()
    assert len(captions) >= len(colours)


def test_a_stage_begins_with_the_best_weights_of_the_one_before(
    saveable: Callable[..., cd.Captioner],
    colours: CaptionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    fit = cd.Trainer.fit

    def spy(self: Any, *data: Any, **how: Any) -> Any:
        begun.append(tiny.weights_of(self.captioner))
        return fit(self, *data, **how)

    monkeypatch.setattr(cd.Trainer, "fit", spy)
    run(saveable(), colours, tmp_path)
    for number, name in ((1, "1-cross-entropy"), (2, "2-distill")):
        best = cd.Captioner.load(tmp_path / name / "best")
        assert tiny.same_bits(begun[number], tiny.weights_of(best))


@pytest.mark.parametrize("stopped", [(cd.Trainer, 3), (cd.Distiller, 2), (cd.SelfCritical, 1)])
def test_an_interrupted_recipe_goes_on_where_it_was(
    stopped: tuple[type, int],
    saveable: Callable[..., cd.Captioner],
    colours: CaptionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = saveable()
    run(whole, colours, tmp_path / "whole")
    fit = cd.Trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(
            cd.Trainer, "fit", lambda *a, **k: fit(*a, callbacks=[Interrupt(*stopped)], **k)
        )
        with pytest.warns(UserWarning, match="Interrupted"):
            assert run(saveable(), colours, tmp_path / "parts").interrupted
    student = saveable()
    table = run(student, colours, tmp_path / "parts")
    assert not table.interrupted
    assert tiny.same_bits(tiny.weights_of(student), tiny.weights_of(whole))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages="),
        ("train", "stages="),
        ([{"epochs": 3}], "stage 1: method=None is unknown"),
        ([{"method": "distil"}], "distill"),
        ([{"method": "train", "name": "a/b"}], "cannot name a directory"),
        ([{"method": "train"}, {"method": "train", "epoch": 3}], "stage 2 .*epochs"),
        ([{"method": "train", "losses": {}}], "stage 1 .*'losses'.*'distill' and 'self_critical'"),
        ([{"method": "distill", "samples": 3}], "stage 1 .*'samples'.*'self_critical'"),
        ([{"method": "train", "caption": CAPTIONS}], "stage 1 .*Did you mean 'captions'"),
        ([{"method": "train", "teachers": None}], "stage 1 .*Did you mean 'teacher'"),
        ([{"method": "train", "teacher": tiny.make_teacher()}], "stage 1 .*no losses that read it"),
        (
            [{"method": "self_critical", "losses": {}, "teacher": tiny.make_teacher()}],
            "stage 1 .*no losses that read it",
        ),
        ([{"method": "self_critical", "word_dropout": 0.1}], "stage 1 .*word_dropout"),
        ([{"method": "train", "captions": {"beam_width": 2}}], "stage 1 .*beam_size"),
        ([{"method": "train", "captions": {"keep": "best"}}], "stage 1 .*keep='best'"),
        ([{"method": "train", "captions": True}], "stage 1 .*mapping"),
    ],
)
def test_a_wrong_stage_is_named_before_anything_is_trained(
    stages: Any, message: str, colours: CaptionData, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny.make_student(), colours, tmp_path / "out", stages=stages)
    assert not (tmp_path / "out").exists()


def test_the_options_of_all_stages_are_copied_for_each(
    saveable: Callable[..., cd.Captioner], colours: CaptionData, tmp_path: Path
) -> None:
    weights = Uncertainty({"ce": 0.5, "token": 0.5})
    stages = [{"method": "distill", "name": name, "losses": {"token": "token"}} for name in "ab"]
    table = run(saveable(), colours, tmp_path, stages=stages, weights=weights)
    assert [row.epochs for row in table.rows] == [2, 2]
    assert not weights.names  # the given object belongs to no trainer


def test_a_stage_that_learns_from_a_teacher_needs_one(colours: CaptionData, tmp_path: Path) -> None:
    own = {"method": "distill", "teacher": tiny.make_teacher(), "captions": CAPTIONS}
    for stage in ({"method": "distill"}, {"method": "train", "captions": CAPTIONS}, own):
        with pytest.raises(ConfigError, match="Give teacher="):
            run(tiny.make_student(), colours, tmp_path, stages=[stage], teacher=None)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (True, "expected a mapping"),
        ({"path": "captions.jsonl"}, "argument 'path'. Leave it out"),
        ({"beam_sise": 3}, "beam_size"),
        ({"keep": "cidr"}, "keep='cidr'"),
        ({"num_return": 9, "beam_size": 2}, "num_return=9"),
    ],
)
def test_captions_of_a_late_stage_are_checked_before_anything_is_trained(
    saveable: Make, colours: CaptionData, tmp_path: Path, captions: Any, message: str
) -> None:
    stages = [STAGES[0], {"method": "train", "name": "late", "captions": captions}]
    with pytest.raises(ConfigError, match=rf"stage 2 \('late'\): .*{message}"):
        run(saveable(), colours, tmp_path / "out", stages=stages)
    assert not (tmp_path / "out").exists()


def test_a_stage_that_cannot_go_on_is_named_and_goes_on_with_the_changes(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    run(saveable(), colours, tmp_path, stages=STAGES[:1])
    shorter = colours.subset(4)
    with pytest.raises(CheckpointError, match=r"stage 1 \('cross-entropy'\): .*accept_changes"):
        run(saveable(), shorter, tmp_path, stages=STAGES[:1])
    with pytest.warns(UserWarning, match="continues with changes"):
        table = run(saveable(), shorter, tmp_path, stages=STAGES[:1], accept_changes=True)
    assert table.rows[0].epochs == 3


def test_captions_come_from_the_cache_only_where_the_teacher_has_one(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def caption(teacher: Any, data: CaptionData, path: Path, **options: Any) -> CaptionData:
        given.append(options["cache_features"])
        return data

    monkeypatch.setattr("capdistill.training.stages.caption", caption)
    wrapped = cd.teachers.wrap(tiny.make_teacher(), lambda m, batch: m(batch), tiny.TOKENIZER)
    for number, teacher in enumerate((tiny.make_teacher(trainable=False), wrapped)):
        for cached in (True, False):
            stages = [{"method": "train", "captions": CAPTIONS, "cache_features": cached}]
            options = {"teacher": teacher, "stages": stages, "cache_dir": tmp_path / "cache"}
            run(saveable(trainable=False), colours, tmp_path / f"{number}{cached}", **options)
    assert given == [True, False, False, False]


def test_what_cannot_caption_or_be_cached_is_refused_before_anything_is_trained(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    wrapped = cd.teachers.wrap(tiny.make_teacher(), lambda m, batch: m(batch), tiny.TOKENIZER)
    targets = cd.teachers.cache(tiny.make_teacher(), colours, tmp_path / "targets", **tiny.QUIET)
    captions = {**CAPTIONS, "cache_features": True}
    for teacher, message in ((targets, "cannot caption images"), (wrapped, "no encoder that can")):
        stages = [STAGES[0], {"method": "train", "name": "late", "captions": captions}]
        with pytest.raises(ConfigError, match=rf"stage 2 \('late'\): .*{message}"):
            run(saveable(), colours, tmp_path / "out", stages=stages, teacher=teacher)
    assert not (tmp_path / "out").exists()


def test_a_stage_whose_start_has_changed_is_refused_until_the_change_is_accepted(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    second = {"method": "train", "name": "second"}
    run(saveable(), colours, tmp_path, stages=[STAGES[0], second])
    before = tiny.weights_of(cd.Captioner.load(tmp_path / "2-second" / "best"))
    longer = [{**STAGES[0], "epochs": 4, "learning_rate": 0.1}, second]
    refused = pytest.raises(CheckpointError, match=r"stage 2 \('second'\): .*weights at the start")
    with pytest.warns(UserWarning, match="epochs 3 -> 4"), refused:
        run(saveable(), colours, tmp_path, stages=longer)
    with refused:
        run(saveable(), colours, tmp_path, stages=longer)
    after = tiny.weights_of(cd.Captioner.load(tmp_path / "2-second" / "best"))
    assert tiny.same_bits(before, after)
    with pytest.warns(UserWarning, match="weights at the start"):
        run(saveable(), colours, tmp_path, stages=longer, accept_changes=True)


def test_an_average_is_the_mean_of_the_weights_after_the_stages_that_it_names(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    stages = [*STAGES, {"method": "average", "of": ["distill", "self_critical"], "weights": [3, 1]}]
    student = saveable()
    table = run(student, colours, tmp_path, stages=stages)
    places = ("2-distill", "3-self_critical", "4-average")
    one, other, mean = (
        tiny.weights_of(cd.Captioner.load(tmp_path / place / "best")) for place in places
    )
    for name, value in mean.items():
        expected = 0.75 * one[name].double() + 0.25 * other[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)
    assert tiny.same_bits(mean, tiny.weights_of(student))
    last = table.rows[-1]
    assert (last.name, last.stage, last.directory, last.epochs) == ("average", 4, "4-average", 0)
    assert last.scores.keys() == table.rows[-2].scores.keys()
    again = saveable()
    assert run(again, colours, tmp_path, stages=stages).rows[-1] == last
    assert tiny.same_bits(mean, tiny.weights_of(again))


def test_the_average_of_one_stage_scores_as_that_stage(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    stages = [
        {"method": "train", "name": "first", "ema_decay": 0.5},
        {"method": "train", "name": "second", "learning_rate": 1.0},
        {"method": "average", "of": ["first"]},
    ]
    first, second, mean = run(saveable(), colours, tmp_path, stages=stages).rows
    assert mean.scores == first.scores
    assert mean.scores != second.scores


def test_an_average_has_no_ranges_of_8_bits(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    stages = [
        {"method": "train", "name": "first"},
        {"method": "train", "name": "second", "quantize": "int8"},
        {"method": "average", "of": ["first", "second"]},
    ]
    run(saveable(), colours, tmp_path, stages=stages)
    assert cd.Captioner.load(tmp_path / "2-second" / "best").activation_ranges is not None
    assert cd.Captioner.load(tmp_path / "3-average" / "best").activation_ranges is None


def test_training_goes_on_from_the_average(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    stages = [
        {"method": "train", "name": "a"},
        {"method": "train", "name": "b"},
        {"method": "average", "of": ["a", "b"]},
        {"method": "train", "name": "c", "learning_rate": 1e-12},
    ]
    run(saveable(), colours, tmp_path, stages=stages)
    mean, last = (
        tiny.weights_of(cd.Captioner.load(tmp_path / each / "best"))
        for each in ("3-average", "4-c")
    )
    for name, value in mean.items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-9)


def test_a_stage_may_have_its_own_teacher_and_data(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    common, own = tiny.make_teacher(), tiny.make_teacher(seed=5)
    stage = {"method": "distill", "losses": {"token": "token"}}
    few = colours.subset(4)
    students = saveable(), saveable()
    stages = [{**stage, "teacher": own, "train": few}]
    run(students[0], colours, tmp_path / "a", stages=stages, teacher=common)
    run_stages(
        students[1], few, colours, stages=[stage], teacher=own, out=tmp_path / "b", **OPTIONS
    )
    assert tiny.same_bits(*(tiny.weights_of(each) for each in students))
    no_common = run(saveable(), colours, tmp_path / "c", stages=stages, teacher=None)
    assert no_common.rows[0].epochs == 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "of=None was given.*distill"),
        ({"of": []}, r"of=\[\]"),
        ({"of": ["last"]}, r"of=\['last'\]"),
        ({"of": "distill"}, "of='distill'"),
        ({"of": ["distill"], "epochs": 3}, "epochs: an average trains nothing"),
        ({"of": ["distill"], "weights": [1, 2]}, r"weights=\[1, 2\].*1 numbers"),
        ({"of": ["distill"], "weights": [0]}, "a weight=0"),
    ],
)
def test_a_wrong_average_is_named_before_anything_is_trained(
    stage: dict[str, Any], message: str, colours: CaptionData, tmp_path: Path
) -> None:
    stages = [*STAGES, {"method": "average", **stage}]
    with pytest.raises(ConfigError, match=rf"stage 4 \('average'\): .*{message}"):
        run(tiny.make_student(), colours, tmp_path / "out", stages=stages)
    assert not (tmp_path / "out").exists()


def test_an_average_needs_a_stage_before_it(colours: CaptionData, tmp_path: Path) -> None:
    stages = [{"method": "average", "of": ["later"]}, {"method": "train", "name": "later"}]
    with pytest.raises(ConfigError, match=r"stage 1 .*earlier stages.*none"):
        run(tiny.make_student(), colours, tmp_path, stages=stages)
