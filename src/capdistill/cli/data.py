"""The sections `data` and `teacher` of a run file: what is trained on, and from whom."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from capdistill.cli.common import DATA_FORMATS, directory_outside
from capdistill.errors import ConfigError, UnknownName, parse, suggest
from capdistill.files import read_object, user_path

if TYPE_CHECKING:
    from capdistill.data import Splits


FullPath = Annotated[str, AfterValidator(lambda text: _absolute(text))]
FileOrName = Annotated[str, AfterValidator(lambda t: _absolute(t) if t.endswith(".json") else t)]
Policy = Literal["skip", "raise"]


def _absolute(path: str) -> str:
    return path if "://" in path else str(user_path(path).absolute())  # an address stays one


def _absolute_teacher(path: str) -> str:
    """A name on the Hugging Face Hub, behind "hf:", stays one."""
    name = path.removeprefix("hf:")
    on_hub = name != path and not user_path(name).is_dir()
    return path if on_hub else _absolute(name)


def absolute_paths(given: Any) -> Any:
    """The absolute form of a teacher's path, of those in a list or mapping; a section stays.

    Raises:
        ValueError: something else.
    """
    if isinstance(given, (str, BaseModel)):
        return _absolute_teacher(given) if isinstance(given, str) else given
    listed = dict(enumerate(given)) if isinstance(given, list) else given
    if not isinstance(listed, Mapping) or not all(isinstance(v, str) for v in listed.values()):
        raise ValueError('expected a directory, a list of them, or {"name": directory, ...}')
    paths = {name: _absolute_teacher(each) for name, each in listed.items()}
    return [*paths.values()] if isinstance(given, list) else paths


class CurriculumSection(BaseModel):
    """The arguments of `capdistill.data.Curriculum`; the difficulty may be a JSON file, too."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    difficulty: FileOrName = "length"
    pacing: Literal["linear", "root", "step"] = "root"
    start: StrictFloat | StrictInt = Field(default=0.3, gt=0, le=1)
    until: StrictFloat | StrictInt = Field(default=0.5, gt=0, le=1)


class TeacherCaptionsSection(BaseModel):
    """The arguments of `capdistill.teachers.read_captions`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: FullPath
    num_return: StrictInt = Field(default=1, ge=1)
    keep: Literal["cider", "score"] | None = None
    mix: StrictInt | StrictFloat = Field(default=0, ge=0)
    reweight: StrictFloat | StrictInt | None = Field(default=None, gt=0)


class DataSection(BaseModel):
    """The section `data` of a run file: which data set, where it is, and how to read it.

    Args:
        format: The layout of the files.
        limit: Use only the first images of each split, this many.
        curriculum: Train on easy images first.
        teacher_captions: Train on captions that a teacher wrote to a file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str
    limit: StrictInt | None = Field(default=None, ge=1)
    curriculum: CurriculumSection | None = None
    teacher_captions: TeacherCaptionsSection | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Read the whole data set."""

    def load(self) -> Splits:
        """Read the data set and cut it to `limit`; photos without captions get the teacher's."""
        data = self.read() if self.limit is None else _cut(self.read(), self.limit)
        bare = [n for n in data if n in ("train", "val") and not data.get(n).captions]
        if self.teacher_captions is None or "train" not in bare:
            return data
        return _with_parts(data, {name: self._captioned(data.get(name), name) for name in bare})

    def _captioned(self, data: Any, split: str = "train") -> Any:
        """A split with the captions of the file, which need not have any but the training split."""
        from capdistill.errors import DataError
        from capdistill.teachers import TeacherCaptions, read_captions

        captions = self.teacher_captions
        if captions is None or isinstance(data, TeacherCaptions):
            return data
        try:
            return read_captions(captions.path, data, **captions.model_dump(exclude={"path"}))
        except DataError:
            if split == "train":
                raise
            return data

    def training_data(self, data: Splits) -> Any:
        """What to train on: the training split, with a teacher's captions or in a curriculum."""
        from capdistill.data import Curriculum

        train = self._captioned(data.train)
        if self.curriculum is None:
            return train
        options = self.curriculum.model_dump()
        if options["difficulty"].endswith(".json"):
            options["difficulty"] = read_object(
                options["difficulty"], "difficulties", " of image ids and numbers"
            )
        return Curriculum(train, **options)


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


class ImagesData(DataSection):
    """A folder of images without captions. A random share becomes val."""

    format: Literal["images"] = "images"
    path: FullPath
    val_share: StrictFloat = Field(default=0.1, gt=0, lt=1)
    seed: StrictInt = 0

    def read(self) -> Splits:
        """Read train and val."""
        from capdistill.data import Images

        return Images(self.path).split(val=self.val_share, seed=self.seed)


class ShardsData(DataSection):
    """A directory of WebDataset shards; `train-*.tar`, `val-*.tar` and `test-*.tar` are splits.

    Without a part called train, a random share of all images becomes val.
    """

    format: Literal["shards"] = "shards"
    path: FullPath
    captions: StrictBool = True
    val_share: StrictFloat = Field(default=0.1, gt=0, lt=1)
    seed: StrictInt = 0
    errors: Policy = "skip"

    def read(self) -> Splits:
        """Read the splits that the names of the files tell."""
        from capdistill.data import Shards, shard_splits

        splits = shard_splits(self.path, captions=self.captions, errors=self.errors)
        if "train" in splits.parts:
            return splits
        data = Shards(self.path, captions=self.captions, errors=self.errors)
        return data.split(val=self.val_share, seed=self.seed)


_SECTIONS: tuple[type[DataSection], ...] = (
    *(Flickr8kData, KarpathyData, CocoData, FolderData, ImagesData, ShardsData, SampleData),
)
FORMATS = dict(zip(DATA_FORMATS, _SECTIONS, strict=True))


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


def _cut(data: Splits, limit: int) -> Splits:
    return _with_parts(data, {name: data.get(name).subset(limit) for name in data})


def _with_parts(data: Splits, parts: Mapping[str, Any]) -> Splits:
    """The data with some splits replaced."""
    from capdistill.data import Splits

    whole = {**{name: data.get(name) for name in data}, **parts}
    return Splits(whole, name=data.name, note=data.note, absent=data.absent, report=data.report)


class MeanTeacherSection(BaseModel):
    """The average of the student's own weights as its teacher; see `MeanTeacher`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Literal["mean_teacher"]
    decay: float = Field(0.999, strict=True, ge=0, lt=1)


Teachers = Annotated[
    MeanTeacherSection | str | list[str] | dict[str, str], BeforeValidator(absolute_paths)
]


def teacher_section(values: Any) -> Any:
    """The section `teacher` as it was given; an average of the student itself is checked."""
    if not isinstance(values, Mapping) or not {"name"} <= {*values} <= {"name", "decay"}:
        return values
    name = str(values["name"])
    if name == "mean_teacher":
        return parse(MeanTeacherSection, dict(values), "teacher")
    if "decay" in values or not os.path.exists(os.path.expanduser(name)):
        raise UnknownName(f"teacher: there is no '{name}'. {suggest(name, ['mean_teacher'])}")
    return values


def teacher_directories(teacher: Any, out: str | None) -> Any:
    """The captioner's directory of each teacher, in the form they were given in; none is `out`."""
    if isinstance(teacher, MeanTeacherSection):
        return teacher
    if isinstance(teacher, dict):
        return {name: teacher_directories(each, out) for name, each in teacher.items()}
    if isinstance(teacher, list):
        return [teacher_directories(each, out) for each in teacher]
    return directory_outside(teacher, out, "teacher")
