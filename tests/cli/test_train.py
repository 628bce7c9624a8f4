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
from capdistill import Captioner, Trainer
from capdistill.cli import main
from capdistill.tokenizers import HuggingFace
from capdistill.training import History
from tests.cli.cli_commands import TINY, distill, final_weights, refused
from tests.tokenizers.subword_cases import full


def test_train_says_what_came_out_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "debug_student", *TINY, "--out", str(tmp_path), "--json"]
    assert main(command) == 0
    content = json.loads(capsys.readouterr().out)
    captioner = Captioner.load(content["captioner"])
    assert captioner.num_parameters() == content["parameters"]
    assert content["epochs"] == 1
    assert json.loads(Path(content["config"]).read_text())["command"] == "train"


def test_the_student_has_the_teachers_words(teacher: Path, student: Path) -> None:
    ours, theirs = (Captioner.load(run / "best").tokenizer for run in (student, teacher))
    assert ours == theirs


def test_a_student_of_subwords_is_trained_saved_and_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, run = tmp_path / "theirs.json", tmp_path / "run"
    full("byte-level BPE").save(str(theirs))
    settings = ["--tokenizer", str(theirs), "--set", "tokenizer.name=huggingface"]
    settings += ["--set", "tokenizer.max_length=25", "--set", 'train.generation.prefix="a photo"']
    command = ["train", "--preset", "debug_student", *TINY, "--out", str(run)]
    assert main([*command, *settings]) == 0
    student = Captioner.load(run / "best")
    assert isinstance(student.tokenizer, HuggingFace)
    assert 256 < len(student.tokenizer) < len(student.tokenizer.full_vocabulary)
    theirs.unlink()  # the student needs its directory alone
    capsys.readouterr()
    photo = next((Path(cd.__file__).parent / "data" / "sample").rglob("*.jpg"))
    assert main(["caption", str(run / "best"), str(photo), "--device", "cpu"]) == 0
    assert student.caption(photo) in capsys.readouterr().out
    again = ["distill", "--teacher", str(run / "best"), "--student", "debug_student", *TINY]
    assert main([*again, "--out", str(tmp_path / "student")]) == 0
    assert Captioner.load(tmp_path / "student" / "best").tokenizer == student.tokenizer


def test_the_resolved_run_file_gives_the_same_weights_again(student: Path, tmp_path: Path) -> None:
    command = ["distill", "--config", str(student / "config.json"), "--out", str(tmp_path)]
    assert main(command) == 0
    first, again = final_weights(student), final_weights(tmp_path)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    configs = [json.loads((run / "config.json").read_text()) for run in (student, tmp_path)]
    assert [configs[0] | {"out": None}] == [configs[1] | {"out": None}]


def test_the_run_file_holds_the_captions_an_image_that_the_data_decided(student: Path) -> None:
    written = json.loads((student / "config.json").read_text())
    assert written["train"]["captions_per_image"] == 5  # of the sample's photos
    assert json.loads((student / "run.json").read_text())["config"]["captions_per_image"] == 5


def test_a_run_is_logged_and_profiled(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*distill(teacher, out), "--profile", "--log", "csv"]) == 0
    header, *rows = (out / "epochs.csv").read_text().splitlines()
    assert "profile/student" in header
    assert len(rows) == 1
    assert "  time    " in capsys.readouterr().err
    written = json.loads((out / "config.json").read_text())["train"]
    assert (written["log"], written["profile"]) == (["csv"], True)
    with pytest.raises(SystemExit):
        main([*distill(teacher, out), "--log", "tensorbord"])
    assert "Did you mean 'tensorboard'?" in capsys.readouterr().err


def test_another_seed_gives_other_weights(student: Path, tmp_path: Path) -> None:
    command = ["distill", "--config", str(student / "config.json"), "--out", str(tmp_path)]
    assert main([*command, "--seed", "1"]) == 0
    first, other = final_weights(student), final_weights(tmp_path)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_settings_reach_parts_losses_and_weights(teacher: Path, tmp_path: Path) -> None:
    parts = {
        "encoder": {"name": "timm", "kwargs": {"name": "test_efficientnet", "dim": 16}},
        "decoder": {"name": "lstm", "kwargs": {"hidden": 32, "layers": 1}},
        "weights": False,
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"student": parts, "teacher": str(teacher / "best")}))
    settings = ["losses.token.temperature=2", "weights.ce=[1, 0.5]", "train.patience=3"]
    command = ["distill", "--config", str(path), *TINY, "--out", str(tmp_path / "run")]
    assert main([*command, *(word for each in settings for word in ("--set", each))]) == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    losses = {name: part["name"] for name, part in written["losses"].items()}
    assert losses == {"token": "token", "feature": "feature", "hidden": "hidden"}
    assert written["losses"]["token"] == {"name": "token", "temperature": 2}
    assert written["weights"] == {"ce": [1, 0.5], "token": 0.7, "feature": 0.2, "hidden": 0.1}
    assert written["config"]["patience"] == 3
    assert Captioner.load(tmp_path / "run" / "best").decoder.dim == 16


def test_a_recipe_is_what_flags_and_settings_go_over(teacher: Path, tmp_path: Path) -> None:
    command = ["distill", "--recipe", "kd_2024", "--teacher", str(teacher / "best"), *TINY]
    command += ["--student", "debug_student", "--out", str(tmp_path), "--set", "weights.hidden=0"]
    assert main(command) == 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["losses"]["token"] == {"name": "token", "temperature": 4.0}
    assert written["weights"] == {"ce": 0.3, "token": 0.7, "feature": 0.2}
    assert written["config"]["epochs"] == 1  # of TINY
    assert written["config"]["schedule"] == "cosine_restarts"


def test_a_student_may_be_its_own_teacher(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["teacher.name=mean_teacher", "teacher.decay=0.9", "weights.token=[0, 1]"]
    settings += ['losses={"token": {"name": "token"}}', "tokenizer.min_count=2"]
    more = [word for each in settings for word in ("--set", each)]
    command = ["distill", "--student", "debug_student", *TINY, *more]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["teacher"] == {"name": "mean_teacher", "decay": 0.9}
    models = json.loads((tmp_path / "run" / "run.json").read_text())["models"]
    assert models[1]["name"] == f"mean of {models[0]['name']}"
    again = ["distill", "--config", str(tmp_path / "run" / "config.json")]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    first, second = (final_weights(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    start = ["distill", "--student", str(teacher / "best"), *TINY, *more[:4]]  # its own tokenizer
    assert main([*start, "--out", str(tmp_path / "started")]) == 0
    capsys.readouterr()
    wrong = [*command, "--set", "teacher.decay=1", "--out", str(tmp_path / "wrong")]
    assert "teacher: option 'decay'" in refused(wrong, capsys)


def test_a_setting_makes_weights_adapt_and_the_run_file_keeps_it(
    teacher: Path, tmp_path: Path
) -> None:
    settings = ["weights.name=gradnorm", "weights.every=1", "train.ema_decay=0.9"]
    settings += ['weights.token={"schedule": "linear", "first": 0.1, "last": 0.7}']
    more = [word for each in settings for word in ("--set", each)]
    assert main(distill(teacher, tmp_path / "run", *more)) == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["weights"]["name"] == "gradnorm"
    assert written["weights"]["every"] == 1
    assert written["weights"]["token"]["last"] == 0.7
    config = str(tmp_path / "run" / "config.json")
    again = ["distill", "--config", config, "--out", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (final_weights(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("default:The resumed run continues with other options")
def test_resume_goes_on_with_the_run_file_of_the_directory(teacher: Path, tmp_path: Path) -> None:
    assert main(distill(teacher, tmp_path, "--set", "train.schedule=constant")) == 0
    assert main(["distill", "--resume", "--out", str(tmp_path), "--epochs", "2"]) == 0
    epochs = History.load(tmp_path / "history.jsonl").epochs
    assert [row["epoch"] for row in epochs] == [0, 1]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["train"]["schedule"], config["train"]["epochs"]) == ("constant", 2)
    files = [tmp_path / name for name in ("config.json", "run.json")]
    written = [file.read_bytes() for file in files]
    for given in (["--epochs", "2"], ["--learning-rate", "1e-9"]):  # they tell what was trained
        assert main(["distill", "--resume", "--out", str(tmp_path), *given]) == 0
        assert [file.read_bytes() for file in files] == written


def test_resume_without_a_run_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(distill(teacher, tmp_path, "--resume"), capsys)
    assert "no training state to resume" in message


def test_a_student_starts_from_saved_weights(student: Path, tmp_path: Path) -> None:
    command = ["distill", "--config", str(student / "config.json"), "--out", str(tmp_path)]
    start = ["--set", f"student.start={student / 'final'}", "--set", "train.learning_rate=1e-12"]
    assert main([*command, *start, "--seed", "1"]) == 0
    first, started = final_weights(student), final_weights(tmp_path)
    learnt = [key for key in first if key.startswith("decoder")]
    assert all(torch.allclose(first[key], started[key], atol=1e-6) for key in learnt)


@pytest.mark.parametrize("start", ["--student", "--preset"])
def test_a_saved_captioner_is_accepted_as_the_model(
    teacher: Path, student: Path, tmp_path: Path, start: str
) -> None:
    """A rate of almost 0 leaves the weights where they started."""
    still = ["--out", str(tmp_path), "--set", "train.learning_rate=1e-12", *TINY]
    if start == "--student":
        command = ["distill", "--teacher", str(teacher), start, str(student), *still]
    else:
        command = ["train", start, str(student / "final"), *still]
    assert main(command) == 0
    first, started = final_weights(student), final_weights(tmp_path)
    learnt = [key for key in first if key.startswith("decoder")]
    assert all(torch.allclose(first[key], started[key], atol=1e-6) for key in learnt)
    words = [Captioner.load(run / "final").tokenizer for run in (student, tmp_path)]
    assert words[0] == words[1]
    model = "student" if start == "--student" else "model"
    written = json.loads((tmp_path / "config.json").read_text())[model]
    directory = student / ("best" if start == "--student" else "final")
    assert (written["preset"], written["start"]) == (None, str(directory))


def test_a_run_is_not_replaced_unless_that_is_asked_for(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(student, run)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    message = refused(distill(teacher, run, "--seed", "5"), capsys)
    assert all(option in message for option in ("--resume", "--out", "--overwrite"))
    assert "=True" not in message
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert main(distill(teacher, run, "--seed", "5", "--overwrite")) == 0
    assert json.loads((run / "config.json").read_text())["train"]["seed"] == 5


def test_a_run_never_replaces_its_own_teacher(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    message = refused(distill(run, run, "--overwrite"), capsys)
    assert "the teacher's own directory" in message
    assert (run / "best" / "captioner.json").exists()


def test_the_run_file_of_another_command_is_named(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["train", "--resume", "--out", str(student)], capsys)
    assert "belongs to `capdistill distill`" in message
    other = ["--config", str(teacher / "config.json"), "--out", str(tmp_path / "run")]
    assert "belongs to `capdistill train`" in refused(["distill", *other], capsys)


@pytest.mark.filterwarnings("default:The resumed run continues with other options")
def test_resume_auto_starts_a_run_and_continues_it(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(distill(teacher, run, "--resume", "auto")) == 0
    assert main(distill(teacher, run, "--resume", "auto", "--set", "train.epochs=2")) == 0
    assert [row["epoch"] for row in History.load(run / "history.jsonl").epochs] == [0, 1]


def test_metrics_and_the_monitored_score_are_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "debug_student", *TINY, "--json"]
    given = [*command, "--out", str(tmp_path / "a"), "--metrics", "rouge_l,bleu_1"]
    assert main([*given, "--monitor", "rouge_l"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert sorted(content["best"]["scores"]) == ["bleu_1", "rouge_l"]
    added = [*command, "--out", str(tmp_path / "b"), "--set", "train.monitor=rouge_l"]
    assert main(added) == 0
    scores = json.loads(capsys.readouterr().out)["best"]["scores"]
    assert {"rouge_l", "cider_d", "bleu_4"} <= scores.keys()
    message = refused([*command, "--out", str(tmp_path / "c"), "--metrics", "rouge"], capsys)
    assert "No metric 'rouge'. Did you mean 'rouge_l'?" in message


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_is_the_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, *batches: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(self, *batches)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "step", interrupted)
    command = ["train", "--preset", "debug_student", *TINY, "--out", str(tmp_path)]
    assert main(command) == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert f"--resume --out {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "debug_studnet"], "Did you mean 'debug_student'"),
        (["--set", "train.epoch=3"], "Did you mean 'epochs'"),
        (["--set", "losses.x.name=tokne"], "no loss 'tokne'. Did you mean 'token'"),
        (["--set", "weights.tokens=1"], "no term 'tokens'. Did you mean 'token'"),
        (["--set", "train.monitor=cidre"], "nothing called 'cidre' is measured"),
        (["--set", "student.encoder.name=timm"], "cannot both be given"),
        (["--set", 'student.preset=""'], "expected a preset, or an encoder and a decoder"),
        (["--set", "student.encoder.kwargs.nam=1"], "cannot be created with"),
        (["--set", "student.decoder.hiden=64"], "cannot be created with"),
        (["--student", "no/such/captioner"], "no/such/captioner: there is no such directory"),
        (["--set", "tokenizer.min_count=1"], "vocabular"),
        (["--set", "tokenizer.min_count=999"], "999 times"),
        (["--device", "gpu"], "Use 'auto', 'cpu'"),
    ],
)
def test_what_cannot_be_trained_is_named_with_the_fix(
    teacher: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(distill(teacher, tmp_path, *words), capsys)
    assert not (tmp_path / "best").exists()


def test_weights_that_do_not_fit_are_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"head.weight": torch.ones(2)}, tmp_path / "other.pt")
    weights = ["--weights", str(tmp_path / "other.pt")]
    message = refused(distill(teacher, tmp_path / "run", *weights), capsys)
    assert "other.pt" in message


def test_a_teacher_that_is_not_a_captioner_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(distill(tmp_path, tmp_path / "run"), capsys)
    assert "best: there is no such directory" in message
    (tmp_path / "best").mkdir()
    assert "holds no saved captioner" in refused(distill(tmp_path, tmp_path / "run"), capsys)


def test_an_empty_data_set_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\n")
    data = ["--data", str(tmp_path), "--format", "folder"]
    message = refused(distill(teacher, tmp_path / "run", *data), capsys)
    assert str(tmp_path / "captions.csv") in message


def test_an_output_that_is_a_file_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    message = refused(distill(teacher, tmp_path / "file"), capsys)
    assert "Cannot write" in message
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o555)
    message = refused(distill(teacher, tmp_path / "run"), capsys)
    tmp_path.chmod(0o755)
    assert "Cannot write" in message


def test_a_run_without_output_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["train", "--preset", "debug_student", *TINY], capsys)
    assert "Give --out DIR" in message


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_of_check_is_its_verdict(
    teacher: Path, ok: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capdistill.training.check.CheckReport.ok", ok)
    pair = ["--teacher", str(teacher / "best"), "--student", "debug_student", *TINY]
    assert main(["check", *pair, "--json"]) == (0 if ok else 1)
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is ok
    assert {"vocabulary", "shapes", "terms"} <= {row["topic"] for row in content["rows"]}


def test_an_encoder_learns_from_a_folder_of_images_before_its_captions(
    teacher: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(Path(photos[0]).parent)
    command = ["distill", "--teacher", str(teacher), "--student", "debug_student"]
    command += ["--data", folder, "--format", "images", "--limit", "6", "--device", "cpu"]
    command += ["--epochs", "1", "--batch-size", "3", "--set", "student.encoder.trainable=all"]
    features = ["--set", 'losses={"feature": {"match": "pooled"}}', "--set", "weights.ce=0"]
    first = ["--out", str(tmp_path / "encoder"), "--monitor", "loss"]
    assert "terms read them: ce" in refused([*command, *first], capsys)
    assert main([*command, *features, *first]) == 0
    (row,) = epochs_of(tmp_path / "encoder")
    assert list(row["val"]["terms"]) == ["feature"]

    second = ["distill", "--teacher", str(teacher), *TINY, "--out", str(tmp_path / "student")]
    assert main([*second, "--set", f"student.start={tmp_path / 'encoder'}"]) == 0
    (row,) = epochs_of(tmp_path / "student")
    assert "cider_d" in row["scores"]


def epochs_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "epoch"]
