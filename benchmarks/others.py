"""A step of cross-entropy and logit distillation: capdistill, torchdistill and timm.task.

    pip install torchdistill                 # recent versions of timm have timm.task
    python benchmarks/others.py
    python benchmarks/others.py --words 30000 --images 16 --captions 5

All train copies of one student with one teacher, on the same batch, with AdamW, clipped gradients
and the loss 0.3 CE + 0.7 T^2 KL per valid token; the losses of the first step must agree. Steps
alternate in one process. Memory is the peak of what torch allocates in one step.

The others are made for classifiers: `Flat` hands them the logits of the valid tokens as if each
were an image. What they cannot express is left out here: losses on features and hidden states that
skip padding, sums over accumulated batches divided once by their tokens, captions sampled from the
student. A package that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vocabulary_memory import peak_memory

import capdistill as cd
from capdistill.outputs import Batch

TEMPERATURE, CE, KD, RATE = 4.0, 0.3, 0.7, 1e-3
Step = Callable[[], float]


class Flat(nn.Module):
    """A captioner as a classifier of tokens."""

    def __init__(self, captioner: cd.Captioner, batch: Batch) -> None:
        super().__init__()
        self.captioner, self.batch = captioner, batch
        self.num_classes, self.in_chans = len(captioner.tokenizer), 3
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.captioner(self.batch, need=frozenset({"logits"})).logits
        assert logits is not None
        return logits[self.batch.target_mask]  # (n, V)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=3000)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--captions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    teacher, student, batch = make(options)
    steps: dict[str, Step] = {}
    for name, prepare in (("capdistill", ours), ("torchdistill", torchdistill), ("timm", timm)):
        try:
            steps[name] = prepare(copy.deepcopy(teacher), copy.deepcopy(student), batch)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
    losses = {name: step() for name, step in steps.items()}
    first = losses["capdistill"]
    assert all(abs(loss - first) < 1e-4 * abs(first) for loss in losses.values()), losses
    memory = {
        name: peak_memory(lambda step=step: step() and None, torch.device("cpu"))  # type: ignore[misc]
        for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(f"{options.images} x {options.captions}, {options.words} words")
    for name, kept in seconds.items():
        pairs = zip(seconds["capdistill"], kept, strict=True)
        print(
            f"{name:12s} {statistics.median(kept) * 1e3:7.1f} ms  {memory[name] / 2**20:6.1f} MiB  "
            f"capdistill takes {statistics.median(a / b for a, b in pairs):.2f} of its time, "
            f"{memory['capdistill'] / memory[name]:.2f} of its memory"
        )


def make(options: argparse.Namespace) -> tuple[cd.Captioner, cd.Captioner, Batch]:
    torch.manual_seed(0)
    tokenizer = cd.WordTokenizer([f"word{n}" for n in range(options.words)])
    teacher, student = (
        cd.Captioner.create(name, tokenizer=tokenizer)
        for name in ("debug_teacher", "debug_student")
    )
    for module in student.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # dropout: otherwise the losses could not be compared
        elif isinstance(module, nn.LSTM):
            module.dropout = 0.0
    rows = options.images * options.captions
    ids = torch.randint(4, options.words, (rows, 14))
    mask = torch.arange(14) < torch.randint(9, 15, (rows, 1))
    size = max(teacher.image_size, student.image_size)
    images = torch.randint(256, (options.images, 3, size, size), dtype=torch.uint8)
    names = tuple(map(str, range(options.images)))
    return teacher, student, Batch(images, ids, mask, ("",) * rows, names)


def ours(teacher: cd.Captioner, student: cd.Captioner, batch: Batch) -> Step:
    distiller = cd.Distiller(
        teacher,
        student,
        losses={"token": cd.TokenKD(TEMPERATURE)},
        weights={"ce": CE, "token": KD},
        learning_rate=RATE,
        encoder_lr_scale=1.0,
        label_smoothing=0.0,
        schedule="constant",
        precision="fp32",
        device="cpu",
    )
    teacher.eval()
    return lambda: float(distiller.step(batch)["loss"])


def torchdistill(teacher: cd.Captioner, student: cd.Captioner, batch: Batch) -> Step:
    from torchdistill.core.distillation import get_distillation_box

    logits = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    kd = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": CE}}
    config: dict[str, Any] = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {
            "key": "AdamW",
            "kwargs": {"lr": RATE, "weight_decay": 0.05},
            "max_grad_norm": 1.0,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    models = Flat(teacher, batch), Flat(student, batch)
    device = torch.device("cpu")
    box = get_distillation_box(*models, {}, config, device, None, False, 1.0)
    box.teacher_model.eval()
    box.student_model.train()
    targets = batch.targets[batch.target_mask]

    def step() -> float:
        loss = box.forward_process(batch.images, targets, {})
        box.post_forward_process(loss=loss)
        return float(loss.item())

    return step


def timm(teacher: cd.Captioner, student: cd.Captioner, batch: Batch) -> Step:
    from timm.task import LogitDistillationTask

    flat = Flat(student, batch)
    task = LogitDistillationTask(
        flat,
        Flat(teacher, batch),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=CE,
        distill_loss_weight=KD,
        temperature=TEMPERATURE,
        verbose=False,
    )
    task.train()
    parameters = [p for p in flat.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    targets = batch.targets[batch.target_mask]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = task(batch.images, targets)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.item())

    return step


if __name__ == "__main__":
    main()
