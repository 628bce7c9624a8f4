"""Runs that are killed with SIGKILL and started again end like one that was never stopped.

    python benchmarks/crash.py                    # 50 points, about ten minutes
    python benchmarks/crash.py --points 5 --seed 3

A point is an event of a run: a step begins or ends; a file is opened for writing, flushed, renamed
or removed; features or targets of a teacher are computed. The process ends at a random one (every
third run at a random moment instead), the same program is started again, sometimes killed again. In
the end its weights, history, random state and file names are compared with those of the whole run.

The runs: `plain` with random crops, word dropout, accumulation, an unreadable image and a loss that
draws from `random`, NumPy and torch, with 0 and 2 worker processes; `features` on cached features;
`targets` on cached targets of a teacher.
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capdistill import Captioner, Distiller, encoders, teachers
from capdistill.data import CaptionData, Example
from capdistill.losses.base import DistillationLoss
from capdistill.training.checkpoint import load_state
from capdistill.training.history import History
from tests.training import tiny_models as tiny

KINDS = ("plain 0", "features 0", "targets 0", "plain 2")
CLOCK = ("seconds", "images_per_second")
OPTIONS: dict[str, Any] = {
    **tiny.QUIET,
    **{"batch_size": 1, "accumulation_steps": 2, "epochs": 2, "learning_rate": 0.01},
    **{"word_dropout": 0.2, "save_every": 3, "log_every": 1, "keep": 2, "keep_best": 2},
}


class Drawing(DistillationLoss):
    """A loss that draws from Python's, NumPy's and torch's generators."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        factor = random.random() + np.random.normal() + float(torch.rand(()))
        return factor * student.logits.square().mean(-1)[batch.target_mask].sum()


def train(kind: str, pictures: Path, folder: Path) -> None:
    """The whole program, as a user would start it again."""
    name, workers = kind.split()
    torch.manual_seed(0)
    student, teacher = make_student(name == "features"), tiny.make_teacher()
    paths = sorted(pictures.iterdir())
    examples = [Example(p.name, p, (f"a red dog {n}", "a cat")) for n, p in enumerate(paths)]
    train, val = CaptionData(examples), CaptionData(examples[1:4])
    losses: dict[str, Any] = {"mine": Drawing(), "token": "token"}
    options = {**OPTIONS, "num_workers": int(workers), "flip": name == "plain"}
    options |= {"cache_features": name == "features", "cache_dir": str(folder / "cache")}
    if name == "features":
        options["flip"] = False
    if name == "targets":
        options["augment"] = False
        teacher = teachers.cache(teacher, train, folder / "targets", progress=False)
    trainer = Distiller(teacher, student, losses=losses, **options)
    trainer.fit(train, val, out=folder / "run", resume="auto")


def make_student(frozen: bool) -> Captioner:
    made = tiny.make_student(dropout=0.3, trainable=not frozen)
    encoder = encoders.create("patches", trainable=not frozen)
    encoder.load_state_dict(made.encoder.state_dict())
    return Captioner(encoder, made.decoder, made.tokenizer, name="student")


# -- events, and the process that ends at one of them ---------------------------------------------


class Events:
    """Counts the events of a process, and ends it at one.

    Args:
        last: The event to end at; 0 never ends.
    """

    def __init__(self, last: int = 0) -> None:
        self.count, self.last = 0, last

    def watch(self) -> None:
        """Count before and after every call that writes, and of every pass of the models."""
        for owner, name in (
            *((os, name) for name in ("fsync", "replace", "rename", "unlink", "truncate")),
            *((Path, name) for name in ("replace", "rename", "unlink", "write_bytes", "touch")),
            *((shutil, "rmtree"), (torch, "save"), (Drawing, "forward"), (tiny.Patches, "trunk")),
        ):
            setattr(owner, name, self.counted(getattr(owner, name)))
        plain = builtins.open
        writing = self.counted(plain)

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            return (plain if mode in ("r", "rb") else writing)(file, mode, *rest, **options)

        builtins.open = opened  # type: ignore[assignment]

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.add()
            result = function(*arguments, **options)
            self.add()
            return result

        return call

    def add(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def started(kind: str, pictures: Path, folder: Path, last: int) -> int:
    """Start the program in a process of its own; its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        events = Events(last)
        events.watch()
        warnings.simplefilter("ignore")
        train(kind, pictures, folder)
        (folder.parent / f"{folder.name}.events").write_text(str(events.count))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(kind: str, pictures: Path, folder: Path, last: int = 0, seconds: float = 0.0) -> int:
    """Run the program until it ends, or is killed at an event or after some time; the signal."""
    process = started(kind, pictures, folder, last)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise SystemExit(f"{kind}: the program failed, see above")
    return 0


# -- what must be equal ---------------------------------------------------------------------------


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without the clock."""
    out = folder / "run"
    state = load_state(out / "state.pt")
    rows = [
        {key: value for key, value in row.items() if key not in CLOCK}
        for row in History.load(out / "history.jsonl")
    ]
    weights = {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("model.safetensors")
    }
    parts = ("objective", "optimizer", "random", "guard", "callbacks", "epoch", "step", "skipped")
    return {
        "history": rows,
        "weights": weights,
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        **{f"state: {name}": plain(state[name]) for name in parts},
    }


def plain(value: Any) -> Any:
    """Tensors as lists, so that == compares everything."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two results."""
    found = [name for name in one if one[name] != other[name]]
    if "files" in found:
        found += [f"file {name}" for name in set(one["files"]) ^ set(other["files"])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoders.register("patches")(tiny.Patches)
    draw = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        pictures = root / "pictures"
        pictures.mkdir()
        noise = np.random.default_rng(0)
        for number in range(7):
            pixels = noise.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(pictures / f"g{number}.png")
        (pictures / "g5.png").write_bytes(b"no picture")
        wholes: dict[str, tuple[dict[str, Any], int, float]] = {}
        for point in range(options.points):
            kind = KINDS[point % len(KINDS)]
            if kind not in wholes:
                began = time.monotonic()
                run(kind, pictures, root / kind)
                seconds = time.monotonic() - began
                events = int((root / f"{kind}.events").read_text())
                wholes[kind] = result(root / kind), events, seconds
            whole, events, seconds = wholes[kind]
            folder, kills = root / f"point {point}", []
            for _ in range(draw.choice([1, 1, 2])):
                timed = draw.random() * seconds if point % 3 == 2 else 0.0
                last = 0 if timed else draw.randint(1, events)
                if run(kind, pictures, folder, last, timed):
                    kills.append(f"after {timed:.2f} s" if timed else f"at event {last}")
            run(kind, pictures, folder)
            found = differences(whole, result(folder))
            failed += bool(found)
            record = {"point": point, "run": kind, "events": events, "killed": kills}
            print(json.dumps({**record, "differs": found}), flush=True)
            shutil.rmtree(folder)
    print(f"{options.points - failed} of {options.points} runs equal the one never stopped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
