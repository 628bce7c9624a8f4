"""The processes behind test_distributed: `python -m tests.training.ranks WORLD OUT CHECK...`.

torch is imported once; the ranks are forked from here, for each world size in turn. A check is a
function of (rank, world size, directory); what it returns is written to OUT/check.world.rank.json.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from capdistill import Captioner, Distiller, Trainer, encoders
from capdistill.training import GradNorm, LossRatio, SelfCritical, Uncertainty
from tests.training import tiny_models as tiny

IMAGES = 11
SIDE = tiny.SIDE
WORDS = ["red", "lime", "blue", "a", "dog", "cat"]


class Pictures:
    """Images of noise with captions of different lengths; `unreadable` cannot be read."""

    def __init__(self, count: int = IMAGES, unreadable: tuple[int, ...] = ()) -> None:
        self.image_ids = [f"{i}.png" for i in range(count)]
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, number: int) -> tuple[Tensor, list[str]]:
        if number in self.unreadable:
            raise OSError(f"image {number} is broken")
        chance = torch.Generator().manual_seed(number)
        image = torch.randint(256, (3, SIDE, SIDE), generator=chance, dtype=torch.uint8)
        words = [WORDS[(number * 5 + i) % 6] for i in range(1 + number % 4)]
        return image, [" ".join(words), " ".join(words[::-1])]


encoders.register("patches")(tiny.Patches)


def student(seed: int = 1, **options: Any) -> Captioner:
    """A tiny student that a file can describe."""
    made = tiny.make_student(seed, **options)
    encoder = encoders.create("patches")
    encoder.load_state_dict(made.encoder.state_dict())
    return Captioner(encoder, made.decoder, made.tokenizer, name="student")


OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "progress": False,
    "augment": False,
    "captions_per_image": 2,
    "num_workers": 0,
    "log_every": 1,
    "learning_rate": 0.05,
    "warmup": 0.0,
    "monitor": "bleu_1",
    "metrics": ("bleu",),
}


def distiller(seed: int = 1, **options: Any) -> Distiller:
    weights = options.pop("weights", {"ce": 0.5, "token": 0.5, "hidden": 0.3})
    losses = {"token": "token", "hidden": "hidden", "feature": "feature"}
    trainer = Distiller(tiny.make_teacher(2), student(seed), losses, weights, **OPTIONS, **options)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    return trainer


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam would blow up the rounding of gradients that are 0 in exact arithmetic."""
    return torch.optim.SGD(groups, momentum=0.9)


def digest(trainer: Trainer) -> list[float]:
    """All weights."""
    values = [v.double().reshape(-1) for v in trainer.objective.state_dict().values()]
    return torch.cat(values).tolist()  # type: ignore[no-any-return]


def found(trainer: Trainer) -> dict[str, Any]:
    rows = trainer.history.rows
    return {
        "weights": digest(trainer),
        "losses": [row["loss"] for row in rows if row["kind"] == "step"],
        "norms": [row["gradient_norm"] for row in rows if row["kind"] == "step"],
        "images": [row["images"] for row in rows if row["kind"] == "epoch"],
        "val": [row["val"] for row in rows if row["kind"] == "epoch"],
        "scores": [row["scores"] for row in rows if row["kind"] == "epoch"],
        "skipped": [row["skipped"] for row in rows if row["kind"] == "epoch"],
        "stopped": trainer.history.stopped,
    }


# -- checks -----------------------------------------------------------------------------------


def training(rank: int, world: int, out: Path) -> Any:
    """Two epochs over 11 images, 4 a step over all ranks: the last step has 3, uneven on ranks."""
    trainer = distiller(seed=1 if rank == 0 else 5)  # the weights of rank 0 count
    trainer.fit(Pictures(), Pictures(7), epochs=2, batch_size=4 // world, out=out / "training")
    return found(trainer)


def accumulation(rank: int, world: int, out: Path) -> Any:
    """Steps of two micro-batches; GradNorm, an average, word dropout by image."""
    trainer = distiller(weights=GradNorm(every=1), ema_decay=0.9, word_dropout=0.3)
    trainer.fit(Pictures(), epochs=2, batch_size=4 // world, accumulation_steps=2)
    return found(trainer)


def uncertainty(rank: int, world: int, out: Path) -> Any:
    trainer = distiller(weights=Uncertainty(learning_rate=0.1), on_policy=0.5)
    trainer.fit(Pictures(), epochs=2, batch_size=4 // world, accumulation_steps=2)
    return found(trainer)


def ratio(rank: int, world: int, out: Path) -> Any:
    trainer = distiller(weights=LossRatio(every=1))
    trainer.fit(Pictures(), epochs=2, batch_size=4 // world)
    return found(trainer)


def reward(rank: int, world: int, out: Path) -> Any:
    references = {name: Pictures()[i][1] for i, name in enumerate(Pictures().image_ids)}
    trainer = SelfCritical(student(3), "bleu_1", references=references, samples=2, **OPTIONS)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    trainer.fit(Pictures(), epochs=2, batch_size=4 // world)
    rows = trainer.history.rows
    rewards = [row["reward"] for row in rows if row["kind"] == "step"]
    epochs = [row["train"]["reward"] for row in rows if row["kind"] == "epoch"]
    return {**found(trainer), "rewards": rewards, "epochs": epochs}


CHECKS: dict[str, Callable[[int, int, Path], Any]] = {
    check.__name__: check for check in (training, accumulation, uncertainty, ratio, reward)
}


def run(rank: int, world: int, port: int, out: Path, names: list[str]) -> None:
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for name in names:
        began = time.perf_counter()
        folder = out / str(world)
        folder.mkdir(exist_ok=True)
        try:
            result = CHECKS[name](rank, world, folder)
        except BaseException as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        result["seconds"] = time.perf_counter() - began
        (out / f"{name}.{world}.{rank}.json").write_text(json.dumps(result))


def main() -> None:
    worlds, out, *names = sys.argv[1:]
    for world in map(int, worlds.split(",")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (world, port, Path(out), names or list(CHECKS))
        mp.start_processes(run, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
