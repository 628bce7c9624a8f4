"""Images with their captions: one split (`CaptionData`) and the splits of a data set (`Splits`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from capdistill.data.caption_files import (
    DataReport,
    Problem,
    Row,
    image_name,
    pluralize,
    require_caption,
    usable_captions,
)
from capdistill.data.image_names import Finder, StoredImage
from capdistill.data.source import require_unique_ids
from capdistill.errors import ConfigError, DataError, require_int, require_number, shortened
from capdistill.files import user_path
from capdistill.progress import progress
from capdistill.runtime import stable_hash


@dataclass(frozen=True, init=False)
class Example:
    """An image file and all its captions, as they were written.

    Example:
        >>> example = Example("dog", "photos/dog.jpg", ["A brown dog runs ."])
        >>> example.path.name, example.captions
        ('dog.jpg', ('A brown dog runs .',))
        >>> Example.unlabelled("cat", "photos/cat.jpg").captions
        ()

    Args:
        image_id: The name of the image in its data set.
        path: The image file, or its place in a larger one. It is opened when the image is read.
        captions: The raw captions to train on, at least one.
        references: The raw captions to score against; by default `captions`.
        weights: The weight of each of `captions` in the cross-entropy; by default 1.

    Raises:
        DataError: the id is not a name, the path is invalid, a caption is not text, or there is
            another number of weights.
        ConfigError: a weight is not a finite number >= 0.
    """

    image_id: str
    path: Path | StoredImage
    captions: tuple[str, ...]
    references: tuple[str, ...]
    weights: tuple[float, ...] | None

    def __init__(
        self,
        image_id: str | int,
        path: str | os.PathLike[str] | StoredImage,
        captions: Sequence[str],
        references: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        name = image_name(image_id)
        if name is None:
            raise DataError(f"The image id {image_id!r} is not a name; expected a string.")
        texts = _checked_texts(captions, "caption", name)
        values = {
            "image_id": name,
            "path": path if isinstance(path, (Path, StoredImage)) else user_path(path, DataError),
            "captions": texts,
            "references": texts,
            "weights": None if weights is None else _checked_weights(weights, len(texts), name),
        }
        if references is not None:
            values["references"] = _checked_texts(references, "reference", name)
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def unlabelled(cls, image_id: str | int, path: str | os.PathLike[str] | StoredImage) -> Example:
        """An image without captions, for losses that read images alone."""
        example = cls(image_id, path, ["no caption"])
        for key in ("captions", "references"):
            object.__setattr__(example, key, ())
        return example


def _checked_texts(captions: Sequence[str], what: str, image: str) -> tuple[str, ...]:
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise DataError(
            f"The {what}s of image '{image}' are {type(captions).__name__}; expected a list of "
            "strings."
        )
    texts = tuple(require_caption(text, f"A {what} of image '{image}'") for text in captions)
    if not texts:
        raise DataError(
            f"The image '{image}' has no {what}; leave it out, or use Example.unlabelled."
        )
    return texts


def _checked_weights(weights: Sequence[float], captions: int, image: str) -> tuple[float, ...]:
    if len(weights) != captions:
        raise DataError(f"The image '{image}' has {len(weights)} weights of {captions} captions.")
    for weight in weights:
        require_number(f"A caption weight of image '{image}'", weight, 0)
    return tuple(float(weight) for weight in weights)


class CaptionData(Dataset[tuple[Tensor, tuple[str, ...]]]):
    """One split: images and their captions. `data[i]` is (uint8 pixels (3, H, W), captions).

    Example:
        >>> data = CaptionData([Example("dog.jpg", Path("dog.jpg"), ("a dog", "a pet"))])
        >>> len(data), data.captions, data.image_ids
        (1, ['a dog', 'a pet'], ('dog.jpg',))
        >>> data
        <CaptionData data: 1 image, 2 captions>

    Args:
        examples: The images with their captions.
        name: The name of the data in messages.
        report: The problems found while its files were read.

    Raises:
        DataError: two examples have the same id, or one is not an `Example`.
    """

    def __init__(
        self, examples: Iterable[Example], *, name: str = "data", report: DataReport | None = None
    ) -> None:
        if isinstance(examples, str) or not isinstance(examples, Iterable):
            raise DataError(
                f"{name}: {type(examples).__name__} was given; expected Example(image_id, path, "
                "captions) objects. The readers, such as Flickr8k and Folder, make them of files."
            )
        self.examples = tuple(examples)
        self.name = name
        self.report = DataReport() if report is None else report
        other = next((e for e in self.examples if not isinstance(e, Example)), None)
        if other is not None:
            raise DataError(
                f"{name}: {type(other).__name__} was given where an Example(image_id, path, "
                "captions) was expected. A list of (image, captions) pairs is data as it is."
            )
        self.image_ids = tuple(example.image_id for example in self.examples)
        require_unique_ids(self.image_ids, name)

    @property
    def captions(self) -> list[str]:
        """All raw captions to train on, image by image. A tokenizer is trained on them."""
        return [caption for example in self.examples for caption in example.captions]

    @property
    def references(self) -> dict[str, tuple[str, ...]]:
        """Image id -> the raw captions to score against."""
        return {example.image_id: example.references for example in self.examples}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...]]:
        from capdistill.data.images import read_image

        example = self.examples[index]
        return read_image(example.path), example.captions

    def subset(self, which: int | Iterable[int]) -> CaptionData:
        """The first n images, or those at the given positions.

        Example:
            >>> data = CaptionData(Example(str(i), Path(f"{i}.jpg"), ("x",)) for i in range(4))
            >>> data.subset(2).image_ids, data.subset([3, 0]).image_ids
            (('0', '1'), ('3', '0'))

        Raises:
            ConfigError: a number below 0, or positions that are no whole numbers.
            DataError: there is no image at one of the positions.
        """
        if isinstance(which, (int, str)) or not isinstance(which, Iterable):
            which = range(min(require_int("subset", which, 0), len(self)))
        places = [require_int("subset: a position", place) for place in which]
        try:
            chosen = [self.examples[place] for place in places]
        except IndexError as error:
            raise DataError(f"{self.name}: {error}; there are {len(self)} images.") from error
        return CaptionData(chosen, name=self.name, report=self.report)

    def split(self, *, val: float = 0.1, test: float = 0.0, seed: int = 0) -> Splits:
        """Split at random into train, val and test, depending on the seed and the ids alone.

        Example:
            >>> data = CaptionData(Example(str(i), Path(f"{i}.jpg"), ("x",)) for i in range(10))
            >>> parts = data.split(val=0.2)
            >>> len(parts.train), len(parts.val)
            (8, 2)

        Args:
            val: The share of images kept for validation: 0 for none, else at least one image.
            test: The share of images kept for testing, likewise.
            seed: Another seed gives another split.

        Raises:
            ConfigError: a share that is not in [0, 1).
            DataError: too few images for these parts.
        """
        for part, share in {"val": val, "test": test}.items():
            require_number(f"split: {part}", share, 0, below=1)
        sizes = {"val": _share(val, len(self)), "test": _share(test, len(self))}
        sizes = {"train": len(self) - sum(sizes.values()), **sizes}
        if sizes["train"] < 1:
            raise DataError(
                f"{self.name}: {len(self)} images cannot be split into val={val}, test={test} and "
                "a training part. Give more images or smaller shares."
            )
        order = sorted(self.examples, key=lambda e: (stable_hash(seed, e.image_id), e.image_id))
        parts, begin = {}, 0
        for part, size in sizes.items():
            chosen = order[begin : (begin := begin + size)]
            parts[part] = CaptionData(chosen, name=f"{self.name}/{part}", report=self.report)
        note = f"random split with seed {seed}"
        present = {part: data for part, data in parts.items() if len(data)}
        return Splits(present, name=self.name, note=note, report=self.report)

    def verify(self) -> DataReport:
        """Read every image. The report names those that cannot be decoded, and why."""
        from capdistill.data.images import read_image

        report = DataReport()
        for example in progress(self.examples, len(self), f"Reading the images of {self.name}"):
            try:
                read_image(example.path)
            except DataError as error:
                reason = str(error).removeprefix(f"{example.path}: ").removesuffix(".")
                report.add(Problem("corrupt image", str(example.path), "", reason))
        return report

    def __str__(self) -> str:
        problems = f", {self.report.summary()}" if self.report.problems else ""
        return f"{self.name}: {pluralize(len(self), 'image')}, {_captions(self)}{problems}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


class Splits:
    """The splits of a data set. An absent split is an error only when it is used.

    Example:
        >>> train = CaptionData([Example("a", Path("a.jpg"), ("a dog",))])
        >>> data = Splits({"train": train}, name="mine")
        >>> print(data)
        mine
          train: 1 image, 1 caption

    Args:
        parts: Split name -> its images and captions.
        name: The name of the data set in messages.
        note: How the split was made, for the summary.
        absent: Split name -> why it is absent.
        report: The problems found while the files were read.
    """

    def __init__(
        self,
        parts: Mapping[str, CaptionData],
        *,
        name: str = "data",
        note: str = "",
        absent: Mapping[str, str] | None = None,
        report: DataReport | None = None,
    ) -> None:
        if not isinstance(parts, Mapping) or not all(isinstance(n, str) for n in parts):
            raise ConfigError(
                f"Splits: {shortened(parts)} was given; expected a mapping of names to data, such "
                'as {"train": ..., "val": ...}.'
            )
        self.parts = dict(parts)
        self.name = name
        self.note = note
        self.absent = dict(absent or {})
        self.report = DataReport() if report is None else report

    @property
    def train(self) -> CaptionData:
        """The images to train on."""
        return self.get("train")

    @property
    def val(self) -> CaptionData:
        """The images to validate on."""
        return self.get("val")

    @property
    def test(self) -> CaptionData:
        """The images to test on."""
        return self.get("test")

    @property
    def all(self) -> CaptionData:
        """The images of all splits together."""
        examples = (example for part in self.parts.values() for example in part.examples)
        return CaptionData(examples, name=self.name, report=self.report)

    def get(self, name: str) -> CaptionData:
        """A split by its name.

        Raises:
            DataError: there is no such split; the message gives the reason and lists the splits.
        """
        if str(name) in self.parts:
            return self.parts[str(name)]
        why = self.absent.get(str(name), "the files name no such split")
        raise DataError(
            f"{self.name} has no split '{name}': {why}. Available splits: "
            f"{', '.join(self.parts) or '(none)'}. Use one of them, or make one with "
            "data.train.split(val=0.1)."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def summary(self) -> str:
        """Images and captions of each split, absent splits, and problems."""
        lines = [f"{self.name}" + (f" ({self.note})" if self.note else "")]
        for name, part in self.parts.items():
            lines.append(f"  {name}: {pluralize(len(part), 'image')}, {_captions(part)}")
        lines += [f"  {name}: absent, {why}" for name, why in self.absent.items()]
        if self.report.problems:
            lines.append(f"  {self.report.summary()}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"<{type(self).__name__} {self.name}: {sizes or 'empty'}>"


def _share(share: float, n: int) -> int:
    return max(1, round(share * n)) if share > 0 else 0


def _captions(part: CaptionData) -> str:
    return pluralize(sum(len(example.captions) for example in part.examples), "caption")


def to_examples(
    rows: Iterable[Row], file: str, find: Finder, report: DataReport
) -> dict[str, Example]:
    """Collect rows into one example per image, in file order; what cannot be used is reported.

    Args:
        rows: Names of images with one caption each.
        file: The caption file, for the report.
        find: Gives the files that a name may mean.
        report: Where problems go.
    """
    paths: dict[str, Path | None] = {}
    first_names: dict[Path, str] = {}  # "dog" and "dog.jpg" may be one image
    captions: dict[str, list[str]] = {}
    for image, text, place in rows:
        if image not in paths:
            files = find(image)
            paths[image] = files[0] if len(files) == 1 else None
            if len(files) != 1:
                kind = "ambiguous image" if files else "missing image"
                which = f"{image}: {', '.join(path.name for path in files[:4])}"
                outside = os.path.isabs(image) and os.path.isfile(image)
                absent = f"{image}: outside of the folder of the images" if outside else image
                report.add(Problem(kind, file, place, which if files else absent))
        path = paths[image]
        if path is None:
            continue
        image = first_names.setdefault(path, image)
        usable = usable_captions([text], report, file, place, image)
        if usable:
            captions.setdefault(image, []).extend(usable)
    found = {image: path for path, image in first_names.items()}
    for image in found:
        if image not in captions:
            report.add(Problem("image without caption", file, "", image))
    return {image: Example(image, found[image], texts) for image, texts in captions.items()}


def require_some(examples: Sequence[object], name: str, report: DataReport, fix: str) -> None:
    """Reject a data set in which nothing can be used, with the reasons and the fix."""
    if not examples:
        raise DataError(f"{name}: no image with a caption can be used. {fix}\n{report}")


def require_data(function: str, data: object) -> None:
    """Refuse what is no data set of ours, whose images have ids.

    Raises:
        DataError: names what was given.
    """
    if not isinstance(data, CaptionData):
        raise DataError(
            f"{function}: {type(data).__name__} was given as data; expected one split of a "
            "capdistill data set, such as data.train or cd.data.Images(folder)."
        )
