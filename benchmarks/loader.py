"""Images per second of `capdistill.data.Loader` against bare Pillow in the same worker processes.

    python benchmarks/loader.py --images flickr8k/images
    python benchmarks/loader.py --images flickr8k/images --workers 0 4 --size 224

"bare" is a torch DataLoader whose data set opens a file, decodes it to RGB, resizes the centred
square and makes a tensor of it: no captions, no random crop, no orientation, no check of any kind.
Epochs alternate in one process; the ratio is the median over pairs that followed each other. The
ratio of processor time is given, too, where there are no workers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import capdistill as cd

WORDS = [f"word{n}" for n in range(500)]


class Bare(Dataset[Tensor]):
    """Decode and resize."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        image = Image.open(self.files[number]).convert("RGB")
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        square = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="directory of JPEG files")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=160, help="rows and columns in the batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(options.images.glob("*.jpg"))[: options.count]
    for workers in options.workers:
        print(compare(files, options.size, workers, options.rounds), flush=True)


def compare(files: list[Path], size: int, workers: int, rounds: int) -> str:
    rng = random.Random(0)
    examples = [
        cd.data.Example(f.name, f, tuple(" ".join(rng.choices(WORDS, k=10)) for _ in range(5)))
        for f in files
    ]
    loader = cd.data.Loader(
        cd.data.CaptionData(examples),
        cd.WordTokenizer(WORDS),
        image_size=size,
        batch_size=16,
        train=True,
        num_workers=workers,
    )
    bare = DataLoader(
        Bare(files, size), batch_size=16, num_workers=workers, persistent_workers=workers > 0
    )
    sides: list[Callable[[], Iterable[Any]]] = [lambda: loader.epoch(0), lambda: bare]
    clocks = (time.perf_counter, time.process_time)
    seconds: list[list[list[float]]] = [[[], []], [[], []]]  # by clock, then by side
    wall, processor = seconds
    for number in range(rounds + 1):
        for side, iterate in enumerate(sides):
            began = [clock() for clock in clocks]
            for _ in iterate():
                pass
            for clock, start, kept in zip(clocks, began, seconds, strict=True):
                if number:  # the first starts the workers
                    kept[side].append(clock() - start)
    ours, theirs = (len(files) / statistics.median(each) for each in wall)
    found = (
        f"{len(files)} JPEG files to {size} px, {workers} workers: Loader {ours:.0f} images/s, "
        f"bare {theirs:.0f} images/s, ratio {ratio(wall):.2f}"
    )
    return found if workers else f"{found}, of processor time {ratio(processor):.2f}"


def ratio(seconds: list[list[float]]) -> float:
    """Speed of the loader over that of the bare one."""
    return statistics.median(b / a for a, b in zip(*seconds, strict=True))


if __name__ == "__main__":
    main()
