"""Teacher, baseline, student and report in one command: the demo, and recipes of a whole run."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, interrupted, print_result, print_status
from capdistill.errors import ConfigError, MissingExtra
from capdistill.files import DirectoryLock, user_path

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.cli.runfile import RunConfig
    from capdistill.data import Splits
    from capdistill.evaluation.comparison import Comparison
    from capdistill.training.run_directory import Resume

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
    models, number = _train_all(runs, data, overwrite=overwrite)
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


def distill_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `distill`, which trains one student or a whole recipe."""
    from capdistill.cli import train

    train.distill_command(parser)
    parser.add_argument(
        "--teacher-weights",
        metavar="W",
        help="with a recipe that trains its teacher: the weights of the teacher's encoder",
    )
    parser.set_defaults(run=run_distill, staged=True)


def run_distill(options: argparse.Namespace) -> int:
    """Distil, or run a whole recipe: one with stages, or one with models and no teacher."""
    from capdistill.cli import train
    from capdistill.cli.runfile import NAME
    from capdistill.training.recipes import recipe, recipe_models

    staged = options.recipe and "stages" in recipe(options.recipe)
    alone = options.resume is True and (user_path(options.out or "") / NAME).exists()
    given = options.teacher or options.config or options.student or alone
    if options.recipe and not staged and not given and recipe_models(options.recipe) is not None:
        return run_recipe(options)
    if options.teacher_weights is not None:
        raise ConfigError(
            "--teacher-weights: no teacher is trained here. It belongs to a recipe that trains its "
            "own, such as --recipe flickr8k_small without --teacher, --student and --config."
        )
    if staged:
        return run_staged(options)
    return train.train(options)


def run_staged(options: argparse.Namespace) -> int:
    """Train a student by a recipe with stages, compare it with its teacher, write the report."""
    from capdistill.cli.data import MeanTeacherSection, teacher_directories
    from capdistill.cli.runfile import DistillRun, override
    from capdistill.cli.train import make_run, make_student, merged_values
    from capdistill.evaluation.comparison import compare
    from capdistill.teachers import load
    from capdistill.training.recipes import recipe
    from capdistill.training.stages import run_stages

    run = make_run(options)
    assert isinstance(run, DistillRun)
    if run.out is None:
        raise ConfigError("out: no directory for the runs was given. Give --out DIR.")
    changed = override(merged_values(options, {}), options.set).keys() & {"losses", "weights"}
    if changed:
        raise ConfigError(
            f"{', '.join(sorted(changed))}: each stage of '{options.recipe}' has its own. Change "
            "them in Python: capdistill.training.run_stages(**recipe(name))."
        )
    if isinstance(run.teacher, MeanTeacherSection):
        raise ConfigError(
            f"teacher: the recipe '{options.recipe}' needs the captions of a trained teacher, "
            "which the student's own average is not. Give --teacher DIR."
        )
    teacher: Any = load(teacher_directories(run.teacher, run.out))
    data = run.data.load()
    print_status(data.summary())
    student = make_student(run, data, teacher)
    out, chosen = user_path(run.out), recipe(options.recipe)
    given = {name: getattr(run.train, name) for name in run.train.model_fields_set}
    stages = [
        stage if stage["method"] == "average" else {**stage, **given}
        for stage in chosen.pop("stages")
    ]
    table = run_stages(
        student,
        run.data.training_data(data),
        data.val,
        stages=stages,
        teacher=teacher,
        out=out,
        resume=options.resume or (not options.overwrite and "auto"),
        overwrite=options.overwrite,
        accept_changes=options.accept_changes,
        **chosen,
    )
    if table.interrupted:
        print_status(f"Interrupted. The same command continues, with --out {out}.")
        return interrupted(table.signal)
    student.save(out / "student")
    print_status(f"\n{table}\n\nComparing the student with its teacher ...")
    found = compare(teacher, student, data.val, bootstrap=1000, **_where(run))
    page = found.save(out / "report")
    content = {
        "report": str(page),
        "captioner": str(out / "student"),
        "stages": table.to_json()["rows"],
        **found.to_json(),
    }
    ending = f"captioner: {out / 'student'}\nThe report is in {page}"
    print_result(options, content, lambda: f"{found}\n\n{ending}")
    return DONE


def run_recipe(options: argparse.Namespace) -> int:
    """Train the models of a recipe that is a whole run, compare them, and write the report."""
    from capdistill.evaluation.comparison import compare

    runs = recipe_runs(options)
    data = runs["teacher"].data.load()
    print_status(data.summary())
    out, held_out = user_path(options.out), data.val  # data without it are an error now, not later
    models, number = _train_all(
        runs,
        data,
        resume=options.resume or (not options.overwrite and "auto"),
        overwrite=options.overwrite,
        accept_changes=options.accept_changes,
    )
    if models is None:
        print_status(f"Interrupted. The same command continues, with --out {out}.")
        return interrupted(number)
    print_status("\nComparing the three models ...")
    three = models["teacher"], models["student"], held_out, models["baseline"]
    found = compare(*three, bootstrap=1000, **_where(runs["student"]))
    page = found.save(out / "report")
    content = {"report": str(page), **found.to_json()}
    print_result(options, content, lambda: f"{found}\n\nThe report is in {page}")
    return DONE


def _where(run: RunConfig) -> dict[str, Any]:
    """Where, and how precisely, the models of a run are compared: as they were trained."""
    return {"device": run.train.device, "precision": run.train.precision}


def recipe_runs(options: argparse.Namespace) -> dict[str, RunConfig]:
    """The three runs of a whole recipe: the options apply to each run, in its own directory."""
    from capdistill.cli.runfile import TrainRun
    from capdistill.cli.train import make_run

    if not options.out:
        raise ConfigError("out: no directory for the runs was given. Give --out DIR.")
    out = user_path(options.out)
    plain = {"run_class": TrainRun, "model": "model", "preset": None}
    changes: dict[str, dict[str, Any]] = {
        "teacher": {**plain, "role": "teacher", "weights": options.teacher_weights},
        "baseline": {**plain, "role": "student"},
        "student": {"teacher": [str(out / "teacher" / "best")]},
    }
    runs = {}
    for role, change in changes.items():
        each = {**vars(options), **change, "out": str(out / role)}
        runs[role] = make_run(argparse.Namespace(**each))
    return runs


def _train_all(
    runs: Mapping[str, RunConfig],
    data: Splits,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    accept_changes: bool = False,
) -> tuple[dict[str, Captioner] | None, int | None]:
    """Train the models in their order; None and the signal's number if one was interrupted."""
    from capdistill.cli.train import run_training

    titles = {
        "teacher": "Training the teacher",
        "baseline": "Training the small model by cross-entropy alone, for comparison",
        "student": "Distilling the same small model from the teacher",
    }
    models = {}
    for role, run in runs.items():
        print_status(f"\n{titles[role]} ({run.train.epochs} epochs) ...")
        begun = resume if role == "teacher" else resume and "auto"
        how: dict[str, Any] = {"overwrite": overwrite, "accept_changes": accept_changes}
        trainer, history = run_training(run, data, resume=begun, **how)
        if history.interrupted:
            return None, history.signal
        first, last = (history.epochs[i]["train"]["terms"]["ce"]["raw"] for i in (0, -1))
        print_status(f"cross-entropy per word on the training captions: {first:.2f} -> {last:.2f}")
        models[role] = trainer.captioner
    return models, None


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
