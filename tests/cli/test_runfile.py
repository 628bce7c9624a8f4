from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from capdistill.cli import make_parser
from capdistill.cli.runfile import DistillRun, TrainRun, override, parse_run, read_values
from capdistill.cli.train import make_run
from capdistill.errors import CapdistillError, ConfigError
from capdistill.training.recipes import recipe

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
        ({"train": 3}, "train: 3 is not a section"),
        ({"epochs": 3}, "'epochs' is an option of training. Write it as train.epochs"),
        ({"train": {"schedule": "cosine"}}, "given 'cosine'. Did you mean 'warmup_cosine'"),
        ({"train": {"errors": "skipp"}}, "'skipp'. Did you mean 'skip'. Available: raise, skip"),
        ({"student": {"preste": "x"}}, "student: .*'preste'.*Did you mean 'preset'"),
        ({"student": "debug_student"}, "write {\"preset\": 'debug_student'}"),
        ({"student": {}}, "student: no model was given. Give --student NAME"),
        ({"student": {"encoder": ["timm"]}}, "student.encoder: .* is not a component"),
        ({"student": {"decoder": {"dim": 1, "kwargs": {"dim": 2}}}}, "'dim' is given twice"),
        ({"losses": {"token": {"kwargs": {"temperature": 2}}}}, "losses.token.temperature=..."),
        ({"losses": {"token": 3}}, "losses.token: 3 is not a loss"),
        ({"losses": {"token": {"name": 3}}}, "losses.token.name: 3 is not the name"),
        ({"losses": ["token"]}, "losses: .*expected term -> loss"),
        ({"weights": {"token": "much"}}, "option 'weights.token"),
        ({"weights": {"token": True}}, "option 'weights.token"),
        ({"weights": {"token": -1}}, "option 'weights.token"),
        ({"weights": [1]}, "weights: .*expected term -> weight"),
        (
            {"train": {"epochs": True}},
            "'epochs' was given True: expected a whole number",
        ),
        ({"train": {"generation": {"beam_size": True}}}, "'beam_size' was given True"),
        ({"tokenizer": {"min_count": True}}, "tokenizer: option 'min_count' was given True"),
        ({"data": {"format": "sample", "limit": True}}, "option 'limit' was given True"),
        ({"tokenizer": {"min_count": 0}}, "tokenizer: option 'min_count' was given 0"),
        ({"tokenizer": {"name": "huggingface"}}, "tokenizer: name 'huggingface' needs path"),
        ({"tokenizer": {"name": "bert", "path": "x"}}, "'name' was given 'bert'"),
        ({"tokenizer": {"trim": False}}, "'trim' is an option of the tokenizer 'huggingface'"),
        (
            {"tokenizer": {"name": "huggingface", "path": "x", "max_size": 9}},
            "'max_size' is an option of the tokenizer 'words'",
        ),
        ({"teacher": None}, "teacher: no directory"),
        ({"teacher": 5}, r"'teacher' was given 5.*expected a directory, a list"),
        ({"teacher": ["a", 5]}, r"'teacher' was given .*expected a directory, a list"),
        ({"command": "train"}, "option 'command' was given 'train'"),
        ({"data": {}}, "data: .* names no data set. Give --data PATH"),
        ({"data": {"format": "flicker8k", "path": "x"}}, "Did you mean 'flickr8k'"),
        ({"data": {"format": "coco", "path": "x"}}, "format coco needs 'images'.*--images PATH"),
        ({"data": {"format": "flickr8k"}}, "format flickr8k needs 'path'.*--data PATH"),
        ({"data": {"format": "folder", "path": "x", "image": "y"}}, "no option 'image'"),
    ],
)
def test_what_a_run_file_cannot_hold_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapdistillError, match=message):
        parse_run(DistillRun, {**VALUES, **changes})


def test_a_resolved_run_reads_back_as_itself() -> None:
    values = {
        **VALUES,
        "losses": {"token": {"temperature": 2}, "soft": "token"},
        "weights": {"ce": [1, 0.5]},
        "student": {"encoder": {"name": "timm"}, "decoder": "lstm", "weights": False},
    }
    run = parse_run(DistillRun, values)
    assert parse_run(DistillRun, json.loads(run.model_dump_json())) == run
    assert run.weights == {"ce": (1, 0.5), "token": 0.7, "soft": 1.0}
    assert run.losses == {"token": {"name": "token", "temperature": 2}, "soft": {"name": "token"}}


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
def test_a_file_that_is_not_a_run_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_values(path)


def distil_run(*words: str) -> DistillRun:
    """The configuration of a command line over the sample."""
    base = ["distill", "--teacher", "t", "--student", "debug_student", "--data", "sample"]
    run = make_run(make_parser().parse_args([*base, *words]))
    assert isinstance(run, DistillRun)
    return run


DEFAULTS = distil_run()


def test_weights_may_adapt_or_follow_a_schedule() -> None:
    fade = {"schedule": "cosine", "first": 1.0, "last": 0.0}
    options = {"name": "gradnorm", "alpha": 0.5, "every": 5, "shared": None}
    weights = {**options, "ce": 0.5, "token": fade}
    values = {**VALUES, "losses": {"token": {"temperature": 2}}, "weights": weights}
    run = parse_run(DistillRun, values)
    assert run.weights == weights
    again = parse_run(DistillRun, run.model_dump())
    assert again.weights == weights
    assert type(again.weights["every"]) is int


def test_the_default_losses_and_weights_are_those_of_the_published_recipe() -> None:
    assert list(DEFAULTS.losses) == ["token", "feature", "hidden"]
    assert DEFAULTS.weights == {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}


@pytest.mark.parametrize(
    ("setting", "section", "changed"),
    [
        ("losses.token.temperature=2", "losses", {"token": {"name": "token", "temperature": 2}}),
        (
            "losses.hidden.project=false",
            "losses",
            {"hidden": {"name": "hidden", "project": False}},
        ),
        ("losses.feature.name=token", "losses", {"feature": {"name": "token"}}),
        ("losses.soft.name=token", "losses", {"soft": {"name": "token"}}),
        ("weights.token=1", "weights", {"token": 1.0}),
        ("weights.hidden=[0.2, 0]", "weights", {"hidden": (0.2, 0.0)}),
    ],
)
def test_a_setting_changes_only_what_it_names(setting: str, section: str, changed: Any) -> None:
    run = distil_run("--set", setting)
    expected = {**getattr(DEFAULTS, section), **changed}
    if "soft" in changed:
        assert run.weights == {**DEFAULTS.weights, "soft": 1.0}
    else:
        other = {"losses": "weights", "weights": "losses"}[section]
        assert getattr(run, other) == getattr(DEFAULTS, other)
    assert getattr(run, section) == expected
    assert (run.train, run.student) == (DEFAULTS.train, DEFAULTS.student)


def test_a_loss_set_to_null_is_left_out_with_its_weight(tmp_path: Path) -> None:
    run = distil_run("--set", "losses.hidden=null")
    assert list(run.losses) == ["token", "feature"]
    assert list(run.weights) == ["ce", "token", "feature"]
    path = tmp_path / "config.json"
    path.write_text(DEFAULTS.model_dump_json())
    again = distil_run("--config", str(path), "--set", "losses.hidden=null")
    assert (again.losses, again.weights) == (run.losses, run.weights)


def test_a_whole_section_of_losses_replaces_the_default() -> None:
    run = distil_run("--set", 'losses={"token": {"temperature": 2}}')
    assert run.losses == {"token": {"name": "token", "temperature": 2}}
    assert run.weights == {"ce": 0.3, "token": 0.7}


def test_the_losses_of_a_run_file_replace_those_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"losses": {"token": "token"}}))
    run = distil_run("--recipe", "kd_2024", "--config", str(path))
    assert list(run.losses) == ["token"]
    assert list(run.weights) == ["ce", "token"]
    again = distil_run("--recipe", "kd_2024", "--set", 'losses={"token": {}}')
    assert (again.losses, again.weights) == (run.losses, run.weights)


@pytest.mark.parametrize(
    "setting", ["student.decoder.hidden=64", "student.decoder.kwargs.hidden=64"]
)
def test_an_argument_of_a_preset_is_set_beside_its_others(setting: str) -> None:
    run = distil_run("--set", setting, "--set", "student.decoder.layers=2")
    assert run.student.preset == "debug_student"
    assert run.student.decoder is not None
    assert run.student.decoder.kwargs == {"hidden": 64, "layers": 2}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.epochs=3", 3),
        ("train.patience=null", None),
        ("train.flip=true", True),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.monitor=rouge_l", "rouge_l"),
        ('train.monitor="bleu_4"', "bleu_4"),
        ("train.device=cuda:1", "cuda:1"),
        ("train.cache_dir=2024", "2024"),
        ("data.limit=4", 4),
    ],
)
def test_values_have_the_type_of_their_key(setting: str, value: Any) -> None:
    section, _, key = setting.partition("=")[0].partition(".")
    read = getattr(getattr(distil_run("--set", setting), section), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("name", ["2024", "1e3", "true", "007"])
def test_a_directory_named_like_a_number_keeps_its_name(name: str) -> None:
    run = distil_run("--set", f"out={name}", "--set", f"teacher={name}")
    assert Path(run.out or "").name == Path(run.teacher).name == name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs=true", "expected a whole number"),
        ("train.epochs=three", "option 'epochs' was given 'three'"),
        ("weights.token=true", "weights.token"),
        ("weights.token=null", "weights.token"),
        ("train.generation.beam_size=true", "expected a whole number"),
        ("train.epoch=3", "train: there is no option 'epoch'.*Did you mean 'epochs'"),
        ("trian.epochs=3", "there is no option 'trian'.*Did you mean 'train'"),
        ("data.pth=x", "there is no option 'pth'"),
        ("student.decodr.hidden=3", "student: .*'decodr'.*Did you mean 'decoder'"),
        ("losses.token.kwargs.temperature=2", "Write losses.token.temperature=..."),
        ("weights=3", "weights: 3 is not a section"),
        ("losses=token", "losses: 'token' is not a section"),
        ("out.path=3", "option 'out'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_fix(setting: str, message: str) -> None:
    with pytest.raises(CapdistillError, match=message):
        distil_run("--set", setting)


def test_a_home_directory_is_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--out", "~/run", "--teacher", "~/t", "--tokenizer", "~/t", "--weights", "~/w.pt"]
    run = distil_run(*words, "--data", "~/d", "--format", "coco", "--images", "~/i")
    data = run.data.model_dump()
    assert run.student.weights == str(tmp_path / "w.pt")
    assert run.tokenizer is not None
    paths = [run.out, run.teacher, run.tokenizer.path, data["path"], data["images"]]
    assert paths == [str(tmp_path / name) for name in ("run", "t", "t", "d", "i")]
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_values("~/run.json")


@pytest.mark.parametrize(("role", "hidden"), [("teacher", 2), ("student", 1)])
def test_a_recipe_is_a_whole_run(role: str, hidden: int) -> None:
    base = ["--recipe", "flickr8k_small", "--data", "flickr8k", "--out", "o"]
    trained = make_run(make_parser().parse_args(["train", *base, "--role", role]))
    assert isinstance(trained, TrainRun)
    assert trained.tokenizer is not None
    assert trained.tokenizer.min_count == 5
    assert trained.model.decoder is not None
    assert trained.model.decoder.kwargs["layers"] == hidden
    distilled = make_run(make_parser().parse_args(["distill", *base, "--teacher", "t"]))
    assert isinstance(distilled, DistillRun)
    expected = recipe("flickr8k_small")
    losses, weights = expected.pop("losses"), expected.pop("weights")
    assert (distilled.losses, distilled.weights) == (losses, weights)
    for run in (trained, distilled):
        assert {key: getattr(run.train, key) for key in expected} == expected
    assert (distilled.student == trained.model) == (role == "student")
    changed = make_run(
        make_parser().parse_args(["distill", *base, "--teacher", "t", "--epochs", "2"])
    )
    assert changed.train == distilled.train.model_copy(update={"epochs": 2})


def test_another_preset_replaces_the_model_of_a_recipe_or_run_file() -> None:
    base = ["--recipe", "flickr8k_small", "--data", "flickr8k", "--teacher", "t"]
    run = make_run(make_parser().parse_args(["distill", *base, "--student", "debug_student"]))
    assert isinstance(run, DistillRun)
    assert (run.student.preset, run.student.encoder) == ("debug_student", None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"curriculum": "rarity"}, "expected an object with difficulty, "),
        ({"teacher_captions": "c.jsonl"}, "expected an object with path, "),
        ({"teacher_captions": {"path": "c.jsonl", "kep": "cider"}}, "Did you mean 'keep'?"),
    ],
)
def test_a_section_within_data_names_its_own_options(data: dict[str, Any], message: str) -> None:
    values = {"data": {"format": "sample", **data}, "model": {"preset": "debug_student"}}
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_run(TrainRun, {**values, "out": "run"})
