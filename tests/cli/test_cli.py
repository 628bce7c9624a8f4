from __future__ import annotations

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
    example = capsys.readouterr().out.split("example:\n")[1].replace("\\\n", " ")
    lines = [line.partition("  #")[0].partition(" > ")[0].strip() for line in example.splitlines()]
    shown = [line.split() for line in lines if line]
    assert shown
    for words in shown:
        assert words[:2] == ["capdistill", command]
        make_parser().parse_args(words[1:])


def test_parsing_and_help_import_no_torch() -> None:
    code = "import sys, capdistill.cli as c; c.make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_python_m_capdistill_is_the_command() -> None:
    command = [sys.executable, "-m", "capdistill", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"capdistill {capdistill.__version__}\n"


@pytest.mark.parametrize("words", [[], ["distil"], ["train", "--epoch", "3"], ["caption"]])
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
    assert shown.err.startswith(f"capdistill caption: {tmp_path / 'captioner.json'} does not")
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
        "import sys; from capdistill.cli import main, models; "
        "models.run = lambda options: print('x' * 10**6, flush=True); sys.exit(main(['models']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
