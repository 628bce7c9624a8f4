"""`capdistill train`, `distill` and `check`: one run file, three things to do with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.common import (
    DONE,
    INTERRUPTED,
    PROBLEM,
    add_data_options,
    add_generation_options,
    data_values,
    generation_values,
    give,
    say,
)
from capdistill.cli.runfile import (
    NAME,
    DistillRun,
    RunConfig,
    TrainRun,
    override,
    parse_run,
    read_values,
    recipe_values,
    write_resolved,
)
from capdistill.errors import ConfigError

if TYPE_CHECKING:
    from capdistill.data import Splits
    from capdistill.training.history import History
    from capdistill.training.trainer import Trainer

_TRAIN = """\
  capdistill train --preset vit_transformer --data flickr8k --epochs 20 --out runs/teacher
  capdistill train --config runs/teacher/config.json --set train.seed=1 --out runs/teacher-1"""
_DISTILL = """\
  capdistill distill --teacher runs/teacher/best --student lite0_lstm --data flickr8k \\
      --set losses.token.kwargs.temperature=2 --set weights.ce=0.5 --out runs/student
  capdistill distill --config runs/student/config.json          # the same run again
  capdistill distill --resume --out runs/student                # goes on where it stopped"""
_CHECK = """\
  capdistill check --teacher runs/teacher/best --student lite0_lstm --data flickr8k"""
_TRAINING_FLAGS = {
    "epochs": (int, "each is every training image once"),
    "batch_size": (int, "images a step"),
    "captions_per_image": (int, "captions of an image a step; else as the data have, at most 5"),
    "learning_rate": (float, "peak rate"),
    "seed": (int, "of everything drawn by chance"),
    "num_workers": (int, "processes that read images"),
    "device": (str, "auto, cpu, cuda, ..."),
    "precision": (str, "auto, bf16, fp16 or fp32"),
}


def train_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `train`."""
    parser = add(example=_TRAIN)
    parser.add_argument("--preset", metavar="NAME", help="the model; see `capdistill models`")
    _add_run_options(parser)
    _add_out_options(parser)
    parser.set_defaults(run=train, run_class=TrainRun, model="model")
    return parser


def distill_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `distill`."""
    parser = add(example=_DISTILL)
    _add_pair_options(parser)
    _add_out_options(parser)
    parser.set_defaults(run=train, run_class=DistillRun, model="student")
    return parser


def check_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `check`, those of `distill` without its output."""
    parser = add(example=_CHECK)
    _add_pair_options(parser)
    parser.set_defaults(run=check, run_class=DistillRun, model="student", out=None, resume=False)
    return parser


def train(options: argparse.Namespace) -> int:
    """Train or distil, and say what came out."""
    run = make_run(options)
    data = run.data.load()
    say(data.summary())
    trainer, history = execute(run, data, resume=options.resume)
    best = history.best or (history.epochs[-1] if history.epochs else None)
    content = {
        "out": run.out,
        "captioner": str(Path(run.out or "") / "best"),
        "config": str(Path(run.out or "") / NAME),
        "parameters": trainer.captioner.num_parameters(),
        "interrupted": history.interrupted,
        "epochs": len(history.epochs),
        "best": best and {key: best[key] for key in ("epoch", "train", "val", "scores")},
    }
    give(options, content, lambda: _summary(content))
    return INTERRUPTED if history.interrupted else DONE


def execute(run: RunConfig, data: Splits, *, resume: bool = False) -> tuple[Trainer, History]:
    """Write the resolved run file, then train.

    Raises:
        ConfigError: no output directory, or one that cannot be written.
    """
    from capdistill.cli.runfile import make_trainer

    if run.out is None:
        raise ConfigError("out: no directory for the run was given. Give --out DIR.")
    run = _with_captions(run, data)
    trainer = make_trainer(run, data)
    write_resolved(run)
    return trainer, trainer.fit(data.train, _validation(data), out=run.out, resume=resume)


def _with_captions(run: RunConfig, data: Splits) -> RunConfig:
    """Captions an image a step as the data have them, unless given: a number that is recorded."""
    from capdistill.data.collate import usual_captions

    if run.train.captions_per_image is not None:
        return run
    known = {"captions_per_image": usual_captions(data.train)}
    return run.model_copy(update={"train": run.train.model_copy(update=known)})


def check(options: argparse.Namespace) -> int:
    """Print what `Distiller.check` finds; a failure is exit code 1."""
    from capdistill.cli.runfile import make_trainer

    run = make_run(options)
    data = run.data.load()
    say(data.summary())
    report = make_trainer(run, data).check(data.train, _validation(data))
    give(options, report.to_json(), lambda: str(report))
    return DONE if report.ok else PROBLEM


def make_run(options: argparse.Namespace) -> RunConfig:
    """Run file, flags and settings to one checked configuration."""
    values: dict[str, Any] = {}
    if getattr(options, "recipe", None) is not None:
        values = recipe_values(options.recipe)
    if options.config is not None:
        for section, given in read_values(options.config).items():
            values[section] = _joined(values.get(section), given)
    elif options.resume and options.out and (Path(options.out) / NAME).exists():
        values = read_values(Path(options.out) / NAME)
    for section, given in _from_flags(options).items():
        values = {**values, section: _joined(values.get(section), given)}
    run: RunConfig = parse_run(options.run_class, override(values, options.set))
    return run


def _validation(data: Splits) -> Any:
    if "val" in data.parts:
        return data.val
    say("There is no val split: nothing is scored, and the last epoch counts as the best.")
    return None


def _from_flags(options: argparse.Namespace) -> dict[str, Any]:
    model = {
        "preset": getattr(options, "student" if options.model == "student" else "preset"),
        "weights": {"hub": True, "random": False}.get(options.weights, options.weights),
    }
    training = {name: getattr(options, name) for name in _TRAINING_FLAGS}
    decoding = {k: v for k, v in generation_values(options).items() if k not in _TRAINING_FLAGS}
    training["generation"] = decoding or None
    given: dict[str, Any] = {
        "data": data_values(options),
        options.model: _not_none(model),
        "train": _not_none(training),
        "tokenizer": _not_none({"path": options.tokenizer}),
    }
    plain = {"out": options.out, "teacher": getattr(options, "teacher", None)}
    return {**{key: value for key, value in given.items() if value}, **_not_none(plain)}


def _not_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _joined(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def _add_pair_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="DIR", help="a saved captioner, e.g. RUN/best")
    parser.add_argument("--student", metavar="NAME", help="a preset; see `capdistill models`")
    parser.add_argument(
        "--recipe", metavar="NAME", help="losses, weights and options by name, e.g. reference"
    )
    _add_run_options(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run file; flags and --set go over it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the run file, e.g. train.patience=3; the value is JSON or a string",
    )
    parser.add_argument(
        "--weights", metavar="W", help="of the encoder: hub (default), random, or a file"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a saved one, or a captioner's directory"
    )
    add_data_options(parser)
    group = parser.add_argument_group("training")
    for name, (kind, text) in _TRAINING_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=kind, metavar=kind.__name__.upper(), help=text)
    add_generation_options(parser, without=_TRAINING_FLAGS)  # how validation captions


def _add_out_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help=f"of the run: best/, final/, {NAME}, history.jsonl, ..."
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def _summary(content: dict[str, Any]) -> str:
    best = content["best"] or {"epoch": None, "scores": {}}
    scores = ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items())
    epochs = f"{content['epochs']} epoch" + "s" * (content["epochs"] != 1)
    lines = [
        f"{content['parameters']:,} parameters; {epochs}"
        + (f"; best is epoch {best['epoch']}: {scores}" if scores else ""),
        f"captioner: {content['captioner']}",
        f"run file:  {content['config']}",
    ]
    if content["interrupted"]:
        lines = [f"Interrupted. Go on with --resume --out {content['out']}"]
    return "\n".join(lines)
