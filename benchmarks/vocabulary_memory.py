"""Memory and time of TokenKD and cross-entropy at vocabularies of 3,000 to 50,000 words.

    python benchmarks/vocabulary_memory.py
    python benchmarks/vocabulary_memory.py --losses token jsd ce --words 30000 --device cuda

For each vocabulary, a process of its own holds the logits (B, T, V) of student and teacher,
computes the losses forward and backward, and prints the peak of what torch allocates beside
these two, over the size of one such float32 tensor. "plain" is the same in a few lines of
torch.nn.functional. The gradient of the student's logits is 1 such tensor; while those of two
losses are added up there are two. The process may hold more: the C library does not return all that
is freed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

import capdistill as cd
from capdistill.losses.divergence import cross_entropy
from capdistill.outputs import Batch, CaptionerOutput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, nargs="+", default=[3000, 10_000, 30_000, 50_000])
    parser.add_argument("--losses", nargs="+", default=["ce", "token"])
    parser.add_argument("--captions", type=int, default=80, help="B, 16 images x 5 captions")
    parser.add_argument("--tokens", type=int, default=12, help="T")
    parser.add_argument("--times", type=int, default=3, help="timed rounds, of which the median")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", choices=["capdistill", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.words[0])))
        return
    names = ["capdistill"] + ["plain"] * (set(options.losses) == {"ce", "token"})
    for words in options.words:
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--words", str(words)]
            ran = subprocess.run([*command, "--one", name], capture_output=True, check=True)
            found = json.loads(ran.stdout)
            print(
                f"{words:6d} words  {name:10s}  {found['memory']:5.2f} x one float32 tensor of "
                f"{found['tensor'] / 2**20:5.1f} MiB  {found['seconds'] * 1e3:7.1f} ms",
                flush=True,
            )


def measure(options: argparse.Namespace, words: int) -> dict[str, float]:
    """Peak of memory over the size of one tensor, and seconds of one forward and backward."""
    torch.set_num_threads(1)
    device, shape = torch.device(options.device), (options.captions, options.tokens, words)
    make = {"capdistill": capdistill_losses, "plain": plain_losses}[options.one]
    run(make(options.losses, *tensors((1, 2, 8), device)))  # what the first call loads
    student, teacher, ids = tensors(shape, device)
    losses = make(options.losses, student, teacher, ids)
    student.grad = None
    peak, tensor = peak_memory(lambda: run(losses), device), 4 * student.numel()
    seconds = []
    for _ in range(options.times):
        student.grad = None
        began = time.perf_counter()
        run(losses)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"memory": peak / tensor, "tensor": tensor, "seconds": statistics.median(seconds)}


def tensors(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student = torch.randn(shape, device=device).requires_grad_()
    ids = torch.randint(shape[-1], (shape[0], shape[1] + 1), device=device)
    return student, torch.randn(shape, device=device), ids


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """The most that torch holds during the work beyond what it held before, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


Losses = list[Callable[[], Tensor]]


def run(losses: Losses) -> None:
    torch.stack([0.5 * loss() for loss in losses]).sum().backward()


def capdistill_losses(names: list[str], student: Tensor, teacher: Tensor, ids: Tensor) -> Losses:
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = len(ids)
    batch = Batch(
        images=torch.zeros(rows, 3, 0, 0, dtype=torch.uint8),
        input_ids=ids,
        mask=mask,
        captions=("",) * rows,
        image_ids=tuple(map(str, range(rows))),
    )
    mine, theirs = CaptionerOutput(logits=student), CaptionerOutput(logits=teacher)
    made: Losses = []
    for name in names:
        if name == "ce":
            made.append(lambda: cross_entropy(student, batch.targets, batch.target_mask, 0.1))
        else:
            loss = cd.losses.create(name)
            made.append(lambda loss=loss: loss(mine, theirs, batch))  # type: ignore[misc]
    return made


def plain_losses(names: list[str], student: Tensor, teacher: Tensor, ids: Tensor) -> Losses:
    rows, targets = student.flatten(0, 1), ids[:, 1:].flatten()

    def token() -> Tensor:
        mine, theirs = F.log_softmax(rows / 4.0, -1), F.softmax(teacher.flatten(0, 1) / 4.0, -1)
        return 16 * F.kl_div(mine, theirs, reduction="sum")

    def ce() -> Tensor:
        return F.cross_entropy(rows, targets, reduction="sum", label_smoothing=0.1)

    return [{"token": token, "ce": ce}[name] for name in names]


if __name__ == "__main__":
    main()
