"""What training costs on a CUDA device: waits of the host, precisions, and how busy the device is.

    python benchmarks/device.py                       # photos of the package, read again and again
    python benchmarks/device.py --images flickr8k/images --batch 64

Teacher and student are the presets vit_transformer and lite0_lstm with random weights; a step has
up to four terms. First the places are counted where a step waits for the device, as torch reports
them. Then precisions take turns, on request `torch.compile` too. Last, `fit` trains on JPEG files;
the driver's share of time in which a kernel ran is read (package `nvidia-ml-py`), second half only.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from training import make_batch

import capdistill as cd

WEIGHTS = {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
WORDS = [f"word{n}" for n in range(3000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="directory of JPEG files, for `fit`")
    parser.add_argument("--count", type=int, default=4096, help="images of `fit`")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each variant")
    parser.add_argument("--workers", type=int, help="of `fit`; by default as it chooses")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile (minutes)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    print_waits()
    print_steps(options.batch, options.steps, options.compile)
    print_fit(options)


def distiller(tokenizer: cd.WordTokenizer | None = None, **options: Any) -> cd.Distiller:
    tokenizer = tokenizer or cd.WordTokenizer(WORDS)
    torch.manual_seed(0)
    teacher = cd.Captioner.create(
        "vit_transformer", tokenizer=tokenizer, encoder={"weights": False}
    )
    student = cd.Captioner.create(
        "lite0_lstm", tokenizer=tokenizer, encoder={"weights": False, "trainable": "all"}
    )
    weights = options.pop("weights", WEIGHTS)
    trainer = cd.Distiller(teacher, student, weights=weights, device="cuda", **options)
    trainer.objective.train()
    teacher.eval()
    return trainer


def print_waits() -> None:
    """Where a step waits, by terms; the aim is once."""
    for terms in (["token"], ["token", "feature", "hidden"]):
        weights = {name: WEIGHTS[name] for name in ["ce", *terms]}
        losses = {name: name for name in terms}
        trainer = distiller(weights=weights, losses=losses, schedule="constant")
        batch = make_batch(4, 2, 224)
        for _ in range(3):
            trainer.step(batch)
        found = waits(lambda trainer=trainer, batch=batch: trainer.step(batch))  # type: ignore[misc]
        print(f"waits of a step with {', '.join(weights)}: {len(found)}", flush=True)
        for place in found:
            print("   ", place)


def waits(work: Callable[[], Any]) -> list[str]:
    """Places where the host waits for the device during the work."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA" in str(w.message)]


def print_steps(images: int, steps: int, compiled: bool) -> None:
    """Milliseconds of a step in each precision; the variants take turns."""
    variants: dict[str, dict[str, Any]] = {
        name: {"precision": name} for name in ("fp32", "bf16", "fp16")
    }
    if compiled:
        variants["bf16, compiled"] = {"precision": "bf16", "compile": True}
    batch = make_batch(images, 5, 224)
    trainers = {n: distiller(schedule="constant", **v) for n, v in variants.items()}
    for trainer in trainers.values():
        for _ in range(5):
            trainer.step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(steps):
        for name, trainer in trainers.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            trainer.step(batch)
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["fp32"])
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"step of {images} x 5, {name}: {1e3 * middle:.1f} ms, {base / middle:.2f} x fp32")


def print_fit(options: argparse.Namespace) -> None:
    """An epoch of `fit`: images per second, and the share of time in which a kernel ran."""
    sample = cd.data.sample().train
    texts = cycle(example.captions for example in sample.examples)
    given = sorted(options.images.glob("*.jpg")) if options.images else []
    files = cycle(given or [example.path for example in sample.examples])
    numbers = range(options.count)
    rows = zip(numbers, files, texts, strict=False)
    data = cd.data.CaptionData([cd.data.Example(f"{n}", path, words) for n, path, words in rows])
    trainer = distiller(
        cd.WordTokenizer.train(data.captions, min_count=1),
        batch_size=options.batch,
        captions_per_image=5,
        num_workers=options.workers,
        epochs=2,
        progress=False,
        precision="bf16",
    )
    busy, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            busy.append(torch.cuda.utilization())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    history = trainer.fit(data)
    stop.set()
    watching.join()
    last = history.epochs[-1]
    rate = options.count / last["seconds"]
    share = statistics.mean(busy[len(busy) // 2 :])
    print(f"fit, batches of {options.batch} x 5: {rate:.0f} images/s, device busy {share:.0f} %")


if __name__ == "__main__":
    main()
