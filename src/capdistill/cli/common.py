"""Shared arguments: the data set, the decoding options, metrics, saved captioners.

Nothing here loads pydantic: `capdistill caption` runs where only NumPy, Pillow and ONNX Runtime
are installed.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from capdistill.deploy.manifest import is_exported
from capdistill.errors import CheckpointError, ConfigError
from capdistill.files import user_path, write_text
from capdistill.generation.config import GenerationConfig

if TYPE_CHECKING:
    from capdistill.training.config import TrainConfig

DATA_FORMATS = ("flickr8k", "karpathy", "coco", "folder", "images", "shards", "sample")
DEFAULT_RECIPE = "kd_2024"  # the source of the default losses


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --data and the options that belong to it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="PATH", help='the folder or caption file of a data set, or "sample"'
    )
    group.add_argument(
        "--format",
        choices=DATA_FORMATS,
        metavar="FORMAT",
        help=f"the layout of the data: {', '.join(DATA_FORMATS)} (default: flickr8k)",
    )
    group.add_argument(
        "--images", metavar="DIR", help="the folder of the images (coco and karpathy)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="use only N images of each split")
    return group


def data_values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a `data` section that were given as options."""
    given = {
        "path": options.data,
        "format": options.format,
        "images": options.images,
        "limit": options.limit,
    }
    return {key: value for key, value in given.items() if value is not None}


_HELP = {
    "beam_size": "keep N hypotheses per image; 1 is greedy search",
    "max_length": "stop a caption after N tokens",
    "min_length": "generate at least N words",
    "length_normalisation": "how hypotheses of different lengths are ranked: none, average or gnmt",
    "length_penalty": "exponent of the length; a larger one prefers longer captions",
    "early_stopping": "when the search of an image stops: true, false or never",
    "num_return": "return the N best captions of an image",
    "no_repeat_ngram": "never repeat a sequence of N tokens; 0 allows it",
    "banned_words": "words that captions never contain",
    "allow_unknown": "allow the unknown token in captions",
    "not_last": "words that no caption ends with, or function_words",
    "prefix": "words that every caption begins with",
    "sample": "draw the words at random instead of searching",
    "temperature": "with --sample: divide the log-probabilities by X",
    "top_k": "with --sample: draw from the N most probable words",
    "top_p": "with --sample: draw from the most probable words that reach the probability X",
    "seed": "with --sample: the random seed",
    "beam_groups": "split the beams into N groups that avoid each other's words",
    "diversity_penalty": "with --beam-groups: how strongly they avoid them",
}


def add_generation_options(
    parser: argparse.ArgumentParser, purpose: str = "", without: Collection[str] = ()
) -> None:
    """Add an option for every field of `GenerationConfig`, with the same name.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_generation_options(parser)
        >>> generation_values(parser.parse_args(["--beam-size", "3", "--early-stopping", "never"]))
        {'beam_size': 3, 'early_stopping': 'never'}

    Args:
        parser: The parser of a command.
        purpose: What is decoded, for the heading.
        without: Fields that the command uses for an option of its own.
    """
    group = parser.add_argument_group(f"decoding{purpose}")
    for name, annotation in GenerationConfig.types().items():
        if name not in without:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, dest=name, help=_HELP[name], **_reader(annotation))


def generation_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `GenerationConfig`."""
    given = {name: getattr(options, name, None) for name in GenerationConfig.types()}
    if given["not_last"] == ["function_words"]:
        given["not_last"] = "function_words"
    return {name: value for name, value in given.items() if value is not None}


def _reader(annotation: Any) -> dict[str, Any]:
    """Arguments for argparse to read a field: a switch, a choice, several words, or one value."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(annotation) is Literal:
        return {"choices": kinds, "metavar": "NAME"}
    if bool in kinds:
        return {"type": _true_false_or_word, "metavar": "WHEN"}
    if any(get_origin(kind) is tuple for kind in (*kinds, annotation)):
        return {"nargs": "+", "metavar": "WORD"}
    kind: Callable[[str], Any] = kinds[0]
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}


def _true_false_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


TRAINING_FLAGS: dict[str, tuple[type, str, str]] = {
    "epochs": (int, "N", "number of passes over the training images"),
    "batch_size": (int, "N", "images per batch"),
    "captions_per_image": (int, "N", "captions of each image per batch (default: as in the data)"),
    "learning_rate": (float, "X", "peak learning rate"),
    "seed": (int, "N", "seed of everything random"),
    "num_workers": (int, "N", "processes that read images"),
    "device": (str, "NAME", "auto, cpu, cuda, ..."),
    "precision": (str, "NAME", "auto, bf16, fp16 or fp32"),
    "monitor": (str, "NAME", "score that decides which epoch is best, such as cider, or loss"),
}


def add_run_options(
    parser: argparse.ArgumentParser,
    config: type[TrainConfig],
    flags: Mapping[str, tuple[type, str, str]] = TRAINING_FLAGS,
    *,
    output: bool = True,
    recipes: bool = True,
    validation: bool = True,
) -> None:
    """Add the options of a run: its directory, configuration, data, training and validation.

    Args:
        parser: The parser of a command that trains.
        config: The options of its trainer, all of which --set takes.
        flags: Those that have a flag: name -> type, metavar, help.
        output: Whether the command writes a run.
        recipes: Whether a recipe is possible.
        validation: Whether the command reads the options of validation.
    """
    from capdistill.training.config import LOGGERS, TrainConfig

    if output:
        _add_output_options(parser)
    _add_settings(parser, recipes)
    parser.settings = [f"train.{name}" for name in config.model_fields]  # type: ignore[attr-defined]
    add_data_options(parser)
    group = parser.add_argument_group("training")
    for name, (kind, metavar, text) in flags.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)
    if output:
        group.add_argument(
            "--log",
            nargs="+",
            choices=LOGGERS,
            metavar="NAME",
            help=f"also write the history there: {', '.join(LOGGERS)}",
        )
        group.add_argument(
            "--profile",
            action="store_true",
            default=None,
            help="report after each epoch what the time was spent on",
        )
    if validation:
        add_metrics_option(group, ",".join(TrainConfig.model_fields["metrics"].default))
        purpose = " (how validation generates captions)"
        add_generation_options(parser, purpose, without=flags)
    else:
        parser.set_defaults(metrics=None)
    parser.set_defaults(flags=(*flags, *(("log", "profile") if output else ())))


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help="directory of the run: best/, final/, config.json, ..."
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=["auto"],
        metavar="auto",
        help="continue the run in the directory --out; with auto, start it if there is none",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: continue although losses, weights, teacher or data have changed",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of an earlier run in the directory --out",
    )


def _add_settings(parser: argparse.ArgumentParser, recipes: bool) -> None:
    group = parser.add_argument_group("configuration")
    parser.set_defaults(recipe=None)
    if recipes:
        from capdistill.training.recipes import RECIPES

        group.add_argument(
            "--recipe",
            metavar="NAME",
            help="start from the losses, weights and options of a recipe: " + ", ".join(RECIPES),
        )
    group.add_argument(
        "--config", metavar="FILE", help="start from a run file, such as that of an earlier run"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key of the run file, e.g. train.patience=3; repeat it for more keys",
    )


def add_metrics_option(group: Any, default: str) -> None:
    """Add --metrics; `metric_names` reads it."""
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help=f"metrics to compute, such as bleu,cider_d (default: {default})",
    )


def metric_names(options: argparse.Namespace) -> list[str] | None:
    """The names given to --metrics, separated by commas or spaces; None if it was not given.

    Raises:
        UnknownName: a metric does not exist; the message lists those that do.
    """
    from capdistill.metrics.scorer import select

    if options.metrics is None:
        return None
    names = [name for word in options.metrics for name in word.replace(",", " ").split()]
    if not names:
        raise ConfigError("--metrics names no metric. Give names such as bleu,cider_d.")
    select(names)
    return names


def directory_outside(given: str, out: str | None, what: str) -> str:
    """The directory of a captioner that a run reads, which must not be that of the run itself.

    Raises:
        CheckpointError: no captioner is there.
        ConfigError: it lies in `out`.
    """
    directory = captioner_directory(given)
    if out is not None and Path(out).resolve() in directory.resolve().parents:
        raise ConfigError(f"--out {out} is the {what}'s own directory. Give another one.")
    return str(directory)


def captioner_directory(given: str) -> Path:
    """The directory of a saved captioner or ensemble: the given one, or the best of a run.

    Args:
        given: A directory that `Captioner.save` wrote, a file in it, the directory of a run, or
            one of cached targets; or a directory of Hugging Face transformers, or "hf:NAME".

    Raises:
        CheckpointError: no captioner is there; the message says what is.
    """
    if not str(given).startswith("hf:"):
        require_existing(given, user_path(given, CheckpointError))
    from capdistill.saving import DESCRIPTION, ENSEMBLE, PRETRAINED, TARGETS, saved_file
    from capdistill.teachers.directory import is_pretrained

    if is_pretrained(given):
        return Path(given)
    path = user_path(given, CheckpointError)
    for directory in (path, path / "best", path / "final", path.parent if path.is_file() else path):
        names = (DESCRIPTION, ENSEMBLE, TARGETS, PRETRAINED)
        if any(saved_file(directory, name).is_file() for name in names):
            return directory
    if (path / "state.pt").exists():
        raise CheckpointError(
            f"{given} is a run that has not saved a captioner yet. Finish its first epoch with "
            f"--resume --out {given}."
        )
    if is_exported(path):
        raise CheckpointError(
            f"{given} is an exported captioner, which `capdistill caption`, `bench` and "
            "capdistill.deploy.OnnxCaptioner read. Give the captioner that was exported."
        )
    raise CheckpointError(
        f"{given} holds no saved captioner. Expected a directory that `capdistill train` or "
        "Captioner.save wrote: RUN, RUN/best or RUN/final, with a file captioner.json."
    )


def named_directories(given: Sequence[str]) -> dict[str, str]:
    """Name -> directory for DIR or NAME=DIR, with that of the run as name; one alone is "student".

    Example:
        >>> named_directories(["runs/a"]), named_directories(["runs/a/best", "small=runs/b"])
        ({'student': 'runs/a'}, {'a': 'runs/a/best', 'small': 'runs/b'})

    Raises:
        ConfigError: two have one name, or one has that of another role.
    """
    named: dict[str, str] = {}
    for each in given:
        name, equals, directory = each.partition("=")
        if not equals or Path(each).exists():
            path, directory = Path(each).absolute(), each
            name = path.parent.name if path.name in ("best", "final") else path.name
            name = name if len(given) > 1 else "student"
        if name in ("teacher", "baseline", *named):
            raise ConfigError(f"{each}: the name '{name}' is taken. Give it another: NAME=DIR.")
        named[name] = directory
    return named


def require_existing(given: str, path: Path) -> None:
    """Check that what an option names is there.

    Raises:
        CheckpointError: it is not; the message suggests the nearest name beside it.
    """
    if path.exists():
        return
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    near = difflib.get_close_matches(path.name, [each.name for each in siblings], n=1)
    hint = f" Did you mean '{path.with_name(near[0])}'?" if near else ""
    raise CheckpointError(f"{given}: there is no such directory.{hint}")


def require_writable(directory: str | Path) -> None:
    """Check that a directory can be written, before any work is done.

    Raises:
        ConfigError: it cannot be written; the message says why.
    """
    probe = user_path(directory) / ".capdistill-probe"
    write_text(probe, "")
    probe.unlink(missing_ok=True)


def recipe_values(
    name: str, section: str = "student", role: str | None = "student", *, staged: bool = False
) -> dict[str, Any]:
    """A recipe as values of a run file.

    Example:
        >>> recipe_values("kd_2024")["losses"]["token"]
        {'name': 'token', 'temperature': 4.0}

    Args:
        name: A name that `capdistill.training.recipe` knows.
        section: "student" to distil, "model" to train by cross-entropy.
        role: Which of the recipe's models goes there, if it has models: "teacher", also if none is
            named, or "student".
        staged: Whether a recipe with stages is possible; the values are what they have in common.

    Raises:
        UnknownName: there is no such recipe; the message lists the available ones.
        ConfigError: it has stages, which one run cannot have.
    """
    from capdistill.training.recipes import recipe, recipe_models

    options = recipe(name)
    if options.pop("stages", None) is not None and not staged:
        raise ConfigError(
            f"The recipe '{name}' trains a student in stages, from a teacher that is given. Use "
            f"capdistill distill --recipe {name} --teacher DIR --data PATH --out DIR, which checks "
            "every stage before the first one begins."
        )
    values: dict[str, Any] = {k: options.pop(k) for k in ("losses", "weights") if k in options}
    values = {**(values if section == "student" else {}), "train": options}
    models = recipe_models(name)
    if models is not None:
        kinds = models[role or "teacher"].items()
        values[section] = {kind: {"name": n, "kwargs": kwargs} for kind, (n, kwargs) in kinds}
        if section == "model":
            values["tokenizer"] = models["tokenizer"]
    return values


def default_losses() -> dict[str, Any]:
    """The losses of a distillation that names none.

    Example:
        >>> default_losses()["token"]
        {'name': 'token', 'temperature': 4.0}
    """
    from capdistill.training.recipes import recipe

    losses: dict[str, Any] = recipe(DEFAULT_RECIPE)["losses"]
    return losses
