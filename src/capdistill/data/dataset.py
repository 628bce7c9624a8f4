"""Images with their captions: one split (`CaptionData`) and the splits of a data set (`Splits`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from capdistill.data.caption_files import DataReport, Problem, Row, clean, pluralize
from capdistill.errors import DataError
from capdistill.runtime import stable_hash


@dataclass(frozen=True)
class Example:
    """An image file and all its captions, as they were written.

    Args:
        image_id: What the data set calls the image.
        path: The image file.
        captions: The raw captions, at least one.
    """

    image_id: str
    path: Path
    captions: tuple[str, ...]


class CaptionData(Dataset[tuple[Tensor, tuple[str, ...]]]):
    """One split: images and their captions. `data[i]` is (uint8 pixels (3, H, W), captions).

    Example:
        >>> data = CaptionData([Example("dog.jpg", Path("dog.jpg"), ("a dog", "a pet"))])
        >>> len(data), data.captions, data.image_ids
        (1, ['a dog', 'a pet'], ('dog.jpg',))

    Args:
        examples: The images with their captions.
        name: How messages call it.
        report: The problems met while its files were read.

    Raises:
        DataError: two examples have one id, or one has no caption.
    """

    def __init__(
        self, examples: Iterable[Example], *, name: str = "data", report: DataReport | None = None
    ) -> None:
        self.examples = tuple(examples)
        self.name = name
        self.report = DataReport() if report is None else report
        self.image_ids = tuple(example.image_id for example in self.examples)
        _refuse_unusable(self)

    @property
    def captions(self) -> list[str]:
        """All raw captions, image by image; what a tokenizer is trained on."""
        return [caption for example in self.examples for caption in example.captions]

    @property
    def references(self) -> dict[str, tuple[str, ...]]:
        """Image id -> its raw captions."""
        return {example.image_id: example.captions for example in self.examples}

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
        """
        order = range(min(which, len(self))) if isinstance(which, int) else which
        return CaptionData((self.examples[i] for i in order), name=self.name, report=self.report)

    def split(self, *, val: float = 0.1, test: float = 0.0, seed: int = 0) -> Splits:
        """Cut into train, val and test by chance that depends on the seed and the ids alone.

        Example:
            >>> data = CaptionData(Example(str(i), Path(f"{i}.jpg"), ("x",)) for i in range(10))
            >>> parts = data.split(val=0.2)
            >>> len(parts.train), len(parts.val)
            (8, 2)

        Args:
            val: The share of images kept for validation; at least one image where it is not 0.
            test: The share of images kept for testing, likewise.
            seed: Another seed is another split.

        Raises:
            DataError: too few images for the parts that were asked for.
        """
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
        note = f"split by chance with seed {seed}"
        present = {part: data for part, data in parts.items() if len(data)}
        return Splits(present, name=self.name, note=note, report=self.report)

    def verify(self) -> DataReport:
        """Read every image; the report names those that cannot be decoded, and why."""
        from capdistill.data.images import read_image

        found = DataReport()
        for example in self.examples:
            try:
                read_image(example.path)
            except DataError as error:
                reason = str(error).removeprefix(f"{example.path}: ").removesuffix(".")
                found.add(Problem("corrupt image", str(example.path), "", reason))
        return found

    def __str__(self) -> str:
        problems = f", {self.report.summary()}" if self.report.problems else ""
        return f"{self.name}: {pluralize(len(self), 'image')}, {_captions(self)}{problems}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


class Splits:
    """The splits of a data set. One that is absent is an error only when it is asked for.

    Example:
        >>> train = CaptionData([Example("a", Path("a.jpg"), ("a dog",))])
        >>> data = Splits({"train": train}, name="mine")
        >>> print(data)
        mine
          train: 1 image, 1 caption

    Args:
        parts: Split name -> its images and captions.
        name: How messages call the data set.
        note: How the split was made, for the summary.
        absent: Split name -> why it is not there.
        report: The problems met while the files were read.
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
            DataError: there is no such split; the message says why and which there are.
        """
        if name in self.parts:
            return self.parts[name]
        why = self.absent.get(name, "the files name no such split")
        raise DataError(
            f"{self.name} has no split '{name}': {why}. Splits there are: "
            f"{', '.join(self.parts) or '(none)'}. Use one of those, or cut one with "
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
        return f"<{type(self).__name__} {self.summary()}>"


def _refuse_unusable(data: CaptionData) -> None:
    if len(set(data.image_ids)) < len(data.image_ids):
        twice = next(i for n, i in enumerate(data.image_ids) if i in data.image_ids[:n])
        raise DataError(f"{data.name}: the image id '{twice}' stands twice; ids must differ.")
    for example in data.examples:
        if not example.captions:
            raise DataError(f"{data.name}: the image '{example.image_id}' has no caption.")


def _share(share: float, n: int) -> int:
    return max(1, round(share * n)) if share > 0 else 0


def _captions(part: CaptionData) -> str:
    return pluralize(sum(len(example.captions) for example in part.examples), "caption")


def to_examples(
    rows: Iterable[Row], file: str, find: Callable[[str], Path | None], report: DataReport
) -> dict[str, Example]:
    """Rows to examples by image, in the order of the file; what cannot be used is reported."""
    paths: dict[str, Path | None] = {}
    captions: dict[str, list[str]] = {}
    for image, text, place in rows:
        if image not in paths:
            paths[image] = find(image)
            if paths[image] is None:
                report.add(Problem("missing image", file, place, image))
        if paths[image] is None:
            continue
        caption = clean(text)
        if not caption:
            report.add(Problem("empty caption", file, place, image))
            continue
        captions.setdefault(image, []).append(caption)
    found = {image: path for image, path in paths.items() if path is not None}
    for image in found:
        if image not in captions:
            report.add(Problem("image without caption", file, "", image))
    return {image: Example(image, found[image], tuple(texts)) for image, texts in captions.items()}


def image_finder(*roots: Path) -> Callable[[str], Path | None]:
    """A function from a name in a caption file to the image file of that very name, or None."""

    def find(name: str) -> Path | None:
        inside = [root / name for root in roots if _stays_inside(root, name)]
        return next((path for path in inside if path.is_file()), None)

    return find


def require_some(examples: Sequence[object], name: str, report: DataReport, fix: str) -> None:
    """Refuse a data set of which nothing can be used, with the reasons and the fix."""
    if not examples:
        raise DataError(f"{name}: no image with a caption can be used. {fix}\n{report}")


def _stays_inside(root: Path, name: str) -> bool:
    if not name or "\0" in name or ".." in Path(name).parts:
        return False
    return not Path(name).is_absolute() or Path(name).is_relative_to(root)
