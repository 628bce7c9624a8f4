"""Training in several processes on gloo; tests/training/ranks.py has what the processes do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from capdistill import Captioner, Distiller
from capdistill.compatibility import device_of
from capdistill.ranks import Ranks
from capdistill.runtime import launched
from tests.training import tiny_models as tiny

QUIET: dict[str, Any] = {**tiny.QUIET, "schedule": "constant"}
ROOT = Path(__file__).resolve().parents[2]
Results = dict[str, dict[int, list[Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found: check, world size, rank."""
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.training.ranks", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    results: Results = {}
    for path in sorted(out.glob("*.json")):
        name, world, _ = path.stem.split(".")
        results.setdefault(name, {}).setdefault(int(world), []).append(json.loads(path.read_text()))
    return results


def test_one_two_and_four_processes_train_the_same(found: Results) -> None:
    [alone] = found["training"][1]
    assert alone["images"] == [11, 11]
    assert [val["images"] for val in alone["val"]] == [7, 7]
    for world in (2, 4):
        for result in found["training"][world]:
            for name in alone.keys() - {"seconds"}:
                assert result[name] == close(alone[name]), (world, name)


class Placed(Captioner):
    """As a Hugging Face library loads it with `device_map`: it refuses to be moved as a whole."""

    hf_device_map: ClassVar = {"encoder": 0, "decoder": "cpu"}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("You can't move a model that is offloaded")


def test_a_teacher_that_somebody_has_placed_is_not_moved() -> None:
    plain = tiny.make_teacher()
    placed = Placed(plain.encoder, plain.decoder, plain.tokenizer)
    losses = []
    for teacher in (plain, placed):
        trainer = Distiller(teacher, tiny.make_student(), {"token": "token"}, **QUIET)
        losses.append(trainer.step(tiny.make_batch([2, 3]))["loss"])
    assert losses[0] == losses[1]
    assert device_of(torch.nn.Linear(1, 1, device="meta")) == torch.device("cpu")


METHODS = (
    "accumulation",
    "uncertainty",
    "ratio",
    "quantized",
    "reward",
    "own_loop",
    "mean_teacher",
    "words",
    "trimmed",
    "sharded_teacher",
)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_with(found: Results, method: str) -> None:
    [alone] = found[method][1]
    for result in found[method][2]:
        for name in alone.keys() - {"seconds"}:
            assert result[name] == close(alone[name]), name


def test_fsdp2_trains_saves_and_resumes_as_one_process(found: Results) -> None:
    [alone] = found["sharded"][1]
    sizes = 0
    for result in found["sharded"][2]:
        for name in alone.keys() - {"seconds", "share"}:
            assert result[name] == close(alone[name]), name
        assert result["kept"] == result["best"]  # each rank holds its part of the best weights
        sizes += result["share"]
    assert sizes == sum(map(len, alone["best"]))  # no rank holds the whole


def test_what_needs_whole_weights_is_refused_with_fsdp2(found: Results) -> None:
    for result in found["unshardable"][2]:
        reasons = ("ema_decay", "on_policy", "weights of terms that adapt")
        for message, reason in zip(result["messages"], reasons, strict=True):
            assert f"parallel= shards the model over the ranks, which {reason} cannot" in message


def test_unreadable_images_on_one_rank_leave_the_ranks_in_step(found: Results) -> None:
    [alone], (main, other) = found["unreadable"][1], found["unreadable"][2]
    for name in ("weights", "losses", "images", "skipped", "problems"):
        assert main[name] == close(alone[name]), name
    assert main["skipped"] == [2]
    assert (main["warnings"], other["warnings"]) == (1, 0)
    assert other["weights"] == main["weights"]


def test_each_image_is_cached_by_one_rank(found: Results) -> None:
    [alone], (main, other) = found["features"][1], found["features"][2]
    assert main["weights"] == close(alone["weights"])
    assert main["seen"] + other["seen"] == 2 * alone["seen"] - 11


def test_ranks_share_the_targets_of_a_teacher_and_the_files_are_those_of_one(
    found: Results,
) -> None:
    [alone], (main, other) = found["targets"][1], found["targets"][2]
    assert main["files"] == other["files"] == alone["files"]  # bit for bit
    assert main["apart"] == other["apart"] == alone["apart"]  # a disk for each
    assert main["losses"] == close(alone["losses"])
    assert alone["seen"] == 2 * 8
    assert (main["seen"], other["seen"]) == (2 * 5, 2 * 3)


def test_callbacks_run_on_rank_0_and_stop_all(found: Results) -> None:
    main, other = found["callbacks"][2]
    assert main["calls"] == ["step", "step", "step", "epoch"]
    assert other["calls"] == []
    assert main["rows"] == other["rows"] == 5
    assert main["best"]
    assert other["best"]


def test_batch_norms_are_equal_on_all_ranks_when_they_are_scored(found: Results) -> None:
    main, other = found["norms"][2]
    assert main["weights"] == other["weights"]
    assert main["val"] == other["val"]


def test_an_interrupt_on_one_rank_stops_all_and_the_run_continues_bit_for_bit(
    found: Results,
) -> None:
    for result in found["interrupted"][2]:
        assert (result["steps"], result["interrupted"]) == (4, True)
        assert result["same"]
        assert result["losses"] == result["whole"]
    assert [result["warnings"] for result in found["interrupted"][2]] == [1, 0]


def test_a_run_of_two_processes_is_continued_by_one(found: Results) -> None:
    [result] = found["moved"][1]
    assert "batch_size 4 -> 3" in result["refused"]
    assert result["weights"] == close(result["whole"])


def test_what_rank_0_refuses_or_what_differs_ends_all_with_one_message(found: Results) -> None:
    main, other = found["refused"][2]
    assert main["messages"] == other["messages"]
    assert "holds the results of an earlier run" in main["messages"][0]
    assert "do not train the same: teacher 1" in main["messages"][1]
    assert "do not train the same: batch_size: ['2', '3']" in main["messages"][2]
    assert "do not train the same: epochs: ['1', '2']" in main["messages"][3]
    assert "do not train the same: weights: " in main["messages"][4]
    assert len(main["messages"]) == 5


def test_an_error_on_one_rank_ends_all_with_its_message(found: Results) -> None:
    main, other = found["failing"][2]
    assert other["error"] == "ValueError: this computer has a broken disk"
    assert main["error"] == "RankFailed: Rank 1 failed. ValueError: this computer has a broken disk"


def close(value: Any) -> Any:
    """The same value, numbers within rounding."""
    if isinstance(value, dict):
        return {name: close(each) for name, each in value.items()}
    if isinstance(value, list):
        return [close(each) for each in value]
    return pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value


def test_the_lines_for_srun_in_the_docs_set_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "distributed.md").read_text()
    script = text[text.index("#!/bin/bash") :].split("```")[0]
    starts = 'for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "${@:2}"; done'
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    commands = {
        "srun": starts,
        "scontrol": "printf 'first\\nsecond\\n'",
        "capdistill": "echo " + " ".join(f"${name}" for name in names),
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**slurm, "PATH": path}, capture_output=True, text=True
    )
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for rank, line in enumerate(lines):
        for name, value in zip(names, line.split(), strict=True):
            monkeypatch.setenv(name, value)
        assert launched() == (rank, rank % 2, 4, 2)
        assert os.environ["MASTER_ADDR"] == "first"


def test_copies_that_srun_started_are_told_that_they_train_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.warns(UserWarning, match="srun started 4 processes .* each trains by itself"):
        Ranks().join(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "1")  # one run per seed: no warning
    ranks = Ranks()
    ranks.join(torch.device("cpu"))
    assert ranks.world_size == 1


LAUNCHERS = {
    "torch": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "0"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LAUNCHERS)
def test_the_command_line_trains_under_a_launcher_and_rank_0_speaks(
    library: str, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    launcher = LAUNCHERS[library]
    command = "-m capdistill train --preset debug_student --data sample --limit 12 --epochs 1"
    command += " --device cpu --precision fp32 --batch-size 3 --num-workers 0 --json"
    words = [sys.executable, *launcher, *command.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # printed once
    assert result["epochs"] == 1
    assert (tmp_path / "run" / "best").is_dir()
    assert "2 processes" in done.stderr
    assert done.stderr.count("training 'debug_student'") == 1
