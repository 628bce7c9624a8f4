"""`capdistill tune`: self-critical training on the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.cli import main, make_parser
from capdistill.cli.runfile import parse_run
from capdistill.cli.tune import TuneRun, make_run, read_reward
from capdistill.errors import ConfigError
from capdistill.teachers import Ensemble, load
from capdistill.training import History
from capdistill.training.config import SelfCriticalConfig
from tests.cli.cli_commands import TINY, final_weights, refused


def tune(student: Path, out: Path, *more: str) -> list[str]:
    """One epoch on six photos with two samples of each."""
    return ["tune", str(student), *TINY, "--samples", "2", "--out", str(out), *more]


def config_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "config.json").read_text())
    return values


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def planned(*words: str) -> TuneRun:
    """The configuration of a command line whose captioner is in the run file."""
    base = ["tune", "--data", "sample", "--set", "model.start=s"]
    return make_run(make_parser().parse_args([*base, *words]))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Path:
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("tuned")
    assert main(tune(student, out, "--epochs", "2")) == 0
    return out


# -- what it does -----------------------------------------------------------------------------


def test_the_command_trains_as_self_critical_does_in_python(student: Path, tuned: Path) -> None:
    data = cd.data.sample()
    parts = {"batch_size": 3, "samples": 2, "device": "cpu", "progress": False}
    trainer = cd.SelfCritical(cd.Captioner.load(student / "best"), **parts)  # type: ignore[arg-type]
    history = trainer.fit(data.train.subset(6), data.val.subset(6), epochs=2)
    rewards = [row["train"]["reward"] for row in history.epochs]
    written = History.load(tuned / "history.jsonl").epochs
    assert [row["train"]["reward"] for row in written] == rewards
    best = cd.Captioner.load(tuned / "best").state_dict()
    assert equal(trainer.captioner.state_dict(), best)
    assert not equal(cd.Captioner.load(student / "best").state_dict(), best)


def test_the_result_shows_the_reward_of_the_first_and_the_last_epoch(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(tune(student, out, "--epochs", "2")) == 0
    shown = capsys.readouterr()
    rewards = [row["train"]["reward"] for row in History.load(out / "history.jsonl").epochs]
    first, last = (f"{reward:.4f}" for reward in rewards)
    assert f"reward:    {first} in the first epoch, {last} in the last" in shown.out
    assert f"captioner: {out / 'best'}" in shown.out
    assert f"epoch 2/2  reward {rewards[1]:7.4f}" in shown.err
    assert f"next: capdistill caption {out}/best" in shown.err


def test_the_result_as_json(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(student, tmp_path, "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    (epoch,) = History.load(tmp_path / "history.jsonl").epochs
    reward = epoch["train"]["reward"]
    assert content["reward"] == {"first": reward, "last": reward}
    captioner = cd.Captioner.load(content["captioner"])
    assert captioner.num_parameters() == content["parameters"]


def test_the_run_file_runs_it_again(student: Path, tuned: Path, tmp_path: Path) -> None:
    command = ["tune", "--config", str(tuned / "config.json"), "--out", str(tmp_path)]
    assert main(command) == 0
    assert equal(final_weights(tuned), final_weights(tmp_path))
    written = config_of(tuned)
    assert written | {"out": None} == config_of(tmp_path) | {"out": None}
    assert written["command"] == "tune"
    assert written["model"] == {"start": str(student / "best")}
    assert (written["reward"], written["teacher"], written["losses"]) == ("cider_d", None, {})
    assert written["weights"] == {"ce": 0.0, "reward": 1.0}
    assert written["train"]["samples"] == 2


@pytest.mark.filterwarnings("default:The resumed run continues with other options")
def test_a_resumed_run_ends_like_one_that_was_not_stopped(
    student: Path, tuned: Path, tmp_path: Path
) -> None:
    assert main(tune(student, tmp_path)) == 0
    assert main(["tune", "--resume", "--out", str(tmp_path), "--epochs", "2"]) == 0
    assert equal(final_weights(tuned), final_weights(tmp_path))


def test_a_teacher_and_a_weighted_reward(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--reward", "cider_d=1,bleu_4=0.5", "--teacher", str(teacher)]
    more += ["--set", "weights.token=0.2", "--set", "losses.token.temperature=2"]
    assert main(tune(student, tmp_path, *more)) == 0
    assert "  reward  cider_d 1, bleu_4 0.5 of 2 samples per image\n" in capsys.readouterr().err
    written = config_of(tmp_path)
    assert written["reward"] == {"cider_d": 1.0, "bleu_4": 0.5}
    assert written["teacher"] == str(teacher / "best")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["trainer"] == "SelfCritical"
    assert run["losses"]["token"] == {"name": "token", "temperature": 2}
    assert run["weights"] == {"reward": 1.0, "token": 0.2}
    (epoch,) = History.load(tmp_path / "history.jsonl").epochs
    assert epoch["train"]["terms"]["token"]["weighted"] > 0


def test_several_teachers_are_an_ensemble(teacher: Path, student: Path, tmp_path: Path) -> None:
    assert main(tune(student, tmp_path, "--teacher", str(teacher), str(student))) == 0
    assert config_of(tmp_path)["teacher"] == [str(teacher / "best"), str(student / "best")]
    model = json.loads((tmp_path / "run.json").read_text())["models"][1]
    assert [member["name"] for member in model["members"]] == ["debug_teacher", "debug_student"]


def test_the_captioners_own_average_as_its_teacher(student: Path, tmp_path: Path) -> None:
    own = ["--set", "teacher.name=mean_teacher", "--set", "teacher.decay=0.9"]
    assert main(tune(student, tmp_path, *own)) == 0
    assert config_of(tmp_path)["teacher"] == {"name": "mean_teacher", "decay": 0.9}
    models = json.loads((tmp_path / "run.json").read_text())["models"]
    assert models[1]["name"] == f"mean of {models[0]['name']}"


@pytest.mark.filterwarnings("default")
def test_ctrl_c_saves_and_says_how_to_go_on(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = cd.SelfCritical.step

    def interrupted(self: cd.SelfCritical, *batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batches)

    monkeypatch.setattr(cd.SelfCritical, "step", interrupted)
    assert main(tune(student, tmp_path)) == 130
    assert capsys.readouterr().out == f"Interrupted. Continue with --resume --out {tmp_path}\n"


# -- the configuration ------------------------------------------------------------------------


def test_options_go_over_the_run_file_and_settings_over_options(tmp_path: Path) -> None:
    values = {"reward": {"cider_d": 1.0}, "train": {"samples": 3, "seed": 5, "epochs": 7}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    words = ["--config", str(path), "--samples", "4", "--reward", "bleu_4", "--seed", "6"]
    run = planned(*words, "--set", "train.seed=8", "--set", "train.dropout=true")
    assert (run.train.samples, run.train.seed, run.train.epochs) == (4, 8, 7)
    assert run.train.dropout
    assert run.reward == "bleu_4"


def test_the_defaults_are_those_of_python() -> None:
    run = planned()
    assert run.train == SelfCriticalConfig()
    assert (run.reward, run.losses) == ("cider_d", {})
    assert planned("--teacher", "t").losses == {"token": {"name": "token"}}
    assert planned("--teacher", "t").weights == {"ce": 0.0, "reward": 1.0, "token": 1.0}


@pytest.mark.parametrize(
    ("setting", "losses"),
    [
        ("losses.feature.match=pooled", ["token", "feature"]),
        ("losses.token=null", []),
        ('losses={"hidden": {}}', ["hidden"]),
    ],
)
def test_a_setting_changes_only_the_loss_that_it_names(setting: str, losses: list[str]) -> None:
    for teacher in (["--teacher", "t"], ["--set", "teacher=t"]):
        run = planned(*teacher, "--set", setting)
        assert [*run.losses] == losses
        assert [*run.weights] == ["ce", "reward", *losses]


@pytest.mark.parametrize("given", ["cider", "CIDEr", " cider_d "])
def test_a_score_has_its_usual_names(given: str) -> None:
    assert planned("--reward", given).reward == "cider_d"


def test_a_resolved_run_reads_back_as_itself() -> None:
    run = planned("--teacher", "t", "u", "--reward", "cider=1,rouge_l=2", "--samples", "3")
    assert parse_run(TuneRun, json.loads(run.model_dump_json())) == run


@pytest.mark.parametrize("text", ["cider_d=much", "=1", "cider_d=1,", "cider_d=1,cider_d=2", ""])
def test_a_reward_of_another_form_is_refused(text: str) -> None:
    if text:
        with pytest.raises(ConfigError, match="expected a score, or different scores"):
            read_reward(text)
    with pytest.raises(ConfigError):
        planned("--reward", text)


@pytest.mark.parametrize(
    "words", [["runs/s", "--data", "sample"], ["--data", "sample", "runs/s", "--samples", "2"]]
)
def test_the_captioner_stands_before_or_behind_options(words: list[str]) -> None:
    assert make_parser().parse_args(["tune", *words]).captioner == "runs/s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tuen"], "Did you mean 'tune'?"),
        (["tune", "--sampels", "2"], "Did you mean --samples?"),
        (["tune", "--sample-temperature", "2"], "--set train.sample_temperature=VALUE?"),
        (["tune", "a", "b"], "unexpected argument 'b'"),
        (["tune", "--data", "sample", "a", "b"], "unexpected argument 'b'"),
    ],
)
def test_a_wrong_command_line_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert message in capsys.readouterr().err


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "cidre"], "reward: no score 'cidre'. Did you mean 'cider_d'"),
        (["--set", "reward=1"], "reward: 1 was given. Expected the name of a score"),
        (["--set", "reward.cider_d=true"], "reward: cider_d=True was given"),
        (
            ["--set", "losses.token.temperature=2"],
            "no teacher was given for token. Give --teacher",
        ),
        (["--set", "losses.x.name=tokne"], "no loss 'tokne'. Did you mean 'token'"),
        (["--set", "weights.rewrad=1"], "no term 'rewrad'. Did you mean 'reward'"),
        (["--set", "weights.reward=null"], "weights.reward"),
        (["--set", "train.sampels=3"], "Did you mean 'samples'"),
        (["--samples", "1"], "option 'samples' was given 1"),
        (["--monitor", "loss"], "Choose a score"),
        (["--teacher", "no/such"], "no/such: there is no such directory"),
        (["--set", "model.preset=debug_student"], "'preset' ('debug_student') was given, but"),
        (["--set", "model.strat=x"], "Did you mean 'start'"),
        (["--set", "tokenizer.min_count=1"], "there is no option 'tokenizer'"),
    ],
)
def test_what_cannot_be_tuned_is_named_with_the_fix(
    student: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(tune(student, tmp_path, *words), capsys)
    assert not (tmp_path / "best").exists()


def test_a_captioner_that_does_not_exist_is_named(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student").mkdir()
    message = refused(tune(tmp_path / "studnet", tmp_path / "run"), capsys)
    assert f"Did you mean '{tmp_path / 'student'}'?" in message
    empty = refused(tune(tmp_path / "student", tmp_path / "run"), capsys)
    assert "holds no saved captioner" in empty
    preset = refused(tune(Path("debug_student"), tmp_path / "run"), capsys)
    assert "the preset 'debug_student' was given, but a captioner that is not trained" in preset
    nothing = refused(["tune", *TINY, "--out", str(tmp_path / "run")], capsys)
    assert "model: no captioner was given" in nothing


@pytest.mark.parametrize("command", ["tune", "train", "distill"])
def test_a_run_to_resume_that_does_not_exist_is_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuned").mkdir()
    message = refused([command, "--resume", "--out", str(tmp_path / "tunde")], capsys)
    assert f"--resume --out {tmp_path / 'tunde'}: there is no such directory." in message
    assert f"Did you mean '{tmp_path / 'tuned'}'?" in message


def test_an_ensemble_cannot_be_tuned(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ensemble({"a": load(teacher / "best"), "b": load(student / "best")}).save(tmp_path / "both")
    message = refused(tune(tmp_path / "both", tmp_path / "run"), capsys)
    assert "holds an ensemble, not one captioner" in message


def test_a_run_never_replaces_the_captioner_that_it_starts_from(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(student, run)
    shutil.copytree(teacher, other)
    own = refused(tune(run, run, "--overwrite"), capsys)
    assert "the captioner's own directory" in own
    taught = refused(tune(run, other, "--overwrite", "--teacher", str(other)), capsys)
    assert "the teacher's own directory" in taught
    assert "--overwrite" in refused(tune(run, other), capsys)
    assert (run / "best" / "captioner.json").exists()


def test_the_run_file_of_another_command_is_refused(
    student: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--config", str(student / "config.json"), "--out", str(tmp_path)]
    assert "belongs to `capdistill distill`" in refused(["tune", *file], capsys)
    assert "belongs to `capdistill tune`" in refused(
        ["train", "--resume", "--out", str(tuned)], capsys
    )


def test_images_without_captions_are_refused(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--data", str(Path(photos[0]).parent), "--format", "images"]
    assert "no reference caption" in refused(tune(student, tmp_path, *folder), capsys)
