"""Training against a loop written by hand: what `step` and `fit` cost beside plain PyTorch.

    python benchmarks/training.py step
    python benchmarks/training.py fit --images flickr8k/images

`step` alternates `Distiller.step` with a loop of the same modules in one process: same batch, same
optimizer, same losses, and prints the ratio of the medians for micro-batches of 8 images x 2
captions, of 16 x 5 and of 1 x 1. `fit` trains on JPEG files with the default options for reading,
beside a loop with a torch DataLoader whose data set decodes, crops and tokenises the same images in
the same number of worker processes; their epochs alternate. Every figure is a ratio within one run.
The ratio of processor time is given, too, where there are no workers: other programs on the machine
hardly change it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import capdistill as cd
from capdistill.data.images import random_square, read_image
from capdistill.losses.divergence import cross_entropy
from capdistill.outputs import Batch
from capdistill.runtime import autocast
from capdistill.tokenizer import pad_batch

WORDS = [f"word{n}" for n in range(500)]
WEIGHTS = {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
SAME: dict[str, Any] = {"schedule": "constant", "label_smoothing": 0.0, "device": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "fit"])
    parser.add_argument("--images", type=Path, help="directory of JPEG files, for `fit`")
    parser.add_argument("--count", type=int, default=512, help="images of `fit`")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each side")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each side of `fit`")
    parser.add_argument("--workers", type=int, help="of `fit`; by default as it chooses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "step":
        for images, k in ((8, 2), (16, 5), (1, 1)):
            print(f"{images} x {k}: {compare_steps(images, k, options.steps)}", flush=True)
    elif options.images is None:
        parser.error("fit needs --images, a directory of JPEG files")
    else:
        files = sorted(options.images.glob("*.jpg"))[: options.count]
        print(compare_fits(files, options.epochs, options.workers))


# -- one step -----------------------------------------------------------------------------------


def make_pair() -> tuple[cd.Captioner, cd.Captioner]:
    torch.manual_seed(0)
    tokenizer = cd.WordTokenizer(WORDS)
    teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
    return teacher, cd.Captioner.create("debug_student", tokenizer=tokenizer)


def make_distiller() -> cd.Distiller:
    teacher, student = make_pair()
    return cd.Distiller(teacher, student, weights=WEIGHTS, **SAME)


def make_batch(images: int, k: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(WORDS), (images * k, 14), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    return Batch(
        images=torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator),
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        captions=("",) * len(ids),
        image_ids=tuple(map(str, range(images))),
    )


def hand_written(distiller: cd.Distiller) -> Callable[[Batch], float]:
    """A loop of the same modules as one would write it without the library's trainer."""
    student, teacher, losses = distiller.student, distiller.teacher, distiller.objective.losses
    need = distiller.objective.needed_outputs | {"logits"}
    parameters = [p for p in distiller.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    teacher.eval()

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(distiller.device, distiller.precision):
            with torch.no_grad():
                wanted = teacher(batch, need=need)
            output = student(batch, need=need)
            tokens, images = batch.target_mask.sum(), batch.num_images
            loss = cross_entropy(output.logits, batch.targets, batch.target_mask)
            loss = WEIGHTS["ce"] * loss / tokens
            for name, term in losses.items():
                divisor = images if name == "feature" else tokens
                loss = loss + WEIGHTS[name] * term(output, wanted, batch) / divisor
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def compare_steps(images: int, k: int, steps: int) -> str:
    distiller = make_distiller()
    size = max(distiller.teacher.image_size, distiller.student.image_size)
    batch = make_batch(images, k, size)
    plain = hand_written(distiller)
    distiller.objective.train()
    distiller.teacher.eval()  # as `fit` does once; otherwise every step restores its flags
    for _ in range(5):
        distiller.step(batch)
        plain(batch)
    sides: list[Callable[[], Any]] = [lambda: distiller.step(batch), lambda: plain(batch)]
    seconds: list[list[float]] = [[], []]  # of the processor
    wall = alternate(sides, steps, seconds)
    processor = statistics.median(m / o for m, o in zip(*seconds, strict=True))
    return f"{report(*wall)}, of processor time {processor:.3f}"


# -- a whole fit ----------------------------------------------------------------------------------


class Pictures(Dataset[tuple[Tensor, list[str], str]]):
    """The same images for a plain loop: read, cropped and put together by hand."""

    def __init__(self, examples: list[Any], size: int) -> None:
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> tuple[Tensor, list[str], str]:
        example = self.examples[number]
        pixels = random_square(read_image(example.path), self.size, torch.Generator())
        return pixels, list(example.captions), example.image_id


def collate(tokenizer: cd.WordTokenizer, items: list[tuple[Tensor, list[str], str]]) -> Batch:
    captions = [caption for _, texts, _ in items for caption in texts]
    ids, mask = pad_batch([tokenizer.encode(text) for text in captions], tokenizer.pad_id)
    return Batch(
        images=torch.stack([pixels for pixels, _, _ in items]),
        input_ids=ids,
        mask=mask,
        captions=tuple(captions),
        image_ids=tuple(image_id for _, _, image_id in items),
    )


class Collate:
    """Picklable, for worker processes that are spawned."""

    def __init__(self, tokenizer: cd.WordTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: list[tuple[Tensor, list[str], str]]) -> Batch:
        return collate(self.tokenizer, items)


def compare_fits(files: list[Path], epochs: int, workers: int | None) -> str:
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(WORDS, k=10)) for _ in range(2)] for _ in files]
    examples = [
        cd.data.Example(file.name, file, tuple(captions))
        for file, captions in zip(files, texts, strict=True)
    ]
    ours, theirs = make_distiller(), make_distiller()
    step = hand_written(theirs)
    size = max(ours.teacher.image_size, ours.student.image_size)
    clocks = (time.perf_counter, time.process_time)
    seconds: list[list[list[float]]] = [[[], []], [[], []]]  # by clock, then by side

    class Epochs(cd.training.Callback):
        """After each epoch of `fit`, one of the plain loop."""

        def on_fit_start(self, trainer: Any) -> None:
            self.workers = trainer.train_source.num_workers
            self.loader = DataLoader(
                Pictures(examples, size),
                batch_size=16,
                shuffle=True,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                collate_fn=Collate(theirs.student.tokenizer),
            )
            self.began = [clock() for clock in clocks]

        def on_epoch(self, trainer: Any, row: Any) -> None:
            done = [clock() for clock in clocks]
            theirs.objective.train()
            for batch in self.loader:
                step(batch)
            ended = [clock() for clock in clocks]
            for number, kept in enumerate(seconds):
                kept[0].append(done[number] - self.began[number])
                kept[1].append(ended[number] - done[number])
            self.began = [clock() for clock in clocks]

    timed = Epochs()
    options: dict[str, Any] = {"cache_features": False, "progress": False, "num_workers": workers}
    options |= {"batch_size": 16, "captions_per_image": 2, "callbacks": [timed]}
    ours.fit(cd.data.CaptionData(examples), epochs=epochs + 1, **options)
    wall, processor = ([side[1:] for side in kept] for kept in seconds)  # the first warms up
    found = f"an epoch of {len(files)} JPEG files, {timed.workers} workers: {report(*wall)}"
    if timed.workers:
        return found
    ratio = statistics.median(m / o for m, o in zip(*processor, strict=True))
    return f"{found}, of processor time {ratio:.3f}"


def alternate(
    sides: list[Callable[[], Any]], times: int, processor: list[list[float]] | None = None
) -> list[list[float]]:
    """Seconds of each side, run in turn; those of the processor are added to the given lists."""
    seconds: list[list[float]] = [[] for _ in sides]
    processor = [[] for _ in sides] if processor is None else processor
    turns = list(zip(sides, seconds, processor, strict=True))
    for _ in range(times):
        turns.reverse()  # what one side leaves in memory and caches meets both
        for side, kept, worked in turns:
            began, began_work = time.perf_counter(), time.process_time()
            side()
            kept.append(time.perf_counter() - began)
            worked.append(time.process_time() - began_work)
    return seconds


def report(mine: list[float], other: list[float]) -> str:
    """Medians, and the median ratio of runs that followed each other: they met the same load."""
    ours, plain = statistics.median(mine), statistics.median(other)
    ratio = statistics.median(m / o for m, o in zip(mine, other, strict=True))
    return f"capdistill {ours * 1e3:.1f} ms, by hand {plain * 1e3:.1f} ms, ratio {ratio:.3f}"


if __name__ == "__main__":
    main()
