"""A teacher of another vocabulary, and a trimmed one, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capdistill.cli import main
from tests.cli.cli_commands import TINY, refused


def test_a_student_of_other_words_is_checked_and_distilled(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--teacher", str(teacher), "--student", "debug_student", *TINY]
    pair += ["--set", "tokenizer.min_count=1"]
    words = ["--set", 'losses={"word": {"temperature": 2.0}, "universal": {}}']
    assert main(["check", *pair, *words]) == 0
    said = capsys.readouterr().out
    assert "the teacher reads the captions with its own tokenizer" in " ".join(said.split())
    assert 'Recommended: the loss "word"' in " ".join(said.split())
    assert main(["distill", *pair, *words, "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    epoch = next(row for row in map(json.loads, lines) if row["kind"] == "epoch")
    assert set(epoch["train"]["terms"]) == {"ce", "word", "universal"}
    capsys.readouterr()
    message = refused(["distill", *pair, "--out", str(tmp_path / "other")], capsys)
    assert "vocabularies differ" in message
    assert "Recommended" in message
