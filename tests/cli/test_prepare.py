"""`cache` and `shards`: work that is done once, and found by the commands that need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capdistill.cli import main
from tests.cli.cli_commands import TINY, refused

DATA = ["--data", "sample", "--limit", "6"]


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_cache_writes_is_what_a_run_reads(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "features"
    pair = ["--teacher", str(teacher), "--student", "debug_student"]
    options = ["--set", f"train.cache_dir={features}", "--set", "train.cache_views=2"]
    made = run(["cache", *pair, *DATA, *options, "--device", "cpu"], capsys)
    assert {entry["images"] for entry in made["caches"]} == {6}
    assert len(made["caches"]) == 6  # two encoders; two views of train, and val
    before = written(features)
    command = ["distill", *pair, *TINY, *options, "--set", "train.cache_features=true"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert written(features) == before
    again = run(["cache", "--config", str(tmp_path / "run" / "config.json")], capsys)
    assert len(again["caches"]) == 6
    assert written(features) == before


def test_targets_of_a_teacher_take_its_place(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, targets = ["--student", "debug_student"], tmp_path / "targets"
    options = ["--set", f"train.cache_dir={tmp_path}", "--set", "train.cache_views=2"]
    options += ["--set", "losses.feature.match=pooled"]
    command = ["cache", "--teacher", str(teacher), *student, *DATA, *options, "--device", "cpu"]
    assert run([*command, "--targets", str(targets)], capsys)["targets"] == str(targets)
    command = ["distill", *student, *TINY, *options, "--set", "train.cache_features=true"]
    rows = []
    for name in (str(teacher), str(targets)):
        out = tmp_path / f"run{len(rows)}"
        assert main([*command, "--teacher", name, "--out", str(out)]) == 0
        lines = map(json.loads, (out / "history.jsonl").read_text().splitlines())
        rows += [line for line in lines if line["kind"] == "epoch"]
    for role in ("train", "val"):
        for term, value in rows[0][role]["terms"].items():
            assert rows[1][role]["terms"][term]["raw"] == pytest.approx(value["raw"], rel=0.02)


def test_targets_that_were_made_differently_are_replaced_on_request(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cache", "--teacher", str(teacher), "--student", "debug_student", *DATA]
    command += ["--cache-dir", str(tmp_path / "features"), "--targets", str(tmp_path / "targets")]
    run([*command, "--device", "cpu"], capsys)
    command += ["--device", "cpu", "--set", "losses.feature.match=pooled"]
    assert "made differently: keep was" in (said := refused(command, capsys))
    assert "--overwrite" in said
    run([*command, "--overwrite"], capsys)
    run(command, capsys)


def test_targets_are_made_with_the_workers_and_batches_of_the_command(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("capdistill.teachers.cache", lambda *_, **options: given.update(options))
    command = ["cache", "--teacher", str(teacher), "--student", "debug_student", *DATA]
    command += ["--cache-dir", str(tmp_path), "--targets", "x", "--device", "cpu"]
    assert main([*command, "--num-workers", "1", "--eval-batch-size", "3"]) == 0
    assert (given["num_workers"], given["batch_size"]) == (1, 3)


def test_a_model_alone_is_cached_and_caches_are_listed_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--cache-dir", str(tmp_path)]
    command = ["cache", "--preset", "debug_student", *DATA, *place, "--device", "cpu"]
    assert main([*command, "--cache-dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "test_efficientnet" in shown
    assert "100%" in shown
    assert "--set train.cache_features=true" in shown
    assert len(run(["cache", "--list", *place], capsys)) == 2
    freed = run(["cache", "--clear", *place], capsys)["bytes"]
    assert freed > 0
    assert list(tmp_path.iterdir()) == []
    assert main(["cache", "--list", *place]) == 0
    assert "no caches" in capsys.readouterr().out


@pytest.mark.parametrize("work", ["--list", "--clear"])
def test_caches_are_those_of_a_directory_that_exists_and_of_no_run(
    work: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typo = refused(["cache", work, "--cache-dir", str(tmp_path / "typo")], capsys)
    assert "typo: there is no such directory" in typo
    for given in (["--set", f"train.cache_dir={tmp_path}"], ["--config", "c.json"], DATA[:2]):
        message = refused(["cache", work, *given], capsys)
        assert f"Leave out {given[0]}." in message


def test_caches_are_not_listed_and_cleared_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache", "--list", "--clear"])
    assert "not allowed with" in capsys.readouterr().err


def test_cache_has_no_options_that_it_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--metrics", "--beam-size", "--teacher-weights", "--log"):
        with pytest.raises(SystemExit):
            main(["cache", "--list", flag, "1"])
        assert f"there is no option {flag}" in capsys.readouterr().err
    for flag in (["--overwrite"], ["--target-words", "3"]):
        assert "--targets DIR" in refused(["cache", "--preset", "debug_student", *flag], capsys)


def test_a_model_and_a_pair_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cache", "--preset", "debug_student", "--student", "debug_student", *DATA]
    assert "--preset is a model alone" in refused(command, capsys)


def test_shards_are_written_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(["shards", *DATA, "--out", str(tmp_path / "s"), "--images-per-shard", "4"], capsys)
    names = [Path(file).name for file in made["files"]]
    assert names == [f"{split}-00000{n}.tar" for split in ("train", "val") for n in range(2)]
    options = ["--data", str(tmp_path / "s"), "--format", "shards", *TINY[4:]]
    command = ["train", "--preset", "debug_student", *options, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    rows = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["images"] for row in rows if '"kind": "epoch"' in row] == [6]


def test_shards_without_a_directory_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Give --out DIR" in refused(["shards", *DATA], capsys)
