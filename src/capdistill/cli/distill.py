"""`capdistill distill`: one student, or a whole recipe from a teacher to a report; and `check`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, PROBLEM, interrupted, print_result, print_status
from capdistill.cli.common import add_run_options
from capdistill.cli.data import MeanTeacherSection, teacher_directories
from capdistill.cli.runfile import NAME, DistillRun, RunConfig, TrainRun, override
from capdistill.cli.train import (
    add_model_options,
    directory_options,
    load_run,
    make_run,
    make_student,
    make_trainer,
    merged_values,
    run_training,
    train,
    validation,
)
from capdistill.errors import ConfigError
from capdistill.files import user_path
from capdistill.training.config import DistillConfig
from capdistill.training.recipes import recipe, recipe_models

if TYPE_CHECKING:
    from pathlib import Path

    from capdistill.captioner import Captioner
    from capdistill.data import Splits
    from capdistill.evaluation.comparison import Comparison
    from capdistill.training.run_directory import Resume

_EXAMPLE = """\
example:
  capdistill distill --teacher runs/teacher --student lite0_lstm --data flickr8k --out runs/student
  capdistill distill --teacher runs/teacher --student lite0_lstm --data flickr8k \\
      --set losses.token.temperature=2 --set weights.ce=0.5 --out runs/student-2
  capdistill distill --config runs/student/config.json --out runs/again    # the same run again
  capdistill distill --resume --out runs/student                 # continue an interrupted run
  capdistill distill --recipe flickr8k_small --data flickr8k --out runs/small    # all in one
  capdistill distill --recipe best_small --teacher runs/a runs/b --data flickr8k --out runs/best"""

_CHECK = """\
example:
  capdistill check --teacher runs/teacher --student lite0_lstm --data flickr8k"""


def distill_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `distill`."""
    parser.description = _EXAMPLE
    parser.usage = "capdistill distill --teacher DIR --student NAME --data PATH --out DIR [options]"
    add_pair_options(parser)
    parser.add_argument(
        "--teacher-weights",
        metavar="W",
        help="with a recipe that trains its teacher: the weights of the teacher's encoder",
    )
    add_run_options(parser, DistillConfig)
    parser.set_defaults(run=distill, run_class=DistillRun, model="student", role="student")
    parser.set_defaults(staged=True)


def check_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check`: those of `distill` without the output."""
    parser.description = _CHECK
    parser.usage = "capdistill check --teacher DIR --student NAME --data PATH [options]"
    add_pair_options(parser)
    add_run_options(parser, DistillConfig, output=False)
    parser.set_defaults(
        run=check, run_class=DistillRun, model="student", role="student", out=None, resume=False
    )


def distill(options: argparse.Namespace) -> int:
    """Distil, or run a whole recipe: one with stages, or one with models and no teacher."""
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
    return run_staged(options) if staged else train(options)


def check(options: argparse.Namespace) -> int:
    """Print the report of `Distiller.check`; a failure is exit code 1."""
    run, data = load_run(options)
    report = make_trainer(run, data).check(run.data.training_data(data), validation(data))
    print_result(options, report.to_json(), lambda: str(report))
    return DONE if report.ok else PROBLEM


def run_staged(options: argparse.Namespace) -> int:
    """Train a student by a recipe with stages, compare it with its teacher, write the report."""
    from capdistill.evaluation.comparison import compare
    from capdistill.teachers import load
    from capdistill.training.stages import run_stages

    how = directory_options(options, continues=True)
    run = _staged_run(options)
    teacher: Any = load(teacher_directories(run.teacher, run.out))
    data = run.data.load()
    print_status(data.summary())
    student = make_student(run, data, teacher)
    out, chosen = user_path(run.out or ""), recipe(options.recipe)
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
        **how,
        **chosen,
    )
    if table.interrupted:
        print_status(f"Interrupted. The same command continues, with --out {out}.")
        return interrupted(table.signal)
    student.save(out / "student")
    print_status(f"\n{table}\n\nComparing the student with its teacher ...")
    found = compare(teacher, student, data.val, bootstrap=1000, **_where(run))
    content = {"captioner": str(out / "student"), "stages": table.to_json()["rows"]}
    return _report(options, found, out, content)


def _staged_run(options: argparse.Namespace) -> DistillRun:
    """The run, without what its stages have themselves.

    Raises:
        ConfigError: a directory is missing; losses, weights or a teacher were given that cannot be.
    """
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
    return run


def _report(
    options: argparse.Namespace, found: Comparison, out: Path, content: Mapping[str, Any]
) -> int:
    """Write the comparison to `out/report`, and print it."""
    page = found.save(out / "report")
    ending = f"captioner: {content['captioner']}\nThe report is in {page}"
    printed = {"report": str(page), **content, **found.to_json()}
    print_result(options, printed, lambda: f"{found}\n\n{ending}")
    return DONE


def run_recipe(options: argparse.Namespace) -> int:
    """Train the models of a recipe that is a whole run, compare them, and write the report."""
    from capdistill.evaluation.comparison import compare

    how = directory_options(options, continues=True)
    runs = recipe_runs(options)
    data = runs["teacher"].data.load()
    print_status(data.summary())
    out, held_out = user_path(options.out), data.val  # data without it are an error now, not later
    models, number = train_all(runs, data, **how)
    if models is None:
        print_status(f"Interrupted. The same command continues, with --out {out}.")
        return interrupted(number)
    print_status("\nComparing the three models ...")
    three = models["teacher"], models["student"], held_out, models["baseline"]
    found = compare(*three, bootstrap=1000, **_where(runs["student"]))
    return _report(options, found, out, {"captioner": str(out / "student" / "best")})


def _where(run: RunConfig) -> dict[str, Any]:
    """Where, and how precisely, the models of a run are compared: as they were trained."""
    return {"device": run.train.device, "precision": run.train.precision}


def recipe_runs(options: argparse.Namespace) -> dict[str, RunConfig]:
    """The three runs of a whole recipe: the options apply to each run, in its own directory."""
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


def train_all(
    runs: Mapping[str, RunConfig],
    data: Splits,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    accept_changes: bool = False,
) -> tuple[dict[str, Captioner] | None, int | None]:
    """Train the models in their order; None and the signal's number if one was interrupted."""
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


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Add --teacher, --student and what belongs to them."""
    text = (
        "the teacher: a run's or a saved captioner's directory, that of a Hugging Face model, or "
        "hf:NAME on its Hub; or several teachers"
    )
    parser.add_argument("--teacher", metavar="DIR", nargs="+", help=text)
    parser.add_argument(
        "--student",
        metavar="NAME",
        help="the student: a preset (`capdistill models` lists them) or a saved captioner's "
        "directory, to start from its weights",
    )
    add_model_options(parser)
