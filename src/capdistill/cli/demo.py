"""`capdistill demo`: teacher, baseline, student and report on the bundled photos."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, interrupted, print_result, print_status
from capdistill.errors import ConfigError, MissingExtra
from capdistill.files import DirectoryLock, user_path

if TYPE_CHECKING:
    from capdistill.cli.runfile import RunConfig
    from capdistill.data import Splits
    from capdistill.evaluation.comparison import Comparison

_EXAMPLE = """\
example:
  capdistill demo
  capdistill demo --out first-look --epochs 20"""
_INTRODUCTION = """\
This demo trains on {images} photos. They show how the pipeline works; they do not teach a language.
The models are tiny, start from random weights and learn only a few phrases, and scores on
{held_out} photos are mostly noise. On your data, the same commands use pretrained encoders."""
_ATTENTION = 1  # photos in the report with attention maps of each model
_TRAINING = {
    "batch_size": 8,
    "learning_rate": 3e-3,
    "encoder_lr_scale": 0.3,  # the encoders are random, so they have everything to learn
    "schedule": "warmup_cosine",
    "cache_images": True,
    "patience": None,
    "device": "cpu",
    "precision": "fp32",  # such small models gain nothing from bf16
}
_TEACHER = {
    "preset": "debug_teacher",
    "encoder": {"trainable": "all"},
    "decoder": {"layers": 2},
}
_STUDENT = {
    "preset": "debug_student",
    "encoder": {"trainable": "all"},
    "decoder": {"embed": 48, "hidden": 112},
}
_LOSSES = {"token": {"name": "token", "temperature": 2.0}, "feature": "feature", "hidden": "hidden"}


def demo_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.description = _EXAMPLE
    parser.add_argument(
        "--out",
        default="capdistill-demo",
        metavar="DIR",
        help="directory of the runs and the report (default: %(default)s); an earlier demo in it "
        "is replaced",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace other runs in the directory --out"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=24,
        metavar="N",
        help="epochs of each of the three trainings (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only N photos of each split")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo in one thread: with such small models, several threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(threads)


def _run(options: argparse.Namespace) -> int:
    """Train teacher, baseline and student, compare them, and write the report."""
    from capdistill.cli.common import require_writable
    from capdistill.cli.distill import train_all
    from capdistill.evaluation.comparison import compare
    from capdistill.training.run_directory import open_directory

    began, out = time.perf_counter(), user_path(options.out)
    require_writable(out)
    runs = demo_runs(out, options.epochs, options.limit)
    data = runs["teacher"].data.load()
    print_status(_INTRODUCTION.format(images=len(data.all), held_out=len(data.val)))
    overwrite = options.overwrite or _is_a_demo(out)
    for role in runs:
        with DirectoryLock() as lock:
            open_directory(out / role, resume=False, overwrite=overwrite, lock=lock)
    models, number = train_all(runs, data, overwrite=overwrite)
    if models is None:
        return interrupted(number)
    print_status("\nComparing the three models on the held-out photos ...")
    same: dict[str, Any] = {key: _TRAINING[key] for key in ("device", "precision")}
    same |= draw_curves({role: out / role for role in runs})
    comparison = compare(models["teacher"], models["student"], data.val, models["baseline"], **same)
    page = comparison.save(out / "report")
    seconds = time.perf_counter() - began
    content = {"seconds": seconds, "report": str(page), **comparison.to_json()}
    print_result(options, content, lambda: _ending(comparison, data, out, page, seconds))
    return DONE


def demo_runs(out: Path, epochs: int, limit: int | None = None) -> dict[str, RunConfig]:
    """The three runs in their order. Each directory gets its run file, which runs it again.

    Example:
        >>> list(demo_runs(Path("demo"), epochs=2))
        ['teacher', 'baseline', 'student']
    """
    from capdistill.cli.runfile import DistillRun, TrainRun, parse_run

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


def _is_a_demo(out: Path) -> bool:
    """Whether an earlier demo made this directory; then a new one may replace it."""
    from capdistill.cli.runfile import NAME, read_values

    try:
        found = read_values(out / "teacher" / NAME).get("data")
    except ConfigError:
        return False
    return isinstance(found, dict) and found.get("format") == "sample"


def draw_curves(directories: dict[str, Path]) -> dict[str, Any]:
    """Draw history.png in each run, and return the options that make `compare` draw as well.

    Without matplotlib nothing is drawn, and a message says so.
    """
    from capdistill import plots

    try:
        for directory in directories.values():
            plots.history(directory, directory / "history.png")
    except MissingExtra as error:
        print_status(f"The report will have no plots. {error}")
        return {}
    return {"histories": directories, "attention": _ATTENTION}


def _ending(comparison: Comparison, data: Splits, out: Path, page: Path, seconds: float) -> str:
    photo = Path(str(data.val.examples[0].path))
    sample = comparison.samples[0]
    captions = [f"  {role}: {caption}" for role, caption in sample.captions.items()]
    command = [*_program(), "caption", str(out / "student" / "best"), str(photo)]
    lines = [str(comparison), "", f"On {photo.name} ({sample.references[0]!r}):", *captions, ""]
    lines += [f"The report is in {page}", f"The demo took {seconds:.0f} s. Caption a photo with:"]
    return "\n".join([*lines, f"  {shlex.join(command)}"])


def _program() -> list[str]:
    """The words that call this command again from here."""
    if shutil.which("capdistill"):
        return ["capdistill"]
    return [sys.executable, "-m", "capdistill"]
