"""Writing WebDataset shards from any data set: image files as they are, captions as JSON."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from capdistill.data.caption_files import DataReport, Policy, Problem
from capdistill.data.collate import image_ids_of
from capdistill.data.dataset import CaptionData, Splits
from capdistill.data.image_names import SUFFIXES, StoredImage
from capdistill.data.images import read_image
from capdistill.data.pixels import held_image, image_bytes
from capdistill.data.rows import accept_rows, caption_texts
from capdistill.data.shards import Sample, TarImage, index_file, samples_of
from capdistill.errors import ConfigError, DataError, require_int, shortened
from capdistill.files import user_path, write_atomically
from capdistill.progress import progress as report_progress


def write_shards(
    data: Any,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    images_per_shard: int = 1000,
    overwrite: bool = False,
    errors: Policy = "skip",
    progress: bool = True,
) -> list[Path]:
    """Write a data set as WebDataset shards, which `Shards` and the package `webdataset` read.

    Sample n has the members `n.jpg` (or another suffix: the bytes of the image file, unchanged) and
    `n.json`: {"image_id", "captions"}, and "references" and "weights" where they differ from the
    defaults. Images that are no files, such as arrays, become PNG. The same data give the same
    bytes. Writing that was interrupted continues at the shard that was not complete.

    Example:
        >>> import capdistill as cd, tempfile
        >>> files = write_shards(cd.data.sample(), tempfile.mkdtemp(), progress=False)
        >>> [file.name for file in files]
        ['train-000000.tar', 'val-000000.tar']

    Args:
        data: `Splits`, of which each is written, a split, a Hugging Face data set, or a data set or
            sequence of (image, captions).
        directory: It is created where it does not exist.
        name: Beginning of the files' names; by default that of the split, or "data".
        images_per_shard: Images in a shard; the last one may hold fewer.
        overwrite: Replace shards of the same name that hold other data.
        errors: "skip" leaves out images that cannot be read, with a report in a warning; "raise"
            stops at the first.
        progress: Show progress.

    Returns:
        The shards, in order.

    Raises:
        ConfigError: the directory holds other data under these names, or cannot be written.
        DataError: no image can be read.
    """
    require_int("write_shards: images_per_shard", images_per_shard, 1)
    data, folder = accept_rows(data), user_path(directory)
    if isinstance(data, Splits):
        if name is not None:
            raise ConfigError("write_shards: each split has its own name; leave name= out.")
        options: dict[str, Any] = {"images_per_shard": images_per_shard, "overwrite": overwrite}
        options |= {"errors": errors, "progress": progress}
        return [
            file
            for split in data
            for file in write_shards(data.get(split), folder, name=split, **options)
        ]
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not indexed or isinstance(data, (str, type, Mapping)):
        raise ConfigError(
            f"write_shards: {type(data).__name__} was given as data. Expected a capdistill data "
            "set, or a data set or sequence of (image, captions)."
        )
    name = name or "data"
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"write_shards: name={name!r} is not the beginning of a file name.")
    report = DataReport(errors)
    total = len(data)
    if not total:
        raise DataError("write_shards: the data set holds no image.")
    starts = range(0, total, images_per_shard)
    files = [folder / f"{name}-{number:06d}.tar" for number in range(len(starts))]
    _remove_others(files, folder, name, overwrite)
    ids = None if isinstance(data, CaptionData) else image_ids_of(data)
    bar = report_progress(
        zip(files, starts, strict=True),
        total,
        f"Writing {name}",
        show=progress,
        size=lambda each: min(images_per_shard, total - each[1]),
    )
    written = 0
    for file, start in bar:
        part = _Part(data, ids, range(start, min(start + images_per_shard, total)), report)
        if not file.exists() or not part.is_in(file, overwrite):
            write_atomically(file, part.write)
        written += len(samples_of(file))  # writes the index, too
    if not written:
        _remove(files)
        raise DataError(f"write_shards: none of the {total} images can be read.\n{report}")
    if report.problems:
        warnings.warn(f"write_shards: {name}: images were left out: {report}", stacklevel=2)
    return files


def _remove_others(files: list[Path], folder: Path, name: str, overwrite: bool) -> None:
    """Shards of that name beyond those to be written belong to other data."""
    numbered = re.compile(rf"{re.escape(name)}-\d{{6}}\.tar")
    there = [path for path in folder.glob("*.tar") if numbered.fullmatch(path.name)]
    others = sorted(set(there) - set(files))
    if others and not overwrite:
        raise ConfigError(
            f"write_shards: {folder} has more shards called {name} than these data need, such as "
            f"{others[0].name}. Give another directory or name=, or overwrite=True."
        )
    _remove(others)


def _remove(shards: Iterable[Path]) -> None:
    for path in shards:
        path.unlink(missing_ok=True)
        index_file(path).unlink(missing_ok=True)


class _Part:
    """The images of one shard."""

    def __init__(
        self, data: Any, ids: list[str] | None, numbers: range, report: DataReport
    ) -> None:
        self.data, self.ids, self.numbers, self.report = data, ids, numbers, report

    def items(self) -> Iterator[tuple[int, Any, dict[str, Any]]]:
        """Number, image, and what the JSON says of it."""
        for number in self.numbers:
            if not isinstance(self.data, CaptionData):
                pair = self.data[number]
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise DataError(
                        f"write_shards: item {number} is {shortened(pair)}; expected a pair "
                        "(image, captions)."
                    )
                image, captions = pair
                name = str(number) if self.ids is None else self.ids[number]
                yield number, image, {"image_id": name, "captions": caption_texts(captions)}
                continue
            example = self.data.examples[number]
            about: dict[str, Any] = {
                "image_id": example.image_id,
                "captions": list(example.captions),
            }
            if example.references != example.captions:
                about["references"] = list(example.references)
            if example.weights is not None:
                about["weights"] = list(example.weights)
            yield number, example.path, about

    def write(self, file: Path) -> None:
        """Write the shard. The same images give the same bytes."""
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, image, about in self.items():
                try:
                    data, suffix = encoded(image)
                except (DataError, OSError) as error:
                    problem = Problem("corrupt image", about["image_id"], "", str(error))
                    self.report.add(problem)
                    continue
                _add(tar, f"{number:09d}{suffix}", data)
                _add(tar, f"{number:09d}.json", json.dumps(about).encode())

    def is_in(self, file: Path, overwrite: bool) -> bool:
        """Whether a shard holds these images; those that cannot be read may be absent.

        Raises:
            ConfigError: it holds others, and must not be replaced.
        """
        try:
            found = {sample.key: sample for sample in samples_of(file)}
        except DataError:
            return False  # damaged
        same = (self._is_same(file, found.pop(f"{n:09d}", None), i, a) for n, i, a in self.items())
        if all(same) and not found:
            return True
        if overwrite:
            return False
        raise ConfigError(
            f"write_shards: {file} exists and holds other data. Give another directory or name=, "
            "or overwrite=True."
        )

    def _is_same(
        self, file: Path, sample: Sample | None, image: Any, about: dict[str, Any]
    ) -> bool:
        try:
            data, _ = encoded(image)
        except (DataError, OSError) as error:
            self.report.add(Problem("corrupt image", about["image_id"], "", str(error)))
            return sample is None
        if sample is None or sample.image is None or sample.about != about:
            return False
        return TarImage(file, *sample.image).load() == data


def encoded(image: Any) -> tuple[bytes, str]:
    """The bytes of an image file and its suffix; an image that is no file becomes PNG.

    Example:
        >>> import numpy as np
        >>> data, suffix = encoded(np.zeros((4, 4), np.uint8))
        >>> data[1:4], suffix
        (b'PNG', '.png')

    Raises:
        DataError: it is no image, or cannot be read.
    """
    if isinstance(image, StoredImage):
        return encoded(image.load())
    if isinstance(image, Mapping):
        return encoded(held_image(image))
    if isinstance(image, (str, os.PathLike, bytes, bytearray)) or hasattr(image, "read"):
        name, data = image_bytes(image)
        suffix = Path(name).suffix.lower()
        return data, suffix if suffix in SUFFIXES else _suffix_of(data, name)
    buffer = io.BytesIO()
    Image.fromarray(read_image(image).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _suffix_of(data: bytes, name: str) -> str:
    try:
        kind = str(Image.open(io.BytesIO(data)).format).lower()
    except Exception as error:
        raise DataError(f"{name}: no image; it begins with {data[:12]!r}.") from error
    return {"jpeg": ".jpg", "mpo": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
