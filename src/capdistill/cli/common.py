"""Shared arguments: the data set, the decoding options, metrics, saved captioners."""

from __future__ import annotations

import argparse
import difflib
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from capdistill.errors import CheckpointError, ConfigError, UnknownName, parse, suggest
from capdistill.files import read_object, user_path, write_text
from capdistill.generation.config import GenerationConfig
from capdistill.training.config import recipe, recipe_models

if TYPE_CHECKING:
    from capdistill.data import Splits


FullPath = Annotated[str, AfterValidator(lambda text: _absolute(text))]
FileOrName = Annotated[str, AfterValidator(lambda t: _absolute(t) if t.endswith(".json") else t)]
Policy = Literal["skip", "raise"]


def _absolute(path: str) -> str:
    return str(user_path(path).absolute())


class CurriculumSection(BaseModel):
    """The arguments of `capdistill.data.Curriculum`; the difficulty may be a JSON file, too."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    difficulty: FileOrName = "length"
    pacing: Literal["linear", "root", "step"] = "root"
    start: StrictFloat | StrictInt = Field(default=0.3, gt=0, le=1)
    until: StrictFloat | StrictInt = Field(default=0.5, gt=0, le=1)


class DataSection(BaseModel):
    """The section `data` of a run file: which data set, where it is, and how to read it.

    Args:
        format: The layout of the files.
        limit: Use only the first images of each split, this many.
        curriculum: Train on easy images first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str
    limit: StrictInt | None = Field(default=None, ge=1)
    curriculum: CurriculumSection | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Read the whole data set."""

    def load(self) -> Splits:
        """Read the data set and cut it to `limit`."""
        return self.read() if self.limit is None else _cut(self.read(), self.limit)

    def training_data(self, data: Splits) -> Any:
        """What to train on: the training split, in a curriculum if there is one."""
        from capdistill.data import Curriculum

        if self.curriculum is None:
            return data.train
        options = self.curriculum.model_dump()
        if options["difficulty"].endswith(".json"):
            options["difficulty"] = read_object(
                options["difficulty"], "difficulties", " of image ids and numbers"
            )
        return Curriculum(data.train, **options)


class SampleData(DataSection):
    """The 47 photos that come with the package."""

    format: Literal["sample"] = "sample"

    def read(self) -> Splits:
        """See `capdistill.data.sample`."""
        from capdistill.data import sample

        return sample()


class Flickr8kData(DataSection):
    """A folder in one of Flickr8k's layouts; see `capdistill.data.Flickr8k`."""

    format: Literal["flickr8k"] = "flickr8k"
    path: FullPath
    encoding: str = "utf-8"
    seed: StrictInt = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """Read train, val and test."""
        from capdistill.data import Flickr8k

        return Flickr8k(self.path, **self.model_dump(include={"encoding", "seed", "errors"}))


class KarpathyData(DataSection):
    """A Karpathy JSON file and its images; see `capdistill.data.Karpathy`."""

    format: Literal["karpathy"] = "karpathy"
    path: FullPath
    images: FullPath
    restval: StrictBool = True
    errors: Policy = "skip"

    def read(self) -> Splits:
        """Read the splits that the file names."""
        from capdistill.data import Karpathy

        return Karpathy(self.path, self.images, restval=self.restval, errors=self.errors)


class CocoData(DataSection):
    """COCO caption files, one per split. Without `val_path`, a random share becomes val."""

    format: Literal["coco"] = "coco"
    path: FullPath
    images: FullPath
    val_path: FullPath | None = None
    val_images: FullPath | None = None
    val_share: StrictFloat = Field(default=0.1, gt=0, lt=1)
    seed: StrictInt = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """Read train and val."""
        from capdistill.data import CocoCaptions, Splits

        train = CocoCaptions(self.path, self.images, errors=self.errors)
        if self.val_path is None:
            return train.split(val=self.val_share, seed=self.seed)
        val = CocoCaptions(self.val_path, self.val_images or self.images, errors=self.errors)
        return Splits({"train": train, "val": val}, name="COCO captions")


class FolderData(DataSection):
    """A folder of images with a CSV or JSON Lines file. A random share becomes val."""

    format: Literal["folder"] = "folder"
    path: FullPath
    captions: str | None = None
    encoding: str = "utf-8"
    val_share: StrictFloat = Field(default=0.1, gt=0, lt=1)
    seed: StrictInt = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """Read train and val."""
        from capdistill.data import Folder

        data = Folder(self.path, self.captions, encoding=self.encoding, errors=self.errors)
        return data.split(val=self.val_share, seed=self.seed)


FORMATS: dict[str, type[DataSection]] = {
    "flickr8k": Flickr8kData,
    "karpathy": KarpathyData,
    "coco": CocoData,
    "folder": FolderData,
    "sample": SampleData,
}


def parse_data(values: Any) -> DataSection:
    """Check a `data` section. `path: "sample"` selects the bundled sample.

    Example:
        >>> parse_data({"format": "flickr8k", "path": "/data/flickr8k"}).seed
        0
        >>> parse_data({"path": "sample", "limit": 4}).limit
        4

    Raises:
        ConfigError: no data set is named, the format or an option is unknown, or one is missing.
    """
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(
            f"data: {values!r} names no data set. Give --data PATH and --format, or a section "
            '"data": {"format": ..., "path": ...} in a run file; --data sample is the bundled one.'
        )
    values = dict(values)
    if values.get("path") == "sample" and values.get("format", "sample") == "sample":
        del values["path"]
        values["format"] = "sample"
    name = values.setdefault("format", "flickr8k")
    if not isinstance(name, str) or name not in FORMATS:
        raise UnknownName(f"data: there is no format {name!r}. {suggest(str(name), FORMATS)}")
    section = FORMATS[name]
    for key, field in section.model_fields.items():
        if field.is_required() and key not in values:
            raise ConfigError(
                f"data: format {name} needs '{key}', which was not given. Give "
                f"--{'data' if key == 'path' else key} PATH, or --set data.{key}=PATH."
            )
    return parse(section, values, f"data (format {name})")


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --data and the options that belong to it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="PATH", help='the folder or caption file of a data set, or "sample"'
    )
    group.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"the layout of the data: {', '.join(FORMATS)} (default: flickr8k)",
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


def _cut(data: Splits, limit: int) -> Splits:
    from capdistill.data import Splits

    parts = {name: data.get(name).subset(limit) for name in data}
    return Splits(parts, name=data.name, note=data.note, absent=data.absent, report=data.report)


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
    for name, field in GenerationConfig.model_fields.items():
        if name not in without:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, dest=name, help=_HELP[name], **_reader(field.annotation))


def generation_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `GenerationConfig`."""
    given = {name: getattr(options, name, None) for name in GenerationConfig.model_fields}
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


def captioner_directory(given: str) -> Path:
    """The directory of a saved captioner or ensemble: the given one, or the best of a run.

    Args:
        given: A directory that `Captioner.save` wrote, a file in it, or the directory of a run.

    Raises:
        CheckpointError: no captioner is there; the message says what is.
    """
    from capdistill.saving import DESCRIPTION, ENSEMBLE, saved_file

    path = user_path(given, CheckpointError)
    for directory in (path, path / "best", path / "final", path.parent if path.is_file() else path):
        if any(saved_file(directory, name).is_file() for name in (DESCRIPTION, ENSEMBLE)):
            return directory
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [each.name for each in siblings], n=1)
        hint = f" Did you mean '{path.with_name(near[0])}'?" if near else ""
        raise CheckpointError(f"{given}: there is no such directory.{hint}")
    if (path / "state.pt").exists():
        raise CheckpointError(
            f"{given} is a run that has not saved a captioner yet. Finish its first epoch with "
            f"--resume --out {given}."
        )
    raise CheckpointError(
        f"{given} holds no saved captioner. Expected a directory that `capdistill train` or "
        "Captioner.save wrote: RUN, RUN/best or RUN/final, with a file captioner.json."
    )


def require_writable(directory: str | Path) -> None:
    """Check that a directory can be written, before any work is done.

    Raises:
        ConfigError: it cannot be written; the message says why.
    """
    probe = user_path(directory) / ".capdistill-probe"
    write_text(probe, "")
    probe.unlink(missing_ok=True)


def recipe_values(name: str, section: str = "student", role: str = "student") -> dict[str, Any]:
    """A recipe as values of a run file.

    Example:
        >>> recipe_values("kd_2024")["losses"]["token"]
        {'name': 'token', 'temperature': 4.0}

    Args:
        name: A name that `capdistill.training.recipe` knows.
        section: "student" to distil, "model" to train by cross-entropy.
        role: Which of the recipe's models goes there, if it has models: "teacher" or "student".

    Raises:
        UnknownName: there is no such recipe; the message lists the available ones.
    """
    options = recipe(name)
    values = {key: options.pop(key) for key in ("losses", "weights")}
    values = {**(values if section == "student" else {}), "train": options}
    models = recipe_models(name)
    if models is not None:
        kinds = models[role].items()
        values[section] = {kind: {"name": n, "kwargs": kwargs} for kind, (n, kwargs) in kinds}
        if section == "model":
            values["tokenizer"] = models["tokenizer"]
    return values
