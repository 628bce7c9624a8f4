from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import capdistill
from capdistill.cli import COMMANDS, main, make_parser
from capdistill.errors import CheckpointError


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    assert text.index("example:") < text.index("options:")
    lines = [line.partition("  #")[0].partition(" > ")[0] for line in example.splitlines()]
    shown = [line.partition(" | ")[2].split() or line.split() for line in lines]
    assert shown
    for words in shown:
        assert words[:2] == ["capdistill", command]
        make_parser().parse_args(words[1:])


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_torch_and_only_what_the_command_needs(words: list[str]) -> None:
    code = "import sys; from capdistill.cli import main\ntry: main(sys.argv[1:])\nfinally: "
    code += "print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "timm", "PIL", "nltk", "matplotlib", "capdistill.metrics"}
    if words[:1] in ([], ["--help"], ["models"], ["demo"]):
        heavy |= {"pydantic", "capdistill.cli.common"}
    assert not heavy & {*done.stderr.split()}


def test_capdistill_alone_prints_help_and_is_exit_code_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: capdistill")
    assert all(f"\n    {name} " in shown.out for name in COMMANDS)
    assert shown.err == ""


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["distil"], "Did you mean 'distill'?"),
        (["evalute", "run"], "Did you mean 'evaluate'?"),
        (["train", "--epoch", "3"], "Did you mean --epochs?"),
        (["train", "--learning_rate=1"], "Did you mean --learning-rate?"),
        (["caption", "run", "a.jpg", "--beam", "3"], "Did you mean --beam-size?"),
        (["--verison"], "Did you mean --version?"),
        (["train", "--format", "flicker8k"], "Did you mean 'flickr8k'?"),
        (["caption", "r", "a.jpg", "--length-normalisation", "avrage"], "Did you mean 'average'?"),
        (["train", "--max-grad-norm", "1"], "Did you mean --set train.max_grad_norm=VALUE?"),
        (["distill", "--label-smoothing=0.1"], "Did you mean --set train.label_smoothing=VALUE?"),
        (["train", "--lable-smoothing=0.1"], "Did you mean --set train.label_smoothing=VALUE?"),
        (["models", "lite0_lstm"], "unexpected argument 'lite0_lstm'"),
    ],
)
def test_a_misspelt_command_option_or_choice_gets_the_nearest_name(
    words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert suggestion in capsys.readouterr().err


def test_python_m_capdistill_is_the_command() -> None:
    command = [sys.executable, "-m", "capdistill", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"capdistill {capdistill.__version__}\n"


@pytest.mark.parametrize("words", [["distil"], ["train", "--epoch", "3"], ["caption"]])
def test_a_wrong_command_line_is_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert "usage: capdistill" in capsys.readouterr().err


def test_a_problem_is_exit_code_1_with_its_message_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(tmp_path), "dog.jpg"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"capdistill caption: {tmp_path} holds no saved captioner")
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_debug_raises_the_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        main(["caption", str(tmp_path), "dog.jpg", "--debug"])


def test_ctrl_c_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(vocabulary: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("capdistill.presets.table", interrupt)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_sigterm_outside_a_run_is_exit_code_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capdistill.presets.table", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["models"]) == 143
    assert capsys.readouterr().err == "Terminated.\n"
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_plain_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warn(vocabulary: int) -> list[object]:
        warnings.warn("look here", stacklevel=1)
        return []

    monkeypatch.setattr("capdistill.presets.table", warn)
    assert main(["models"]) == 0
    assert capsys.readouterr().err == "warning: look here\n"


def test_a_reader_that_stops_early_is_no_traceback() -> None:
    code = (
        "import sys, capdistill.cli.models as models; from capdistill.cli import main; "
        "models.run = lambda options: print('x' * 10**6, flush=True); sys.exit(main(['models']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_full_disk_below_the_output_is_a_message() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "capdistill"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


TEXT = "un caf\u00e9, \u4e00\u53ea\u72d7 \U0001f415 and half a character \ud83d"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
        {"PYTHONIOENCODING": "cp1252:strict"},
    ],
)
@pytest.mark.parametrize("as_json", ["", "--json"])
def test_any_text_can_be_printed_to_any_terminal(environment: dict[str, str], as_json: str) -> None:
    code = (
        "import sys, json, capdistill.cli as cli, capdistill.cli.models as models\n"
        f"text = {TEXT!a}\n"
        "def run(options):\n"
        "    cli.print_status(text)\n"
        "    cli.print_result(options, {'caption': text}, lambda: text)\n"
        "    return 0\n"
        "models.run = run\n"
        "sys.exit(cli.main(['models', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *filter(None, [as_json])]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, check=True
    )
    if as_json:
        encoding = environment.get("PYTHONIOENCODING", "ascii").split(":")[0]
        assert json.loads(done.stdout.decode(encoding)) == {"caption": TEXT}
    else:
        assert b"half a character \\ud83d" in done.stdout
    assert b"half a character \\ud83d" in done.stderr
