"""`capdistill demo`: the whole way on the bundled photos, from nothing to a report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.common import DONE, INTERRUPTED, give, require_writable, say
from capdistill.cli.runfile import DistillRun, RunConfig, TrainRun, parse_run
from capdistill.errors import MissingExtra

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.data import Splits
    from capdistill.evaluation.comparison import Comparison

_EXAMPLE = """\
  capdistill demo
  capdistill demo --out first-look --epochs 20"""
_HONESTLY = """\
{images} photos teach the pipeline, not the language: the models below are tiny, start from random
weights and can only learn a few phrases. Scores on {held_out} photos are noise. What is real here
is the way: the same commands train on your data, starting from pretrained encoders."""
_LOOKS = 1  # photos in the report with what each model looked at
_TRAINING = {
    "batch_size": 8,
    "learning_rate": 3e-3,
    "encoder_lr_scale": 0.3,  # random encoders have everything to learn
    "schedule": "warmup_cosine",
    "cache_images": True,
    "patience": None,
    "device": "cpu",
    "precision": "fp32",  # models so small gain nothing from bf16
}
_TEACHER = {
    "preset": "debug_teacher",
    "encoder": {"kwargs": {"trainable": "all"}},
    "decoder": {"kwargs": {"layers": 2}},
}
_STUDENT = {
    "preset": "debug_student",
    "encoder": {"kwargs": {"trainable": "all"}},
    "decoder": {"kwargs": {"embed": 48, "hidden": 112}},
}
_LOSSES = {
    "token": {"kwargs": {"temperature": 2.0}},
    "feature": {},
    "hidden": {},
}


def demo_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `demo`."""
    parser = add(example=_EXAMPLE)
    parser.add_argument(
        "--out", default="capdistill-demo", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=24, metavar="N", help="of each model (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N photos of each split")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """The demo in one thread: on a busy machine, threads of models so small wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(threads)


def _run(options: argparse.Namespace) -> int:
    """Teacher, baseline, student, comparison, report."""
    from capdistill.evaluation.comparison import compare

    began, out = time.perf_counter(), Path(options.out)
    require_writable(out)
    runs = demo_runs(out, options.epochs, options.limit)
    data = runs["teacher"].data.load()
    say(_HONESTLY.format(images=len(data.all), held_out=len(data.val)))
    models: dict[str, Captioner] = {}
    for role, each in runs.items():
        captioner = _train(role, each, data)
        if captioner is None:
            return INTERRUPTED
        models[role] = captioner
    say("\nComparing the three on the photos that were held out ...")
    same: dict[str, Any] = {key: _TRAINING[key] for key in ("device", "precision")}
    same |= draw_curves({role: out / role for role in runs})
    found = compare(models["teacher"], models["student"], data.val, models["baseline"], **same)
    page = found.save(out / "report")
    seconds = time.perf_counter() - began
    content = {"seconds": seconds, "report": str(page), **found.to_json()}
    give(options, content, lambda: _ending(found, data, out, page, seconds))
    return DONE


def demo_runs(out: Path, epochs: int, limit: int | None = None) -> dict[str, RunConfig]:
    """The three runs in their order; each directory has its run file, to be run again.

    Example:
        >>> list(demo_runs(Path("demo"), epochs=2))
        ['teacher', 'baseline', 'student']
    """
    data = {"format": "sample", "limit": limit}
    training = {**_TRAINING, "epochs": epochs}
    common = {"data": data, "tokenizer": {"min_count": 2}, "train": training}
    baseline = {**common, "model": _STUDENT, "out": str(out / "baseline")}
    student = {
        "data": data,
        "train": training,
        "teacher": str(out / "teacher" / "best"),
        "student": _STUDENT,
        "losses": _LOSSES,
        "out": str(out / "student"),
    }
    return {
        "teacher": parse_run(TrainRun, {**common, "model": _TEACHER, "out": str(out / "teacher")}),
        "baseline": parse_run(TrainRun, baseline),
        "student": parse_run(DistillRun, student),
    }


def _train(role: str, run: RunConfig, data: Splits) -> Captioner | None:
    """Train one of the three; None where Ctrl-C ended it."""
    from capdistill.cli.train import execute

    titles = {
        "teacher": "Training the teacher",
        "baseline": "Training the small model by cross-entropy alone, as the baseline",
        "student": "Distilling the same small model from the teacher",
    }
    say(f"\n{titles[role]} ({run.train.epochs} epochs) ...")
    trainer, history = execute(run, data)
    if history.interrupted:
        return None
    first, last = (history.epochs[i]["train"]["terms"]["ce"]["raw"] for i in (0, -1))
    say(f"cross-entropy a word on the training captions: {first:.2f} -> {last:.2f}")
    return trainer.captioner


def draw_curves(directories: dict[str, Path]) -> dict[str, Any]:
    """Leave history.png in each run; the options of `compare` that have it draw as well.

    Without matplotlib there is neither, which is said.
    """
    from capdistill import plots

    try:
        for directory in directories.values():
            plots.history(directory, directory / "history.png")
    except MissingExtra as error:
        say(f"There will be no pictures. {error}")
        return {}
    return {"histories": directories, "attention": _LOOKS}


def _ending(found: Comparison, data: Splits, out: Path, page: Path, seconds: float) -> str:
    photo = data.val.examples[0].path
    sample = found.samples[0]
    said = [f"  {role}: {caption}" for role, caption in sample.captions.items()]
    command = [*_program(), "caption", str(out / "student" / "best"), str(photo)]
    lines = [str(found), "", f"On {photo.name} ({sample.references[0]!r}):", *said, ""]
    lines += [f"The report is in {page}", f"All this took {seconds:.0f} s. Caption a photo with:"]
    return "\n".join([*lines, f"  {shlex.join(command)}"])


def _program() -> list[str]:
    """How this command can be called again from here."""
    if shutil.which("capdistill"):
        return ["capdistill"]
    return [sys.executable, "-m", "capdistill"]
