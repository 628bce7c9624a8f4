"""`capdistill tune`: train a saved captioner further on the score of the captions it samples."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from capdistill.cli import DONE, interrupted, print_result, print_status
from capdistill.cli.common import (
    TRAINING_FLAGS,
    add_run_options,
    captioner_directory,
    directory_outside,
)
from capdistill.cli.data import (
    FullPath,
    MeanTeacherSection,
    Teachers,
    teacher_directories,
    teacher_section,
)
from capdistill.cli.runfile import (
    ModelSection,
    RunConfig,
    Section,
    Weight,
    losses_section,
    override,
    parse_run,
    parse_section,
    weights_section,
)
from capdistill.cli.train import (
    directory_options,
    merged_values,
    require_decoding,
    result,
    run_training,
    summary,
)
from capdistill.errors import ConfigError
from capdistill.files import user_path
from capdistill.training.config import SelfCriticalConfig

if TYPE_CHECKING:
    from capdistill.data import Splits
    from capdistill.training.history import History
    from capdistill.training.self_critical import SelfCritical

_EXAMPLE = """\
example:
  capdistill tune runs/student --data flickr8k --out runs/tuned
  capdistill tune runs/student --data flickr8k --reward cider_d=1,bleu_4=0.5 \\
      --teacher runs/teacher --set weights.token=0.2 --out runs/tuned-2
  capdistill tune --config runs/tuned/config.json --out runs/again    # the same run again
  capdistill tune --resume --out runs/tuned                  # continue an interrupted run"""
_FLAGS = {
    **TRAINING_FLAGS,
    "monitor": (str, "NAME", "score that decides which epoch is best, such as cider"),
    "samples": (int, "N", "captions that are sampled per image"),
}
_DEFAULT_LOSSES = {"token": {"name": "token"}}  # with a teacher


class StartSection(Section):
    """The captioner that is trained further: its directory."""

    start: FullPath


class TuneRun(RunConfig):
    """A run of `capdistill tune`.

    Args:
        model: {"start": directory of a saved captioner}.
        reward: A score, or score -> weight.
        teacher: As in `DistillRun`, but optional.
        losses: Term -> {"name": ..., arguments}; by default token with a teacher, else none.
        weights: Weights of "reward", of "ce" (default 0) and of the losses.
    """

    command: Literal["tune"] = "tune"
    train: SelfCriticalConfig
    model: StartSection
    reward: str | dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    teacher: Teachers | None = None
    losses: dict[str, dict[str, Any]]
    weights: dict[str, Weight]

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Model, reward, teacher, losses and weights."""
        from capdistill.training.self_critical import REWARD, reward_weights

        found: dict[str, Any] = {"model": _model(values.get("model")), "teacher": None}
        given = values.get("reward")
        reward = reward_weights("cider_d" if given is None else given)
        found["reward"] = reward if isinstance(given, Mapping) else next(iter(reward))
        if values.get("teacher"):
            found["teacher"] = teacher_section(values["teacher"])
        usual = _DEFAULT_LOSSES if found["teacher"] else {}
        terms = usual if values.get("losses") is None else values["losses"]
        losses = losses_section(terms)
        if not found["teacher"]:
            _require_no_teacher(losses)
        weighted = [REWARD, *losses]
        weights = weights_section(values.get("weights"), weighted, terms, {"ce": 0.0})
        return {**found, "losses": losses, "weights": weights}


def tune_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tune`."""
    parser.description = _EXAMPLE
    parser.usage = "capdistill tune DIR --data PATH --out DIR [options]"
    parser.add_argument(
        "captioner",
        metavar="DIR",
        nargs="?",
        help="the captioner to train further: a run's or a saved captioner's directory",
    )
    parser.add_argument(
        "--reward",
        metavar="NAME",
        help="score to raise (default: cider_d), or several with weights: cider_d=1,bleu_4=0.5",
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR",
        nargs="+",
        help="a teacher whose losses keep the captioner near it: a run's or a saved captioner's "
        "directory; or several teachers",
    )
    add_run_options(parser, SelfCriticalConfig, _FLAGS, recipes=False)
    unused = dict.fromkeys(("weights", "tokenizer"))  # the captioner has its own
    parser.set_defaults(run=tune, run_class=TuneRun, model="model", **unused)


def tune(options: argparse.Namespace) -> int:
    """Train the captioner further, and print the result."""
    how = directory_options(options)
    run, data = _load(options)
    trainer, history = run_training(run, data, make_trainer, **how)
    rewards = mean_rewards(history)
    content = {**result(run, trainer, history), "reward": rewards}
    print_result(options, content, lambda: _summary(content))
    return interrupted(history.signal) if history.interrupted else DONE


def _load(options: argparse.Namespace) -> tuple[TuneRun, Splits]:
    """The run and its data. A missing captioner is reported before the data are read."""
    from capdistill.saving import ENSEMBLE

    run = make_run(options)
    start = directory_outside(run.model.start, run.out, "captioner")
    if (Path(start) / ENSEMBLE).exists():
        raise ConfigError(f"{start} holds an ensemble, not one captioner. Give one of its members.")
    changes: dict[str, Any] = {"model": StartSection(start=start)}
    if run.teacher is not None:
        changes["teacher"] = teacher_directories(run.teacher, run.out)
    run = run.model_copy(update=changes)
    data = run.data.load()
    print_status(data.summary())
    return run, data


def make_run(options: argparse.Namespace) -> TuneRun:
    """Run file, options and --set to one configuration; what comes later wins."""
    values = merged_values(options, {})
    if options.captioner is not None:
        values["model"] = {"start": _start(options.captioner)}
    if options.reward is not None:
        values["reward"] = read_reward(options.reward)
    taught = override(values, options.set).get("teacher")
    if taught and values.get("losses") is None:
        values["losses"] = _DEFAULT_LOSSES  # --set changes only what it names
    run = parse_run(TuneRun, override(values, options.set))
    require_decoding(options, run)
    return run


def make_trainer(run: TuneRun, data: Splits) -> SelfCritical:
    """Load the captioner and its teacher."""
    from capdistill.captioner import Captioner
    from capdistill.runtime import seed_everything
    from capdistill.teachers import MeanTeacher, load
    from capdistill.training.self_critical import SelfCritical

    captioner = Captioner.load(captioner_directory(run.model.start))
    teacher: Any = run.teacher
    if isinstance(teacher, MeanTeacherSection):
        teacher = MeanTeacher(captioner, teacher.decay)
    elif teacher is not None:
        teacher = load(teacher)
    seed_everything(run.train.seed)
    weights: Any = dict(run.weights)
    terms = {"teacher": teacher, "losses": run.losses, "weights": weights}
    return SelfCritical(captioner, run.reward, **terms, config=run.train)


def read_reward(text: str) -> str | dict[str, float]:
    """The value of --reward.

    Example:
        >>> read_reward("cider_d"), read_reward("cider_d=1,bleu_4=0.5")
        ('cider_d', {'cider_d': 1.0, 'bleu_4': 0.5})

    Raises:
        ConfigError: it has another form, or names a score twice.
    """
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        return text.strip()
    try:
        weights = {name: float(weight) if equals else 1.0 for name, equals, weight in pairs}
    except ValueError:
        weights = {}
    if len(weights) < len(pairs) or "" in weights:
        raise ConfigError(
            f"--reward {text!r}: expected a score, or different scores with numbers as weights, "
            "e.g. cider_d=1,bleu_4=0.5."
        )
    return weights


def mean_rewards(history: History) -> dict[str, float] | None:
    """The mean reward of the samples in the first and in the last epoch; None before its end."""
    epochs = history.epochs
    if not epochs:
        return None
    first, last = (float(epochs[i]["train"]["reward"]) for i in (0, -1))
    return {"first": first, "last": last}


def _start(given: str) -> str:
    """The directory of the captioner that was named; the name of a preset is no captioner."""
    from capdistill import presets

    if given in presets.names() and not user_path(given).exists():
        raise _untrained(f"the preset '{given}'")
    return str(captioner_directory(given))


def _model(values: Any) -> StartSection:
    if not values:
        raise ConfigError(
            "model: no captioner was given. Name the directory of a run or of a saved captioner "
            'first, `capdistill tune RUN --data PATH`, or give "model": {"start": DIRECTORY} in a '
            "run file."
        )
    made = [k for k in ModelSection.model_fields if k != "start" and k in values]
    if isinstance(values, Mapping) and made:
        raise _untrained(f"'{made[0]}' ({values[made[0]]!r})")
    return parse_section(StartSection, values, "model")


def _untrained(given: str) -> ConfigError:
    return ConfigError(
        f"model: {given} was given, but a captioner that is not trained yet cannot be tuned: the "
        "captions it samples earn no reward. Train it with `capdistill train` or `distill`, then "
        "give the directory of that run."
    )


def _require_no_teacher(losses: Mapping[str, Any]) -> None:
    from capdistill.training.distiller import make_losses

    taught = [name for name, loss in make_losses(losses).items() if loss.from_teacher]
    if taught:
        raise ConfigError(
            f"losses: no teacher was given for {', '.join(taught)}. Give --teacher DIR, or leave "
            "the losses out."
        )


def _summary(content: Mapping[str, Any]) -> str:
    """As of `train`, and the mean reward of the first and the last epoch."""
    lines, rewards = summary(content).splitlines(), content["reward"]
    if rewards is None or content["interrupted"]:
        return "\n".join(lines)
    first, last = (f"{rewards[when]:.4f}" for when in ("first", "last"))
    several = content["epochs"] > 1
    shown = f"{first} in the first epoch, {last} in the last" if several else first
    return "\n".join([lines[0], f"reward:    {shown} (mean of the samples)", *lines[1:]])
