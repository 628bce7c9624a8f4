"""A chain: each model learns from the one before it, in runs that an earlier call may have done."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData
from capdistill.data.loader import make_source
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels
from capdistill.tokenizer import WordTokenizer
from capdistill.training import ChainTable, History
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
OPTIONS: dict[str, Any] = {
    **tiny.QUIET,
    "losses": {"token": "token", "feature": "feature"},
    "batch_size": 2,
    "epochs": 2,
    "learning_rate": 0.01,
    "save_every": 1,
}


def models(make: Make, seed: int = 1) -> list[Any]:
    """A teacher, an assistant and a student; only the teacher is the same for every seed."""
    assistant, student = make(seed, dropout=0.2), make(seed + 1, dim=4)
    assistant.name, student.name = "the assistant", "small"
    return [tiny.make_teacher(), assistant, student]


def chain(given: Any, data: CaptionData, out: Path, **options: Any) -> ChainTable:
    return cd.distill_chain(given, data, data, out=out, **{**OPTIONS, **options})


class Killed(BaseException):
    """As if the process ended here: nothing is saved."""


@contextmanager
def steps(monkeypatch: pytest.MonkeyPatch, end: Any = None, at: int = 0) -> Iterator[list[str]]:
    """The students of the steps that are made; `end` is called after one of them."""
    made: list[str] = []
    step = Distiller.step

    def counted(self: Distiller, *batches: Any) -> Any:
        if len(made) == at and end is Killed:
            raise Killed
        row = step(self, *batches)
        made.append(self.student.name)
        if len(made) == at and end is not None and end is not Killed:
            end()
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "step", counted)
        yield made


def test_a_chain_is_one_distillation_after_the_other(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    teacher, assistant, student = models(saveable)
    table = chain([teacher, assistant, student], colours, tmp_path / "chain")
    again = models(saveable)
    for number in (1, 2):
        Distiller(again[number - 1], again[number], **OPTIONS).fit(
            colours, colours, out=tmp_path / f"{number}"
        )
    for ours, theirs in zip((assistant, student), again[1:], strict=True):
        assert tiny.same_bits(ours.state_dict(), theirs.state_dict())
    runs = [History.load(tmp_path / f"{number}" / "history.jsonl") for number in (1, 2)]
    assert [row.scores for row in table.rows[1:]] == [run.best["scores"] for run in runs]
    assert [row.best_epoch for row in table.rows[1:]] == [run.best["epoch"] + 1 for run in runs]
    directories = [row.directory for row in table.rows]
    assert directories == [None, "1-the-assistant", "2-small"]
    loaded = Captioner.load(tmp_path / "chain" / "2-small" / "best")
    assert tiny.same_bits(loaded.state_dict(), student.state_dict())


@pytest.mark.parametrize("step", [0, 1, 4, 6, 8, 11])  # of three an epoch, two epochs a stage
def test_a_killed_chain_goes_on_at_the_incomplete_stage(
    saveable: Make,
    colours: CaptionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    whole = models(saveable)
    table = chain(whole, colours, tmp_path / "whole")
    with steps(monkeypatch, Killed, step), pytest.raises(Killed):
        chain(models(saveable), colours, tmp_path / "parts")
    rest = models(saveable)
    if step > 6:  # where the assistant is done, its first weights do not matter
        rest[1] = models(saveable, seed=50)[1]
    with steps(monkeypatch) as made:
        resumed = chain(rest, colours, tmp_path / "parts")
    assert made == ["the assistant"] * max(6 - step, 0) + ["small"] * min(12 - step, 6)
    for ours, theirs in zip(rest[1:], whole[1:], strict=True):
        assert tiny.same_bits(ours.state_dict(), theirs.state_dict())
    assert timeless(resumed) == timeless(table)


def timeless(table: ChainTable) -> Any:
    return [{**row, "seconds": 0} for row in table.to_json()["rows"]]


def test_a_complete_chain_is_loaded(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = models(saveable)
    table = chain(given, colours, tmp_path)
    other = models(saveable, seed=50)
    seen = other[0].encoder.seen

    def generate(*_: Any) -> Any:
        raise AssertionError("the scores of the teacher are known")

    monkeypatch.setattr(other[0], "generate", generate)
    with steps(monkeypatch) as made:
        assert timeless(chain(other, colours, tmp_path)) == timeless(table)
    assert made == []
    assert other[0].encoder.seen - seen <= 8  # what tries the models
    for ours, theirs in zip(other[1:], given[1:], strict=True):
        assert tiny.same_bits(ours.state_dict(), theirs.state_dict())
    with steps(monkeypatch) as made, pytest.warns(UserWarning, match="epochs 2 -> 3"):
        longer = chain(other, colours, tmp_path, stages=[{}, {"epochs": 3}])
    assert made == ["small"] * 3
    assert [row.epochs for row in longer.rows] == [0, 2, 3]


def test_ctrl_c_ends_the_chain_where_it_is(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c() -> None:
        signal.raise_signal(signal.SIGINT)

    with steps(monkeypatch, ctrl_c, 2), pytest.warns(UserWarning, match="Interrupted"):
        table = chain(models(saveable), colours, tmp_path)
    assert table.interrupted
    assert [row.name for row in table.rows] == ["teacher", "the assistant"]
    assert json.loads((tmp_path / "chain.json").read_text())["interrupted"] is True
    assert not chain(models(saveable), colours, tmp_path).interrupted


def test_resuming_needs_the_first_stage_alone(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="1-the-assistant"):
        chain(models(saveable), colours, tmp_path, resume=True)
    with steps(monkeypatch, Killed, 4), pytest.raises(Killed):
        chain(models(saveable), colours, tmp_path)
    with steps(monkeypatch) as made:
        chain(models(saveable), colours, tmp_path, resume=True)
    assert made == ["the assistant"] * 2 + ["small"] * 6


def test_a_stage_of_another_chain_is_not_continued(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    chain(models(saveable), colours, tmp_path, epochs=1)
    given = models(saveable)
    with pytest.raises(CheckpointError, match="teacher 1"):
        chain([tiny.make_teacher(9), *given[1:]], colours, tmp_path, epochs=1)
    losses = {"token": {"name": "token", "temperature": 2.0}, "feature": "feature"}
    with pytest.raises(CheckpointError, match=r"losses\.token"):
        chain(models(saveable), colours, tmp_path, epochs=1, losses=losses)
    with pytest.raises(ConfigError, match="holds the results of an earlier run"):
        chain(models(saveable), colours, tmp_path, epochs=1, resume=False)
    other = [tiny.make_teacher(9), *models(saveable)[1:]]
    table = chain(other, colours, tmp_path, epochs=1, overwrite=True)
    assert table.rows[0].scores == scores_of(other[0], colours)


def scores_of(captioner: Captioner, data: CaptionData) -> dict[str, float]:
    source = make_source(data, captioner.tokenizer, image_size=8, train=False, batch_size=4)
    return Trainer(captioner, **tiny.QUIET).validate(source)[1]


def test_the_table_says_what_each_model_is_and_scores(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    teacher, assistant, student = models(saveable)
    table = chain([teacher, assistant, student], colours, tmp_path)
    assert [row.parameters for row in table.rows] == [
        sum(p.numel() for p in model.parameters()) for model in (teacher, assistant, student)
    ]
    assert table.rows[0].scores == scores_of(teacher, colours)
    for row, model in zip(table.rows[1:], (assistant, student), strict=True):
        assert row.scores == scores_of(model, colours)
    written = json.loads((tmp_path / "chain.json").read_text())
    assert {key: written[key] for key in ("format", "interrupted", "rows")} == table.to_json()
    head, *lines = str(table).splitlines()
    assert head.split()[:3] == ["model", "parameters", "of"]
    assert [line.split("  ")[0] for line in lines] == ["teacher", "the assistant", "small"]
    assert f"{table.rows[2].scores['bleu_4']:.4f}" in lines[2]


def test_without_validation_data_there_are_no_scores(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    table = cd.distill_chain(models(saveable), colours, out=tmp_path, **{**OPTIONS, "epochs": 1})
    assert [dict(row.scores) for row in table.rows] == [{}] * 3
    assert [row.best_epoch for row in table.rows] == [None] * 3


def test_options_may_differ_by_stage(saveable: Make, colours: CaptionData, tmp_path: Path) -> None:
    soft = cd.TokenKD(temperature=2.0)
    stages: list[dict[str, Any]] = [
        {"epochs": 1, "weights": {"ce": 0.0, "soft": 1.0}},
        {"losses": {"hidden": cd.HiddenKD()}},
    ]
    chain(models(saveable), colours, tmp_path, losses={"soft": soft}, stages=stages)
    runs = [json.loads((path / "run.json").read_text()) for path in sorted(tmp_path.glob("?-*"))]
    assert [run["config"]["epochs"] for run in runs] == [1, 2]
    assert [list(run["losses"]) for run in runs] == [["soft"], ["hidden"]]
    assert runs[0]["weights"] == {"soft": 1.0}
    assert not list(stages[1]["losses"]["hidden"].parameters())  # each stage builds a copy


def test_the_first_teacher_may_be_several(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    teachers = {"one": tiny.make_teacher(), "other": tiny.make_teacher(7, dim=4)}
    _, assistant, student = models(saveable)
    losses = {"soft": "token", "own": {"name": "feature", "teacher": "other"}}
    stages: list[dict[str, Any]] = [{}, {"losses": {"soft": "token"}}]
    table = chain(
        [teachers, assistant, student], colours, tmp_path, losses=losses, stages=stages, epochs=1
    )
    assert table.rows[0].name == "ensemble of 2: one, other"
    assert table.rows[0].scores == pytest.approx(scores_of_mixture(teachers, colours))


def scores_of_mixture(teachers: Any, data: CaptionData) -> dict[str, float]:
    ensemble = cd.teachers.Ensemble(teachers)
    texts = dict(
        zip(data.image_ids, ensemble.caption([e.path for e in data.examples]), strict=True)
    )
    scorer = cd.metrics.CaptionScorer(data.references, metrics=["bleu", "cider_d"])
    return dict(scorer(texts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a, s: [t], r"Give \[teacher, assistant, student\]"),
        (lambda t, a, s: t, r"Give \[teacher, assistant, student\]"),
        (lambda t, a, s: [t, torch.nn.Linear(1, 1), s], "captioners to train"),
        (lambda t, a, s: [t, a, a], "stands in the chain twice"),
        (lambda t, a, s: ["teacher", a, s], "The teacher is str"),
    ],
)
def test_models_that_make_no_chain_are_refused(
    saveable: Make, colours: CaptionData, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(change(*models(saveable)), colours, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [{}]}, r"for 2 stages. Expected a list of 2 mappings"),
        ({"stages": {"epochs": 1}}, r"for 2 stages"),
        ({"stages": [{}, {"epoch": 3}]}, r"stage 2 \('small'\).*epoch.*Did you mean"),
        ({"losses": {"soft": "tokn"}}, r"stage 1 \('the assistant'\).*Did you mean 'token'"),
    ],
)
def test_a_bad_option_names_its_stage(
    saveable: Make, colours: CaptionData, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(models(saveable), colours, tmp_path, **options)


def test_all_stages_are_checked_before_the_first_begins(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    teacher, assistant, student = models(saveable)
    student.tokenizer = WordTokenizer(["red", "lime", "blue", "a", "cat", "dog"])
    with pytest.raises(IncompatibleModels, match=r"stage 2 \('small'\).*the vocabularies differ"):
        chain([teacher, assistant, student], colours, tmp_path)
    assert list(tmp_path.glob("?-*")) == []


def test_a_stage_that_cannot_go_on_is_named_and_goes_on_with_the_changes(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    chain(models(saveable), colours, tmp_path, epochs=1)
    other = [tiny.make_teacher(9), *models(saveable)[1:]]
    with pytest.raises(CheckpointError, match=r"stage 1 \('.*'\): .*accept_changes"):
        chain(other, colours, tmp_path, epochs=1)
    with pytest.warns(UserWarning, match="continues with changes"):
        table = chain(other, colours, tmp_path, epochs=1, accept_changes=True)
    assert len(table.rows) == len(other)
