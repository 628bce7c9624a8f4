"""The `data` section of a run file: which data set, where, and how to read it."""

from __future__ import annotations

import argparse
import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from capdistill.errors import ConfigError, UnknownName, parse, suggest
from capdistill.files import finite_or_none, write_text
from capdistill.generation.config import GenerationConfig

if TYPE_CHECKING:
    from capdistill.data import Splits


FullPath = Annotated[str, AfterValidator(lambda text: str(Path(text).expanduser().absolute()))]
Policy = Literal["skip", "raise"]


class DataSection(BaseModel):
    """What every format has.

    Args:
        format: Of the files.
        limit: Only the first so many images of each split, for a trial.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str
    limit: int | None = Field(default=None, ge=1)

    @abstractmethod
    def read(self) -> Splits:
        """The data set as its files have it."""

    def load(self) -> Splits:
        """The data set, cut to `limit`."""
        return self.read() if self.limit is None else _cut(self.read(), self.limit)


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
    seed: int = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """The three splits."""
        from capdistill.data import Flickr8k

        return Flickr8k(self.path, **self.model_dump(include={"encoding", "seed", "errors"}))


class KarpathyData(DataSection):
    """A Karpathy JSON file and its images; see `capdistill.data.Karpathy`."""

    format: Literal["karpathy"] = "karpathy"
    path: FullPath
    images: FullPath
    restval: bool = True
    errors: Policy = "skip"

    def read(self) -> Splits:
        """The splits that the file names."""
        from capdistill.data import Karpathy

        return Karpathy(self.path, self.images, restval=self.restval, errors=self.errors)


class CocoData(DataSection):
    """COCO caption files, one a split; without `val_path` a share is cut off by chance."""

    format: Literal["coco"] = "coco"
    path: FullPath
    images: FullPath
    val_path: FullPath | None = None
    val_images: FullPath | None = None
    val_share: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """train and val."""
        from capdistill.data import CocoCaptions, Splits

        train = CocoCaptions(self.path, self.images, errors=self.errors)
        if self.val_path is None:
            return train.split(val=self.val_share, seed=self.seed)
        val = CocoCaptions(self.val_path, self.val_images or self.images, errors=self.errors)
        return Splits({"train": train, "val": val}, name="COCO captions")


class FolderData(DataSection):
    """A folder of images with a CSV or JSON Lines file; a share is cut off by chance."""

    format: Literal["folder"] = "folder"
    path: FullPath
    captions: str | None = None
    encoding: str = "utf-8"
    val_share: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """train and val."""
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
    """A `data` section to a checked one; `path: "sample"` stands for the bundled sample.

    Example:
        >>> parse_data({"format": "flickr8k", "path": "/data/flickr8k"}).seed
        0
        >>> parse_data({"path": "sample", "limit": 4})
        SampleData(format='sample', limit=4)

    Raises:
        ConfigError: no data named, an unknown format or option, an option that is missing.
    """
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(
            f"data: {values!r} names no data set. Give --data DIR and --format, or a section "
            '"data": {"format": ..., "path": ...} in a run file; --data sample is the bundled one.'
        )
    values = dict(values)
    if values.get("path") == "sample" and values.get("format", "sample") == "sample":
        del values["path"]
        values["format"] = "sample"
    name = values.setdefault("format", "flickr8k")
    if name not in FORMATS:
        raise UnknownName(f"data: there is no format '{name}'. {suggest(str(name), FORMATS)}")
    section = FORMATS[name]
    for key, field in section.model_fields.items():
        if field.is_required() and key not in values:
            raise ConfigError(
                f"data: format {name} needs '{key}', which was not given. Give "
                f"--{'data' if key == 'path' else key} PATH, or --set data.{key}=PATH."
            )
    return parse(section, values, f"data (format {name})")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """--data and its kin."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="PATH", help='folder or caption file, or "sample"')
    group.add_argument("--format", choices=list(FORMATS), help="of the data (default: flickr8k)")
    group.add_argument("--images", metavar="DIR", help="the images' folder (coco, karpathy)")
    group.add_argument("--limit", type=int, metavar="N", help="only N images of each split")


def data_values(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the `data` section."""
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
    "beam_size": "hypotheses kept an image; 1 is greedy",
    "max_length": "tokens a caption at most",
    "min_length": "words a caption at least",
    "length_normalisation": "how length counts when hypotheses are ranked: none, average or gnmt",
    "length_penalty": "its exponent; larger prefers longer captions",
    "early_stopping": "when beams stop: true, false or never",
    "num_return": "hypotheses given back an image",
    "no_repeat_ngram": "no so many tokens in a row twice",
    "banned_words": "words that are never said",
    "allow_unknown": "let the unknown token be said",
    "not_last": "words that no caption ends on, or function_words",
    "prefix": "words that every caption begins with",
    "sample": "draw words by chance",
    "temperature": "of the draws",
    "top_k": "draw from the k most probable words",
    "top_p": "draw from the fewest words with this share of the probability",
    "seed": "of the draws",
    "beam_groups": "groups of beams that avoid each other's words",
    "diversity_penalty": "how much they do",
}


def add_generation_options(
    parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> argparse._ArgumentGroup:
    """An option for every field of `GenerationConfig`, of the same name.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> group = add_generation_options(parser)
        >>> generation_values(parser.parse_args(["--beam-size", "3", "--early-stopping", "never"]))
        {'beam_size': 3, 'early_stopping': 'never'}

    Args:
        parser: Of a command.
        without: Fields that are left to other options of the command.
    """
    group = parser.add_argument_group("decoding")
    for name, field in GenerationConfig.model_fields.items():
        if name not in without:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, dest=name, help=_HELP[name], **_reading(field.annotation))
    return group


def generation_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `GenerationConfig`; {} where none was."""
    values = {
        name: _not_last(value) if name == "not_last" else value
        for name in GenerationConfig.model_fields
        if (value := getattr(options, name, None)) is not None
    }
    return values


def _reading(annotation: Any) -> dict[str, Any]:
    """How a field is read: a switch, a choice, several words, or one value."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(annotation) is Literal:
        return {"choices": kinds}
    if bool in kinds:
        return {"type": _true_false_or_word, "metavar": "WHEN"}
    if any(get_origin(kind) is tuple for kind in (*kinds, annotation)):
        return {"nargs": "+", "metavar": "WORD"}
    kind: Callable[[str], Any] = kinds[0]
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}


def _true_false_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _not_last(words: list[str]) -> list[str] | str:
    return "function_words" if words == ["function_words"] else words


DONE, PROBLEM, INTERRUPTED = 0, 1, 130


def say(text: str) -> None:
    """A line for the reader, on stderr."""
    print(text, file=sys.stderr, flush=True)


def give(options: argparse.Namespace, content: Any, text: Callable[[], str]) -> None:
    """The result on stdout: `content` as JSON with `--json`, otherwise what `text` gives."""
    print(as_json(content) if options.json else text(), flush=True)


def as_json(content: Any) -> str:
    """JSON for programs: numbers that are not finite become null.

    Example:
        >>> as_json({"cider_d": float("nan")})
        '{\\n  "cider_d": null\\n}'
    """
    return json.dumps(finite_or_none(content), indent=2, ensure_ascii=False, allow_nan=False)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text as aligned columns; those numbered in `right` are set to the right.

    Example:
        >>> print(columns([("name", "size"), ("lstm", "5"), ("transformer", "12")], right=[1]))
        name         size
        lstm            5
        transformer    12
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(widths[i]) if i in right else text.ljust(widths[i])
            for i, text in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def require_writable(directory: str | Path) -> None:
    """Find out now, not after an hour of work, that a directory cannot be written.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    probe = Path(directory) / ".capdistill-probe"
    write_text(probe, "")
    probe.unlink(missing_ok=True)
