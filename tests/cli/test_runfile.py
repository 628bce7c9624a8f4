from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capdistill.cli import make_parser
from capdistill.cli.runfile import DistillRun, TrainRun, override, parse_run, read_values
from capdistill.cli.train import make_run
from capdistill.errors import CapdistillError, ConfigError

VALUES: dict[str, Any] = {
    "data": {"format": "sample"},
    "teacher": "teacher",
    "student": {"preset": "debug_student"},
}


def test_flags_go_over_the_file_and_set_goes_over_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    train = {"epochs": 3, "batch_size": 4, "seed": 5}
    path.write_text(json.dumps({**VALUES, "train": train}))
    words = ["--config", str(path), "--epochs", "6", "--seed", "7", "--set", "train.seed=8"]
    run = make_run(make_parser().parse_args(["distill", *words]))
    assert (run.train.batch_size, run.train.epochs, run.train.seed) == (4, 6, 8)


def test_set_reads_json_and_otherwise_takes_the_text() -> None:
    settings = ["a.b=3", "a.c=[1, 0.5]", "a.d=null", "a.e=flickr8k", "a.f=x=y"]
    assert override({}, settings) == {
        "a": {"b": 3, "c": [1, 0.5], "d": None, "e": "flickr8k", "f": "x=y"}
    }


def test_override_leaves_what_it_was_given() -> None:
    values = {"train": {"epochs": 3}}
    override(values, ["train.epochs=4"])
    assert values == {"train": {"epochs": 3}}


@pytest.mark.parametrize("setting", ["epochs", "=3", "train..epochs=3", "teacher.path=3"])
def test_a_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        override(VALUES, [setting])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studnet": {}}, "no option 'studnet'.*Did you mean 'student'"),
        ({"train": {"epoch": 3}}, "train: there is no option 'epoch'.*Did you mean 'epochs'"),
        ({"train": 3}, "train: 3 is no section"),
        ({"student": {"preste": "x"}}, "student: .*'preste'.*Did you mean 'preset'"),
        ({"student": "debug_student"}, "write {\"preset\": 'debug_student'}"),
        ({"student": {}}, "student: no model was given. Give --student NAME"),
        ({"student": {"encoder": {"nam": "timm"}}}, "student.encoder: .*Did you mean 'name'"),
        ({"losses": {"token": {"temperature": 2}}}, "losses.token: .*'temperature'.*kwargs"),
        ({"losses": ["token"]}, "losses: .*expected term -> loss"),
        ({"weights": {"token": "much"}}, "option 'weights.token"),
        ({"tokenizer": {"min_count": 0}}, "tokenizer: option 'min_count' was given 0"),
        ({"teacher": None}, "teacher: no directory"),
        ({"command": "train"}, "option 'command' was given 'train'"),
        ({"data": {}}, "data: .* names no data set. Give --data DIR"),
        ({"data": {"format": "flicker8k", "path": "x"}}, "Did you mean 'flickr8k'"),
        ({"data": {"format": "coco", "path": "x"}}, "format coco needs 'images'.*--images PATH"),
        ({"data": {"format": "flickr8k"}}, "format flickr8k needs 'path'.*--data PATH"),
        ({"data": {"format": "folder", "path": "x", "image": "y"}}, "no option 'image'"),
    ],
)
def test_what_a_run_file_can_not_hold_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapdistillError, match=message):
        parse_run(DistillRun, {**VALUES, **changes})


def test_a_resolved_run_reads_back_as_itself() -> None:
    values = {
        **VALUES,
        "losses": {"token": {"kwargs": {"temperature": 2}}, "soft": "token"},
        "weights": {"ce": [1, 0.5]},
        "student": {"encoder": {"name": "timm"}, "decoder": "lstm", "weights": False},
    }
    run = parse_run(DistillRun, values)
    assert parse_run(DistillRun, json.loads(run.model_dump_json())) == run
    assert run.weights == {"ce": (1, 0.5)}


def test_paths_do_not_depend_on_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"format": "karpathy", "path": "k.json", "images": "~/images"}
    run = parse_run(TrainRun, {"data": data, "model": {"preset": "x"}, "out": "runs/t"})
    assert run.out == str(tmp_path / "runs" / "t")
    assert run.model_dump()["data"]["path"] == str(tmp_path / "k.json")
    assert run.model_dump()["data"]["images"] == str(Path.home() / "images")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_no_run_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_values(path)
