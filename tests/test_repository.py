"""What stands in the repository belongs to everybody's machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import capdistill

ROOT = Path(__file__).parents[1]
OURS = re.compile(rb"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/\w")


def test_no_tracked_file_holds_a_path_of_one_machine() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert len(files) > 10
    assert [str(f) for f in files if f.is_file() and OURS.search(f.read_bytes())] == []


@pytest.mark.parametrize(
    ("parts", "found"),
    [(("", "work", "main"), True), (("", "home", "me", "x"), True), (("net", "work", "x"), False)],
)
def test_the_search_for_machine_paths_finds_them(parts: tuple[str, ...], found: bool) -> None:
    assert bool(OURS.search("/".join(parts).encode())) is found


# What reads as translated, and names that only we would understand.
UNIDIOMATIC = re.compile(
    r"\bcan not\b(?! gon)|\bmend(s|ed|ing)?\b|\ba trouble\b|\bhere is no\b|\bof no account\b"
    r"|\bby chance\b|\bcaptions an image\b|\bundisturbed\b|\brehearse|\btally\b|\bsurprise\b",
    re.IGNORECASE,
)
PROSE = ("src", "docs", "tests", "tools", "examples", "benchmarks")


def test_words_are_those_of_idiomatic_english() -> None:
    files = [*ROOT.glob("*.md"), *(p for d in PROSE for p in (ROOT / d).rglob("*.[pm][yd]"))]
    assert len(files) > 150
    texts = {file: file.read_text("utf-8") for file in files if file != Path(__file__)}
    found = {str(file.relative_to(ROOT)): UNIDIOMATIC.search(text) for file, text in texts.items()}
    assert {name: match[0] for name, match in found.items() if match} == {}


def test_files_of_the_forge_are_valid_yaml() -> None:
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    assert len(files) == 5
    assert all(isinstance(yaml.safe_load(file.read_text("utf-8")), dict) for file in files)


def test_ci_runs_every_python_that_the_package_supports() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == supported


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == capdistill.__version__
