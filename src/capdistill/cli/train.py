"""`capdistill train` and `check`, and what all commands share that train by a run file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, interrupted, print_result, print_status
from capdistill.cli.common import (
    add_run_options,
    captioner_directory,
    data_values,
    default_losses,
    generation_values,
    metric_names,
    recipe_values,
    require_existing,
)
from capdistill.cli.data import MeanTeacherSection, teacher_directories
from capdistill.cli.runfile import (
    NAME,
    DistillRun,
    ModelSection,
    RunConfig,
    TrainRun,
    make_captioner,
    override,
    parse_run,
    read_values,
    write_resolved,
)
from capdistill.cli.tokenizers import TokenizerSection, make_tokenizer
from capdistill.errors import ConfigError
from capdistill.files import user_path
from capdistill.generation.config import require_effect
from capdistill.training.config import TrainConfig
from capdistill.training.recipes import recipe, recipe_models

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.data import Splits
    from capdistill.tokenizer import Tokenizer
    from capdistill.training.history import History
    from capdistill.training.run_directory import Resume
    from capdistill.training.trainer import Trainer

_TRAIN = """\
example:
  capdistill train --preset vit_transformer --data flickr8k --epochs 20 --out runs/teacher
  capdistill train --config runs/teacher/config.json --set train.seed=1 --out runs/teacher-1"""


def train_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    parser.description = _TRAIN
    parser.usage = "capdistill train --preset NAME --data PATH --out DIR [options]"
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="the model: a preset (`capdistill models` lists them) or a saved captioner's "
        "directory, to train it further",
    )
    add_model_options(parser)
    add_run_options(parser, TrainConfig)
    parser.add_argument(
        "--role",
        choices=["teacher", "student"],
        metavar="ROLE",
        help="with a recipe that has models: train its teacher (default) or its student",
    )
    parser.set_defaults(run=train, run_class=TrainRun, model="model")


def train(options: argparse.Namespace) -> int:
    """Train or distil, and print the result."""
    if options.run_class is TrainRun and options.role:
        _require_models(options.recipe, options.preset)
    how = directory_options(options)
    run, data = load_run(options)
    trainer, history = run_training(run, data, **how)
    content = result(run, trainer, history)
    print_result(options, content, lambda: summary(content))
    return interrupted(history.signal) if history.interrupted else DONE


def _require_models(name: str | None, preset: str | None) -> None:
    """Check that --role chooses between models: those of a recipe."""
    if name is None:
        raise ConfigError("--role belongs to --recipe NAME; give that, too.")
    if preset is not None:
        raise ConfigError("--role is a model of the recipe, and --preset another one; give one.")
    recipe(name)  # an unknown name is an error
    if recipe_models(name) is None:
        raise ConfigError(f"--role: the recipe '{name}' has no models. Give --preset NAME instead.")


def directory_options(options: argparse.Namespace, *, continues: bool = False) -> dict[str, Any]:
    """What to do with a run that is in the directory already.

    Args:
        options: Those of the command.
        continues: Whether the command goes on with it unless told otherwise.

    Raises:
        ConfigError: changes are accepted, but no run is continued.
    """
    resume = options.resume or (continues and not options.overwrite and "auto")
    if options.accept_changes and not resume:
        raise ConfigError("--accept-changes belongs to --resume; give that, too.")
    kept = {name: getattr(options, name) for name in ("overwrite", "accept_changes")}
    return {"resume": resume, **kept}


def result(run: RunConfig, trainer: Trainer, history: History) -> dict[str, Any]:
    """What came out of a run, as plain values."""
    best = history.best or (history.epochs[-1] if history.epochs else None)
    return {
        "out": run.out,
        "captioner": str(Path(run.out or "") / "best"),
        "config": str(Path(run.out or "") / NAME),
        "parameters": trainer.captioner.num_parameters(),
        "interrupted": history.interrupted,
        "stopped": history.stopped,
        "epochs": len(history.epochs),
        "best": best and {key: best[key] for key in ("epoch", "train", "val", "scores")},
    }


def load_run(options: argparse.Namespace) -> tuple[RunConfig, Splits]:
    """The run and its data. A missing teacher is reported before the data are read."""
    run = make_run(options)
    if isinstance(run, DistillRun):
        run = run.model_copy(update={"teacher": teacher_directories(run.teacher, run.out)})
    data = run.data.load()
    print_status(data.summary())
    return run, data


def run_training(
    run: RunConfig,
    data: Splits,
    make: Callable[[Any, Splits], Trainer] | None = None,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    accept_changes: bool = False,
) -> tuple[Trainer, History]:
    """Make the models, train, and leave the resolved run file in the directory of the run.

    Args:
        run: The configuration.
        data: Its data.
        make: Makes the trainer of the run; `make_trainer` by default.
        resume, overwrite, accept_changes: As for `Trainer.fit`.

    Raises:
        ConfigError: no output directory, or one that cannot be written or holds another run.
    """
    if run.out is None:
        raise ConfigError("out: no directory for the run was given. Give --out DIR.")
    train = run.data.training_data(data)
    run = _with_captions(run, train)
    trainer = (make or make_trainer)(run, data)
    history = trainer.fit(
        train,
        validation(data),
        out=run.out,
        resume=resume,
        overwrite=overwrite,
        accept_changes=accept_changes,
        callbacks=[_RunFile(run)],
    )
    return trainer, history


class _RunFile:
    """Callback that writes the run file once nothing stops the run from starting."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def on_fit_start(self, trainer: Trainer) -> None:
        """Write it, unless the run is complete: that of what was trained stays."""
        from capdistill.training.monitor import is_complete

        complete = is_complete(trainer.epoch, trainer.config.epochs, trainer.callbacks)
        if not complete or not (Path(self.run.out or "") / NAME).exists():
            write_resolved(self.run)


def _with_captions(run: RunConfig, train: Any) -> RunConfig:
    """Record the number of captions per image that the data have, unless it was given."""
    from capdistill.data.collate import usual_captions

    if run.train.captions_per_image is not None:
        return run
    known = {"captions_per_image": usual_captions(train)}
    return run.model_copy(update={"train": run.train.model_copy(update=known)})


def validation(data: Splits) -> Any:
    """The split to validate on; None, which is said, if there is none."""
    if "val" in data.parts:
        return data.val
    print_status("There is no val split: nothing is scored, and the last epoch counts as the best.")
    return None


def make_trainer(run: RunConfig, data: Splits) -> Trainer:
    """Create the models and the trainer of a run. Random weights depend on the seed alone."""
    from capdistill.runtime import seed_everything
    from capdistill.teachers import MeanTeacher, load
    from capdistill.training.distiller import Distiller
    from capdistill.training.trainer import Trainer

    if isinstance(run, TrainRun):
        words = _words(run.tokenizer, run.model, data, None)
        seed_everything(run.train.seed)
        return Trainer(make_captioner(run.model, "model", words), config=run.train)
    assert isinstance(run, DistillRun)
    teacher: Any = run.teacher
    if isinstance(teacher, MeanTeacherSection):
        student = make_student(run, data, None)
        teacher = MeanTeacher(student, teacher.decay)
    else:
        teacher = load(teacher)
        student = make_student(run, data, teacher)
    weights: Any = dict(run.weights)
    return Distiller(teacher, student, run.losses, weights, config=run.train)


def make_student(run: DistillRun, data: Splits, teacher: Any) -> Captioner:
    """The student of a run. Without other instructions it has the teacher's tokenizer."""
    from capdistill.runtime import seed_everything

    described = teacher is None or run.tokenizer is not None
    words = _words(run.tokenizer, run.student, data, teacher) if described else teacher.tokenizer
    seed_everything(run.train.seed)
    return make_captioner(run.student, "student", words)


def _words(
    section: TokenizerSection | None, model: ModelSection, data: Splits, teacher: Any
) -> Tokenizer | None:
    """The tokenizer of a section or, without one, the default; None where the model has its own."""
    alone = model.start and not (model.preset or model.encoder or model.decoder)
    if section is None and alone:
        return None
    return make_tokenizer(section or TokenizerSection(), data, teacher)


def make_run(options: argparse.Namespace) -> RunConfig:
    """Recipe, run file, options and --set to one configuration; what comes later wins."""
    base: dict[str, Any] = {}
    if options.recipe:
        staged = getattr(options, "staged", False)
        base = recipe_values(options.recipe, options.model, options.role, staged=staged)
    values = merged_values(options, base)
    model = options.student if options.model == "student" else options.preset
    if model is not None:
        values[options.model] = _with_model(values.get(options.model), model)
    if options.run_class is DistillRun and values.get("losses") is None:
        values["losses"] = default_losses()
    values = override(values, options.set)
    _drop_weights(values, base.get("weights", {}))
    section, of_recipe = values.get(options.model), base.get(options.model, {})
    if isinstance(section, Mapping) and section.get("preset"):  # instead of the recipe's components
        kept = {k: each for k, each in section.items() if each != of_recipe.get(k)}
        values[options.model] = kept
    run: RunConfig = parse_run(options.run_class, values)
    require_decoding(options, run)
    return run


def require_decoding(options: argparse.Namespace, run: RunConfig) -> None:
    """Refuse an option of decoding that does nothing in this run."""
    if run.train.generation is not None:
        require_effect(run.train.generation, _decoding(options))


def merged_values(options: argparse.Namespace, base: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, below those of the run file, below the options that were given.

    Raises:
        ConfigError: the run file belongs to another command.
    """
    written = _read_run_file(options)
    command = options.run_class.model_fields["command"].default
    if written.get("command", command) != command:
        raise ConfigError(
            f"The run file belongs to `capdistill {written['command']}`. Use that command, or give "
            "another file with --config."
        )
    values = {**base, **{name: _joined(base.get(name), each) for name, each in written.items()}}
    if written.get("losses") is not None:
        values["losses"] = written["losses"]  # given losses replace all of the recipe's
    given = _from_options(options)
    decoding, old = given.get("train", {}), values.get("train")
    if "generation" in decoding and isinstance(old, Mapping):
        decoding["generation"] = _joined(old.get("generation"), decoding["generation"])
    for name, each in given.items():
        values[name] = _joined(values.get(name), each)
    return values


def _drop_weights(values: dict[str, Any], of_recipe: Mapping[str, Any]) -> None:
    """Leave out a recipe's weights of terms that other losses replaced."""
    losses, weights = values.get("losses"), values.get("weights")
    if isinstance(losses, Mapping) and isinstance(weights, Mapping):
        unused = of_recipe.keys() - losses.keys() - {"ce"}
        kept = {k: w for k, w in weights.items() if k not in unused or w != of_recipe[k]}
        values["weights"] = kept


def _read_run_file(options: argparse.Namespace) -> dict[str, Any]:
    if options.config is not None:
        return read_values(options.config)
    if not options.resume or not options.out:
        return {}
    out = user_path(options.out)
    if (out / NAME).exists():
        return read_values(out / NAME)
    if options.resume is True and not options.recipe:
        require_existing(f"--resume --out {options.out}", out)
    if not options.recipe and (out / "stages.json").exists():
        raise ConfigError(
            f"{options.out} holds the stages of a recipe. Repeat the whole command, with --recipe, "
            "to go on with them."
        )
    return {}


def _from_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as values of a run file."""
    flags = {name: getattr(options, name) for name in options.flags}
    weights = {"hub": True, "random": False}.get(options.weights, options.weights)
    given: dict[str, Any] = {
        "data": data_values(options),
        options.model: _not_none({"weights": weights}),
        "train": _not_none(
            {**flags, "metrics": metric_names(options), "generation": _decoding(options) or None}
        ),
        "tokenizer": _not_none({"path": options.tokenizer}),
    }
    *others, last = getattr(options, "teacher", None) or [None]
    plain = {"out": options.out, "teacher": [*others, last] if others else last}
    return {**{key: value for key, value in given.items() if value}, **_not_none(plain)}


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in generation_values(options).items() if k not in options.flags}


def _with_model(section: Any, name: str) -> dict[str, Any]:
    """A model section whose model is replaced by a preset or a saved captioner."""
    from capdistill import presets

    kept = dict(section) if isinstance(section, Mapping) else {}
    if kept.get("preset") == name:
        return kept
    kept = {key: value for key, value in kept.items() if key == "weights"}
    is_path = "/" in name or os.sep in name or user_path(name).exists()
    if name not in presets.names() and is_path:
        return {**kept, "start": str(captioner_directory(name))}
    return {**kept, "preset": name}


def _not_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _joined(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --weights and --tokenizer."""
    parser.add_argument(
        "--weights", metavar="W", help="the encoder's weights: hub (default), random, or a file"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a saved tokenizer, or a saved captioner's directory"
    )


def summary(content: Mapping[str, Any]) -> str:
    """The result of a run in a few lines."""
    if content["interrupted"]:
        return f"Interrupted. Continue with --resume --out {content['out']}"
    best = content["best"] or {"epoch": None, "scores": {}}
    scores = ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items())
    epochs = f"{content['epochs']} epoch" + "s" * (content["epochs"] != 1)
    counts = f"{content['parameters']:,} parameters; {epochs}"
    return "\n".join(
        [
            f"{counts}; the best is epoch {best['epoch'] + 1}: {scores}" if scores else counts,
            f"captioner: {content['captioner']}",
            f"run file:  {content['config']}",
        ]
    )
