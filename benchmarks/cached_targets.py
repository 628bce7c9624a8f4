"""A step of distillation from cached targets beside a step of cross-entropy of the same student.

    python benchmarks/cached_targets.py --vocabulary 3000
    python benchmarks/cached_targets.py --vocabulary 30000 --top-k 64

The student is tf_efficientnet_lite0 with a frozen trunk and an LSTM of width 512; its trunk's
output is cached. The teacher is the same trunk with a Transformer of width 512. All sides take
their steps in turn in one process, on the same batches of 16 images with 5 captions: cross-entropy,
token distillation from cached dense targets, from cached top-k targets (if asked for), and from
the live teacher with its trunk cached. Printed are ratios of the medians, and the time that caching
takes beside a plain forward pass of the teacher over the same batches. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import capdistill as cd
from capdistill.data import CaptionData, Example
from capdistill.outputs import Batch
from capdistill.runtime import autocast
from capdistill.training.sources import open_sources

BATCH: dict[str, Any] = {"batch_size": 16, "captions_per_image": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--top-k", type=int, help="also cache this many words per token")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for line in compare(Path(folder), options):
            print(line, flush=True)


def compare(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    words = [f"w{n}" for n in range(options.vocabulary)]
    data = make_data(folder, options.images, words)
    tokenizer = cd.WordTokenizer(words)
    transformer = ("transformer", {"dim": 512, "width": 512, "layers": 2, "ffn": 1024})
    teacher = make(tokenizer, *transformer).eval()
    common: dict[str, Any] = {"precision": options.precision, "cache_features": True}
    common |= {"cache_dir": folder / "maps", "progress": False, "device": "cpu"}
    began = time.perf_counter()
    dense = cd.teachers.cache(teacher, data, folder / "dense", **common)
    caching = time.perf_counter() - began
    sides = {"cross-entropy": None, "dense": dense, "live": teacher}
    if options.top_k:
        sides["top-k"] = cd.teachers.cache(
            teacher,
            data,
            folder / "top_k",
            top_k=options.top_k,
            temperatures=2.0,
            min_mass=0,
            **common,
        )
    steps = {name: make_step(tokenizer, side, common) for name, side in sides.items()}
    batches = make_batches(make_trainer(tokenizer, None, common), data)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.steps + 3):
        for name in random.Random(number).sample(list(steps), len(steps)):
            began = time.perf_counter()
            steps[name](batches[number % len(batches)])
            if number >= 3:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        ratio = value / medians["cross-entropy"]
        yield f"{name:14}{value * 1e3:8.1f} ms{ratio:8.2f} of cross-entropy"
    began = time.perf_counter()
    cd.teachers.cache(teacher, data, folder / "again", **common)
    again = time.perf_counter() - began
    plain = forward_seconds(teacher, make_batches(make_trainer(tokenizer, teacher, common), data))
    yield f"caching {again:.2f} s ({caching:.2f} s with its trunk), {again / plain:.2f} of forward"


def make_data(folder: Path, count: int, words: list[str]) -> CaptionData:
    chance = random.Random(0)
    examples = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        Image.effect_noise((224, 224), 40 + number).convert("RGB").save(path)
        captions = [" ".join(chance.sample(words, chance.randint(6, 16))) for _ in range(5)]
        examples.append(Example(path.name, path, captions))
    return CaptionData(examples)


def make(tokenizer: cd.WordTokenizer, decoder: str, arguments: dict[str, Any]) -> cd.Captioner:
    torch.manual_seed(0)
    encoder = cd.encoders.create(
        "timm",
        name="tf_efficientnet_lite0",
        dim=arguments["dim"],
        weights=False,
        trainable="none",
    )
    return cd.Captioner(encoder, cd.decoders.create(decoder, **arguments), tokenizer, name=decoder)


def make_trainer(tokenizer: cd.WordTokenizer, teacher: Any, common: dict[str, Any]) -> cd.Trainer:
    student = make(tokenizer, "lstm", {"dim": 256, "hidden": 512, "layers": 1, "dropout": 0.4})
    how = {**common, **BATCH, "schedule": "constant"}
    if teacher is None:
        return cd.Trainer(student, **how)
    losses = {"token": {"name": "token", "temperature": 2.0}}
    return cd.Distiller(teacher, student, losses=losses, **how)


def make_batches(trainer: cd.Trainer, data: CaptionData) -> list[Batch]:
    return list(open_sources(trainer, data)[0].epoch(0))


def make_step(
    tokenizer: cd.WordTokenizer, teacher: Any, common: dict[str, Any]
) -> Callable[[Batch], object]:
    trainer = make_trainer(tokenizer, teacher, common)
    for model in trainer.models[1:]:
        model.eval()
    trainer.objective.train()
    return trainer.step


def forward_seconds(teacher: cd.Captioner, batches: list[Batch]) -> float:
    with torch.no_grad(), autocast(torch.device("cpu"), "auto"):
        for batch in batches[:1]:
            teacher(batch)
        began = time.perf_counter()
        for batch in batches:
            teacher(batch)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
