"""Time and memory of a distillation step against batch, caption length, vocabulary and losses.

    python benchmarks/scaling.py                                  # prints, and draws scaling.svg
    python benchmarks/scaling.py --out docs/scaling.svg --rounds 9

The models are the presets debug_teacher and debug_student, on one thread. Each panel changes one
thing of a step of 8 images x 2 captions of 12 words, 3,000 words, and CE + TokenKD. The points of a
panel take turns, so that a load on the machine meets all of them; the figure is the median. Memory
is the peak of what torch allocates within a step, beside the models and the optimizer's state.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from vocabulary_memory import peak_memory

import capdistill as cd
from capdistill.outputs import Batch
from capdistill.plots import finished, new_figure

LOSSES = ["token", "hidden", "feature", "relational", "jsd"]
PANELS: dict[str, list[Any]] = {
    "images": [2, 4, 8, 16, 32],
    "words of a caption": [6, 12, 24, 38],
    "vocabulary": [1000, 3000, 10_000, 30_000, 50_000],
    "losses": [0, 1, 2, 3, 4, 5],
}
Point = tuple[float, float]  # milliseconds, MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("scaling.svg"))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each point")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, values in PANELS.items():
        found[name] = measure(name, values, options.rounds, torch.device(options.device))
        for value, (milliseconds, size) in zip(values, found[name], strict=True):
            print(f"{name:18s} {value:6d}  {milliseconds:7.1f} ms  {size:7.1f} MiB", flush=True)
    draw(found, options.out)


def measure(name: str, values: list[Any], rounds: int, device: torch.device) -> list[Point]:
    """The median time and the peak of memory of a step at each value."""
    runs = [make(device, **{name.split()[0]: value}) for value in values]
    for distiller, batch in runs:
        distiller.step(batch)  # makes the optimizer
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for (distiller, batch), kept in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            distiller.step(batch)
            kept.append(time.perf_counter() - began)
    sizes = [peak_memory(lambda run=run: run[0].step(run[1]) and None, device) for run in runs]  # type: ignore[misc]
    times = (1e3 * statistics.median(kept) for kept in seconds)
    return [(t, size / 2**20) for t, size in zip(times, sizes, strict=True)]


def make(
    device: torch.device,
    images: int = 8,
    words: int = 12,
    vocabulary: int = 3000,
    losses: int = 1,
    captions: int = 2,
) -> tuple[cd.Distiller, Batch]:
    torch.manual_seed(0)
    tokenizer = cd.WordTokenizer([f"word{n}" for n in range(vocabulary)])
    teacher, student = (
        cd.Captioner.create(name, tokenizer=tokenizer)
        for name in ("debug_teacher", "debug_student")
    )
    chosen = {name: name for name in LOSSES[:losses]}
    distiller = cd.Distiller(
        teacher,
        student,
        losses=chosen,
        weights={"ce": 1.0, **dict.fromkeys(chosen, 0.1)},
        schedule="constant",
        precision="fp32",
        device=str(device),
    )
    teacher.eval()
    rows, size = images * captions, max(teacher.image_size, student.image_size)
    ids = torch.randint(4, vocabulary, (rows, words + 2))
    batch = Batch(
        images=torch.randint(256, (images, 3, size, size), dtype=torch.uint8),
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        captions=("",) * rows,
        image_ids=tuple(map(str, range(images))),
    )
    return distiller, batch.to(device)


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Time above, memory below; a small file with its text as text."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "font.size": 8}):
        figure = new_figure(path)
        figure.set_size_inches(9, 4)
        axes = figure.subplots(2, len(found), sharey="row")
        for column, (name, points) in enumerate(found.items()):
            for row, what in enumerate(("ms per step", "MiB")):
                axis = axes[row][column]
                axis.plot(PANELS[name], [point[row] for point in points], "o-", ms=3)
                if name == "vocabulary":
                    axis.set_xticks([0, 25_000, 50_000])
                if not column:
                    axis.set_ylabel(what)
            axes[1][column].set_xlabel("losses beside CE" if name == "losses" else name)
        for row in axes:
            row[0].set_ylim(bottom=0)
        finished(figure, path)


if __name__ == "__main__":
    main()
