"""The processes behind test_distributed: `python -m tests.training.ranks OUT`.

torch is imported once; the ranks are forked from here, for each world size in turn. A check is a
function of (rank, world size, directory); what it returns is written to OUT/check.world.rank.json.
"""

from __future__ import annotations

import json
import os
import signal
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
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from capdistill import Captioner, Distiller, Trainer, encoders
from capdistill.data import CaptionData, Curriculum, Example
from capdistill.errors import CapdistillError
from capdistill.outputs import Batch
from capdistill.runtime import generator
from capdistill.teachers import MeanTeacher, cache
from capdistill.tokenizer import WordTokenizer
from capdistill.training import GradNorm, LossRatio, SelfCritical, Uncertainty
from capdistill.training.sharding import whole
from tests.losses.tiny_tokenizers import Pieces
from tests.training import tiny_models as tiny

IMAGES = 11
SIDE = tiny.SIDE
WORDS = ["red", "lime", "blue", "a", "dog", "cat"]


SMALLER = WordTokenizer(WORDS[:3])


class Fewer(WordTokenizer):
    """The words of another tokenizer but its last ones."""

    full_ids, full_vocabulary = (
        (*range(10),),
        ("<pad>", "<start>", "<end>", "<unk>", *WORDS, "owl", "fox"),
    )


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


def student(seed: int = 1, **options: Any) -> Captioner:
    """A tiny student that a file can describe: its encoder is registered in this process."""
    if "patches" not in encoders.names():
        encoders.register("patches")(tiny.Patches)
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
    options = {**OPTIONS, **options}
    trainer = Distiller(tiny.make_teacher(2), student(seed), losses, weights, **options)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    return trainer


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam would blow up the rounding of gradients that are 0 in exact arithmetic."""
    return torch.optim.SGD(groups, momentum=0.9)


def digest(trainer: Trainer) -> list[float]:
    """All weights."""
    state = trainer.objective.state_dict()
    values = [whole(v).double().reshape(-1) for v in state.values()]
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


def quantized(rank: int, world: int, out: Path) -> Any:
    """The range that two steps found without a calibration, over all ranks."""
    options = {**OPTIONS, "quantize": "int8"}
    trainer = Distiller(tiny.make_teacher(), tiny.make_student(mix=True), **options)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    given = [tiny.make_batch([2, 5, 3], first=1), tiny.make_batch([4], first=7)]
    mine: list[Batch | None] = [given[rank]] if world == 2 else [*given]
    first = trainer.step(*mine)["loss"]
    trainer.step(None if rank else given[0])
    return {"loss": first, "ranges": trainer.objective.quantizer.ranges.tolist()}  # type: ignore[union-attr]


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


def mean_teacher(rank: int, world: int, out: Path) -> Any:
    """A teacher that follows the student, whose weights differ at first; easy images first."""
    trained = student(1 + rank)
    losses, weights = {"token": "token"}, {"ce": 0.5, "token": 0.5}
    trainer = Distiller(MeanTeacher(trained, 0.9), trained, losses, weights, **OPTIONS)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    data = Curriculum(Pictures(), start=0.4, until=0.5)
    trainer.fit(data, epochs=3, batch_size=4 // world)
    followed = [value.tolist() for value in trainer.averages["teacher"].average]
    return {**found(trainer), "followed": followed}


def words(rank: int, world: int, out: Path) -> Any:
    """A teacher of other pieces reads the captions itself; half of them are the student's own."""
    pieces = Pieces(["Ġdog", "Ġred", "li", "me", "Ġblue", "blue", "Ġa", "Ġcat"], "byte_level")
    teacher = tiny.make_teacher(2, tokenizer=pieces)
    losses = {"word": "word", "universal": {"name": "universal", "align": "position"}}
    weights = {"ce": 0.5, **dict.fromkeys(losses, 1.0)}
    trainer = Distiller(teacher, student(), losses, weights, on_policy=0.5, **OPTIONS)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    trainer.fit(Pictures(), Pictures(7), epochs=2, batch_size=4 // world, accumulation_steps=2)
    return found(trainer)


def trimmed(rank: int, world: int, out: Path) -> Any:
    """A teacher of which the student lacks two words."""
    teacher = tiny.make_teacher(2, tokenizer=WordTokenizer([*WORDS, "owl", "fox"]))
    own = student()
    own.tokenizer = Fewer(WORDS)
    trainer = Distiller(teacher, own, {"token": "token"}, **OPTIONS)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    trainer.fit(Pictures(), Pictures(7), epochs=2, batch_size=4 // world)
    lost = [row["dropped_mass"] for row in trainer.history.epochs]
    return {**found(trainer), "lost": lost}


def own_loop(rank: int, world: int, out: Path) -> Any:
    """Two batches in one process, or one in each of two; then one of them has none."""
    trainer = distiller()
    trainer.steps_per_epoch = 2
    given = [tiny.make_batch([2, 5, 3], first=1), tiny.make_batch([4], first=7)]
    mine: list[Batch | None] = [given[rank]] if world == 2 else [*given]
    rows = [trainer.step(*mine), trainer.step(None if rank else given[0])]
    trainer.ranks.require_equal({"weights": digest(trainer)})
    return {"losses": [row["loss"] for row in rows], "weights": digest(trainer)}


def unreadable(rank: int, world: int, out: Path) -> Any:
    """Rank 1 of two can read neither of its images of the first step."""
    order = torch.randperm(IMAGES, generator=generator(0, "order", 0)).tolist()
    trainer = distiller()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Pictures(unreadable=tuple(order[2:4])), epochs=1, batch_size=4 // world)
    problems = trainer.history.epochs[0]["problems"]
    told = [w for w in said if "could not be used" in str(w.message)]
    return {**found(trainer), "problems": sorted(problems), "warnings": len(told)}


def features(rank: int, world: int, out: Path) -> Any:
    """Each image runs once through the frozen trunk, on one of the ranks; all read the files."""
    trainer = distiller()
    for parameter in trainer.student.encoder.trunk_parameters():
        parameter.requires_grad_(False)
    how: dict[str, Any] = {"cache_features": True, "cache_dir": out / "cache", "epochs": 2}
    trainer.fit(Pictures(), batch_size=4 // world, **how)
    return {**found(trainer), "seen": trainer.student.encoder.seen}


def targets(rank: int, world: int, out: Path) -> Any:
    """Targets of a teacher: its ranks share the images, and rank 0 writes what one would."""
    pictures, place = out / "pictures", out / "targets"
    if rank == 0:
        pictures.mkdir()
        for number in range(9):
            image = Pictures()[number][0].permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(pictures / f"{number}.png")
        (pictures / "3.png").write_bytes(b"broken")
        (out / "written").touch()
    while not (out / "written").exists():
        time.sleep(0.01)
    data = CaptionData(
        Example(path.name, path, Pictures()[int(path.stem)][1])
        for path in sorted(pictures.iterdir())
    )
    how: dict[str, Any] = {"batch_size": 2, "cache_views": 2, "flip": True, "keep": ["features"]}
    how |= {"device": "cpu", "precision": "fp32", "progress": False}
    cache(tiny.make_teacher(3), data.subset(4), place, **how)
    shared = tiny.make_teacher(2)
    cache(shared, data.subset(5), place, overwrite=True, **how)
    cached = cache(shared, data, place, **how)  # adds what is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the broken image
        trainer = Distiller(cached, student(), {"token": "token"}, **OPTIONS)
        trainer.fit(data, epochs=1, batch_size=4 // world)
    seen = shared.encoder.seen
    apart = cache(
        shared, data, out / f"apart {rank}", **how
    ).directory  # disks of several computers
    written, own = (
        {each.name: each.read_bytes().hex() for each in sorted(folder.iterdir())}
        for folder in (place, apart)
    )
    return {"files": written, "apart": own, "seen": seen, "losses": found(trainer)["losses"]}


class Notes:
    """Which ranks call it; it ends the run after the first epoch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step(self, trainer: Any, row: Any) -> None:
        self.calls.append("step")

    def on_epoch(self, trainer: Any, row: Any) -> None:
        self.calls.append("epoch")
        trainer.stopping = True


def callbacks(rank: int, world: int, out: Path) -> Any:
    notes, trainer = Notes(), distiller(ema_decay=0.5)
    trainer.fit(Pictures(), Pictures(3), epochs=3, batch_size=2, callbacks=[notes], out=out / "c")
    rows = len(trainer.history.rows)
    return {"calls": notes.calls, "rows": rows, "best": trainer.history.best is not None}


def norms(rank: int, world: int, out: Path) -> Any:
    """Batch norms see the images of their rank; the statistics kept are those of rank 0."""
    trainer = Trainer(tiny.make_student(1, norm=True), **OPTIONS)
    trainer.fit(Pictures(), Pictures(5), epochs=2, batch_size=3, monitor="loss")
    trainer.ranks.require_equal({"weights": digest(trainer)})
    return found(trainer)


def distiller_with_dropout(stop_at: int | None = None) -> Distiller:
    """Rank 1 gets Ctrl-C in step `stop_at`."""
    trainer = distiller()
    for part in trainer.student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3

    def interrupt(batch: Batch) -> Batch:
        if trainer.step_count + 1 == stop_at and trainer.ranks.rank == 1:
            signal.raise_signal(signal.SIGINT)
        return batch

    trainer.prepare_batch = interrupt  # type: ignore[method-assign]
    return trainer


def interrupted(rank: int, world: int, out: Path) -> Any:
    """Stopped by rank 1 within epoch 2 and continued, against a run that never stopped."""
    whole = distiller_with_dropout()
    whole.fit(Pictures(), epochs=2, batch_size=2)
    stopped, how = distiller_with_dropout(4), {"epochs": 2, "batch_size": 2, "out": out / "stops"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stopped.fit(Pictures(), **how)
    again = distiller_with_dropout()
    again.fit(Pictures(), resume=True, **how)
    # A run without dropout, which one process will continue.
    plain = distiller_with_dropout(4)
    for part in plain.student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        plain.fit(Pictures(), epochs=2, batch_size=2, out=out / "moves")
    return {
        "steps": stopped.step_count,
        "interrupted": stopped.history.interrupted,
        "warnings": len(said),
        "same": digest(again) == digest(whole),
        "losses": [row["loss"] for row in again.history.steps],
        "whole": [row["loss"] for row in whole.history.steps],
    }


def moved(rank: int, world: int, out: Path) -> Any:
    """One process continues what two began."""
    trainer = distiller()
    place = out.parent / "2" / "moves"
    try:
        trainer.fit(Pictures(), epochs=2, batch_size=3, out=place, resume=True)
    except CapdistillError as error:
        refused = str(error)
    trainer.fit(Pictures(), epochs=2, batch_size=4, out=place, resume=True)
    whole = distiller()
    whole.fit(Pictures(), epochs=2, batch_size=4)
    return {"weights": digest(trainer), "whole": digest(whole), "refused": refused}


def shard(module: torch.nn.Module) -> torch.nn.Module:
    """FSDP2 around the objective, and around a layer in it."""
    fully_shard(module.student.encoder.project)  # type: ignore[operator, union-attr]
    return fully_shard(module)  # type: ignore[return-value]


def sharded(rank: int, world: int, out: Path) -> Any:
    """FSDP2 around the trained module, interrupted and resumed, with the state of AdamW."""
    how: dict[str, Any] = {"epochs": 2, "batch_size": 4 // world, "out": out / "sharded"}
    how |= {"parallel": shard} if world > 1 else {}
    trainer = adam()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Interrupted")
        trainer.fit(Pictures(), Pictures(7), callbacks=[StopAfterOne()], **how)
    sizes = [p.to_local().numel() for p in trainer.captioner.parameters()] if world > 1 else []
    trainer = adam()
    trainer.fit(Pictures(), Pictures(7), resume=True, **how)
    loaded = Captioner.load(out / "sharded" / "best").state_dict()
    best = [v.double().flatten().tolist() for v in loaded.values()]
    kept = [whole(v).double().flatten().tolist() for v in trainer.captioner.state_dict().values()]
    result = found(trainer)
    del result["weights"]
    return {**result, "best": best, "kept": kept, "share": sum(sizes)}


class StopAfterOne:
    def on_epoch(self, trainer: Any, row: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def adam() -> Distiller:
    trainer = distiller(learning_rate=1e-3)
    del trainer.make_optimizer
    return trainer


def sharded_teacher(rank: int, world: int, out: Path) -> Any:
    teacher = tiny.make_teacher(2)
    if world > 1:
        fully_shard(teacher)
    losses = {"token": "token", "hidden": "hidden"}
    trainer = Distiller(teacher, student(), losses, **OPTIONS)
    trainer.make_optimizer = sgd  # type: ignore[method-assign]
    trainer.fit(Pictures(), Pictures(7), epochs=2, batch_size=4 // world)
    return found(trainer)


def unshardable(rank: int, world: int, out: Path) -> Any:
    messages = []
    for options in ({"ema_decay": 0.9}, {"on_policy": 0.5}, {"weights": Uncertainty()}):
        try:
            distiller(**options).fit(Pictures(), batch_size=2, parallel=shard)
        except CapdistillError as error:
            messages.append(str(error))
    return {"messages": messages}


def refused(rank: int, world: int, out: Path) -> Any:
    """What rank 0 refuses ends all with the same message; and ranks that differ are told."""
    messages = []
    ways: list[tuple[int, str, dict[str, Any]]] = [
        (2, "c", {}),  # it holds a run
        (2 + rank, "other", {}),
        (2, "other", {"batch_size": 2 + rank}),
        (2, "other", {"epochs": 1 + rank}),
    ]
    for seed, folder, options in ways:
        trainer = Distiller(tiny.make_teacher(seed), student(), {"token": "token"}, **OPTIONS)
        try:
            trainer.fit(Pictures(), out=out / folder, **{"batch_size": 2, **options})
        except CapdistillError as error:
            messages.append(str(error))
    own = Captioner.create(
        "debug_student", tokenizer=[tiny.TOKENIZER, SMALLER][rank], weights=False
    )
    try:
        Trainer(own, **OPTIONS).fit(Pictures(), batch_size=2)
    except CapdistillError as error:
        messages.append(str(error))
    return {"messages": messages}


def failing(rank: int, world: int, out: Path) -> Any:
    """An error on rank 1 in step 2; the process ends, as a script would."""
    trainer = distiller()

    def fail(batch: Batch) -> Batch:
        if trainer.step_count == 1 and rank == 1:
            raise ValueError("this computer has a broken disk")
        return batch

    trainer.prepare_batch = fail  # type: ignore[method-assign]
    trainer.fit(Pictures(), batch_size=2)


SHARED = (
    sharded,
    sharded_teacher,
    training,
    accumulation,
    uncertainty,
    ratio,
    quantized,
    reward,
    mean_teacher,
    words,
    trimmed,
    own_loop,
    unreadable,
    features,
    targets,
    norms,
)
OF: dict[int, tuple[Callable[[int, int, Path], Any], ...]] = {
    4: (training,),
    2: (*SHARED, callbacks, interrupted, unshardable, refused, failing),
    1: (*SHARED, moved),
}


def run(rank: int, world: int, port: int, out: Path) -> None:
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    folder = out / str(world)
    folder.mkdir(exist_ok=True)
    for check in OF[world]:
        began = time.perf_counter()
        try:
            result = check(rank, world, folder)
        except BaseException as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        result["seconds"] = time.perf_counter() - began
        (out / f"{check.__name__}.{world}.{rank}.json").write_text(json.dumps(result))


def main() -> None:
    out, *worlds = sys.argv[1:]
    if worlds[1:]:  # some checks only
        for world in OF:
            OF[world] = tuple(check for check in OF[world] if check.__name__ in worlds[1:])
        worlds = worlds[0].split(",")
    for world in map(int, worlds or OF):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(run, (world, port, Path(out)), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
