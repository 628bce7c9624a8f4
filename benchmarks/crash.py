"""Runs that are killed with SIGKILL and started again end like one that was never stopped.

    python benchmarks/crash.py                    # 50 points, about ten minutes
    python benchmarks/crash.py --points 5 --seed 3
    python benchmarks/crash.py --ranks 2          # two processes on gloo

A point is an event of a run: a step begins or ends; a file is opened for writing, flushed, renamed
or removed; features or targets of a teacher are computed. The process ends at a random one (every
third run at a random moment instead), the same program is started again, sometimes killed again. In
the end its weights, history, random state and file names are compared with those of the whole run.

The runs: `plain` with random crops, word dropout, accumulation, an unreadable image and a loss that
draws from `random`, NumPy and torch, with 0 and 2 worker processes; `features` on cached features;
`targets` on cached targets of a teacher. Of several ranks, one is killed and the others end with
`RankFailed`, or all are killed.
"""

from __future__ import annotations

import argparse
import builtins
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capdistill import Captioner, Distiller, encoders, teachers
from capdistill.data import CaptionData, Example
from capdistill.errors import RankFailed
from capdistill.losses.base import DistillationLoss
from capdistill.training.checkpoint import load_state
from capdistill.training.history import History
from tests.training import tiny_models as tiny

KINDS = ("plain 0", "features 0", "targets 0", "plain 2")
PATIENCE = 10.0  # seconds until a launcher ends the ranks that are left
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


class Kill(NamedTuple):
    """The end of a run.

    Args:
        rank: The process that is killed, at an event or after some seconds.
        event: 0 if it is killed by the clock.
        seconds: 0 if it is killed at an event.
        all: Whether the other processes are killed with it, as a launcher does; else they must end
            by themselves.
    """

    rank: int
    event: int
    seconds: float
    all: bool

    def __str__(self) -> str:
        when = f"at event {self.event}" if self.event else f"after {self.seconds:.2f} s"
        return f"rank {self.rank} {when}{', all' if self.all else ''}"


def started(kind: str, pictures: Path, folder: Path, last: int, where: Mapping[str, str]) -> int:
    """Start the program in a process of its own; its id.

    Args:
        kind, pictures, folder: What it trains.
        last: The event at which it ends; 0 for none.
        where: The variables of a launcher.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(where)
        events = Events(last)
        events.watch()
        warnings.simplefilter("ignore")
        train(kind, pictures, folder)
        name = f"{folder.name}.{where.get('RANK', 0)}.events"
        (folder.parent / name).write_text(str(events.count))
        if where:
            torch.distributed.destroy_process_group()
        code = 0
    except RankFailed as error:
        print(f"rank {where['RANK']}: {error}", file=sys.stderr)
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(kind: str, pictures: Path, folder: Path, world: int = 1, kill: Kill | None = None) -> bool:
    """Run the program until it ends or is killed; whether it was killed."""
    where: dict[str, Any] = {}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    processes = []
    for rank in range(world):
        if world > 1:
            where |= {"RANK": rank, "LOCAL_RANK": rank}
            where |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world)
        last = kill.event if kill and rank == kill.rank else 0
        texts = {name: str(value) for name, value in where.items()}
        processes.append(started(kind, pictures, folder, last, texts))
    if kill and kill.seconds:
        time.sleep(kill.seconds)
        os.kill(processes[kill.rank], signal.SIGKILL)
    left, killed = set(processes), False
    until = math.inf
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            time.sleep(0.01)
            if time.monotonic() > until:
                end(left)  # they wait for one that had not yet joined
                until = math.inf
            continue
        left.discard(process)
        if os.WIFSIGNALED(status) and kill is None:
            raise SystemExit(f"{kind}: the program ended by signal {os.WTERMSIG(status)}")
        if os.WIFSIGNALED(status) and not killed:
            killed, until = True, time.monotonic() + PATIENCE
            if kill and kill.all:
                end(left)
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 3):
            end(left)
            raise SystemExit(f"{kind}: the program failed, see above")
    return killed


def end(processes: Collection[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


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
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1], help="processes of a run; points for each"
    )
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
        wholes: dict[str, tuple[dict[str, Any], list[int], float]] = {}
        for world, point in product(options.ranks, range(options.points)):
            kind = KINDS[point % len(KINDS)]
            name = f"{kind}, {world} ranks"
            if name not in wholes:
                began = time.monotonic()
                run(kind, pictures, root / name, world)
                seconds = time.monotonic() - began
                files = [root / f"{name}.{rank}.events" for rank in range(world)]
                events = [int(file.read_text()) for file in files]
                wholes[name] = result(root / name), events, seconds
            whole, events, seconds = wholes[name]
            folder, kills = root / f"point {point} of {world}", []
            for _ in range(draw.choice([1, 1, 2])):
                rank = draw.randrange(world)
                timed = draw.random() * seconds if point % 3 == 2 else 0.0
                last = 0 if timed else draw.randint(1, events[rank])
                kill = Kill(rank, last, timed, world > 1 and draw.random() < 0.5)
                if run(kind, pictures, folder, world, kill):
                    kills.append(str(kill))
            run(kind, pictures, folder, world)
            found = differences(whole, result(folder))
            failed += bool(found)
            record = {"point": point, "ranks": world, "run": kind, "events": events}
            print(json.dumps({**record, "killed": kills, "differs": found}), flush=True)
            shutil.rmtree(folder)
    tried = options.points * len(options.ranks)
    print(f"{tried - failed} of {tried} runs equal the one never stopped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
