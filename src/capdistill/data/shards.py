"""WebDataset shards: images and captions in tar files, written and read with random access.

A shard is a plain tar file. Members whose names differ only behind the first dot are one sample:
`000012.jpg`, `000012.json`. An index beside each shard says where its images begin, so that they
are read in any order, by any process, like single files.
"""

from __future__ import annotations

import glob
import io
import json
import mmap
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from capdistill.data.caption_files import (
    DataReport,
    Policy,
    Problem,
    image_name,
    parse_json,
    usable_captions,
)
from capdistill.data.dataset import CaptionData, Example, Splits, require_some
from capdistill.data.image_keys import file_stamp, hash_bytes
from capdistill.data.image_names import SUFFIXES, StoredImage
from capdistill.data.rows import CAPTION_COLUMNS, caption_texts
from capdistill.errors import CapdistillError, DataError
from capdistill.files import from_json, json_checksum, user_path, write_text

FORMAT = "capdistill.shards/1"
_BLOCK = 512  # bytes of a tar header; data are padded to a multiple
_MAX_TEXT = 2**24  # bytes of a member with captions
_TEXTS = ("txt", "caption", "captions", "text")  # members with one caption per line
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|pipe:", re.IGNORECASE)  # Path makes "s3://a" "s3:/a"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NUMBERED = re.compile(r"(.+?)[-_]\d+\.tar")
_SPLITS = {"dev": "val", "valid": "val", "validation": "val"}


class Shards(CaptionData):
    """Images and captions in WebDataset shards, those of `write_shards` or any others.

    Images stay in the shards and are read when they are needed. Captions are in the member `.json`
    ("captions", "caption", ... of an object) or `.txt` (one per line).

    Example:
        >>> import capdistill as cd, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> _ = cd.data.write_shards(cd.data.sample().val, folder, name="val", progress=False)
        >>> data = Shards(f"{folder}/val-{{000000..000000}}.tar")
        >>> data.references == cd.data.sample().val.references
        True

    Args:
        source: A directory, of which all `.tar` files are taken; a file; a pattern such as
            "train-{000000..000146}.tar" or "train-*.tar"; or a list of files.
        captions: False for images without captions.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.

    Raises:
        DataError: no shard is there; one is truncated or is no tar file; or nothing can be used.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        captions: bool = True,
        errors: Policy = "skip",
    ) -> None:
        files = find_shards(source)
        report = DataReport(errors)
        samples = [(file, sample) for file in files for sample in samples_of(file)]
        counts = Counter(sample.key for _, sample in samples)
        again = any(count > 1 for count in counts.values())  # keys begin anew in each shard
        examples: dict[str, Example] = {}
        for file, sample in samples:
            example = _example(file, sample, again, captions, report)
            if example is not None and example.image_id in examples:
                place = f"sample {sample.key}"
                report.add(Problem("duplicate id", str(file), place, example.image_id))
            elif example is not None:
                examples[example.image_id] = example
        name = files[0].parent.name if len(files) > 1 else files[0].stem
        kinds = ", ".join(sorted({kind for _, sample in samples for kind in sample.kinds})[:12])
        fix = (
            f"The members are of the kinds {kinds or '(none)'}; captions=False reads images alone."
        )
        require_some([*examples], name, report, fix)
        super().__init__(examples.values(), name=name, report=report)


def shard_splits(
    directory: str | os.PathLike[str], *, captions: bool = True, errors: Policy = "skip"
) -> Splits:
    """The splits of a directory of shards, by the beginnings of their names.

    Args:
        directory: Holds `train-000000.tar`, `val-000000.tar`, ...
        captions, errors: As for `Shards`.

    Raises:
        DataError: as `Shards`.
    """
    files, folder = find_shards(directory), user_path(directory, DataError)
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        name = (match[1] if match else file.stem).lower()
        groups.setdefault(_SPLITS.get(name, name), []).append(file)
    parts = {
        name: Shards(files, captions=captions, errors=errors) for name, files in groups.items()
    }
    for name, part in parts.items():
        part.name = f"{folder.name or folder}/{name}"
    return Splits(parts, name=folder.name or str(folder))


class TarImage(StoredImage):
    """An image in a tar file.

    Args:
        file: The tar file.
        member: Name of the member.
        offset: Where its data begin, in bytes.
        size: Bytes of its data.
    """

    def __init__(self, file: Path, member: str, offset: int, size: int) -> None:
        self.file, self.member, self.offset, self.size = file, member, offset, size

    def load(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: another member lies there, or the file ends before.
        """
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset - _BLOCK)
            data = _read_fully(file, _BLOCK + self.size)
        named = os.fsencode(self.member)
        plain = named.isascii() and len(named) < 100  # others may have a header of their own
        if len(data) < _BLOCK + self.size or (plain and not data.startswith(named)):
            raise DataError(
                f"{self.file} was changed while it was in use: '{self.member}' is not at byte "
                f"{self.offset} any more. Read the data set again."
            )
        return data[_BLOCK:]

    def digest(self) -> str:
        """A hash of the bytes: that of the file that was written to the shard."""
        return hash_bytes(self.load())

    def stamp(self) -> Sequence[int] | None:
        """Size and times of the tar file, and the place in it."""
        stamp = file_stamp(self.file)
        return None if stamp is None else [*stamp, self.offset, self.size]

    def stat(self) -> Any:
        """The size of the image."""
        return SimpleNamespace(st_size=self.size)

    def __str__(self) -> str:
        return f"{self.file}:{self.member}"


def _read_fully(file: io.FileIO, size: int) -> bytes:
    """`size` bytes, or all up to the end: a single read may give fewer."""
    size = min(size, os.fstat(file.fileno()).st_size)  # reading allocates what it asks for
    parts, left = [], size
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def find_shards(source: Any) -> list[Path]:
    """The files that a directory, pattern or list names, sorted.

    Example:
        >>> find_shards("/no/such/train-{00..01}.tar")
        Traceback (most recent call last):
        ...
        capdistill.errors.DataError: Shards: /no/such/train-00.tar does not exist. ...

    Raises:
        DataError: there is none, or one of them does not exist.
    """
    if isinstance(source, (str, os.PathLike)):
        return _find(os.fspath(source))
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        given = type(source).__name__
        raise DataError(f"Shards: {given} was given. Give a directory, a pattern or a list.")
    files = [file for each in source for file in _find(str(user_path(each, DataError)))]
    if not files:
        raise DataError("Shards: the list is empty. Name at least one tar file.")
    return files


def _find(source: str) -> list[Path]:
    if _ADDRESS.match(source):
        raise DataError(
            f"Shards: {source} is not a file. Images are read in any order, so shards must lie on "
            "a disk or a mounted file system: copy or mount them (curl --remote-name, rclone "
            "mount), then give the directory. To train on a stream, give batches: an object with "
            "epoch(n, start)."
        )
    match = _RANGE.search(source)
    if match:
        first, last = int(match[1]), int(match[2])
        numbers = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
        names = (source[: match.start()] + number + source[match.end() :] for number in numbers)
        return [file for name in names for file in _find(name)]
    path = user_path(source, DataError)
    if path.is_dir():
        found = sorted(file for file in path.glob("*.tar") if not file.name.startswith("."))
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        what = "holds no file *.tar" if path.is_dir() else "does not exist"
        raise DataError(f"Shards: {path} {what}. Give a directory of shards, or a pattern.")
    return found


@dataclass
class Sample:
    """A sample of a shard, as the index keeps it.

    Args:
        key: Name of its members up to the first dot.
        image: Member, offset and size of its image; None without one.
        about: The content of its `.json`; None without one, or if it is not JSON.
        lines: The lines of its `.txt`; None without one.
        kinds: What stands behind the first dot of its members.
    """

    key: str
    image: tuple[str, int, int] | None
    about: Any
    lines: list[str] | None
    kinds: list[str]


def samples_of(file: Path) -> list[Sample]:
    """The samples of a shard, from the index beside it, or from the shard.

    Raises:
        DataError: it is truncated, damaged, or no tar file.
    """
    index, stamp = index_file(file), (file_stamp(file) or [])[:2]  # as it is before it is read
    try:
        known = from_json(index.read_text(encoding="utf-8"))
        whole = known["checksum"] == json_checksum(known["samples"])
        if whole and known["format"] == FORMAT and known["stamp"] == stamp:
            return [_checked(Sample(**sample)) for sample in known["samples"]]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none, old or damaged
    samples = list(_scan(file))
    described = [vars(sample) for sample in samples]
    content = {"format": FORMAT, "stamp": stamp, "checksum": json_checksum(described)}
    content["samples"] = described
    with suppress(CapdistillError):  # it saves time and nothing else
        write_text(index, json.dumps(content))
    return samples


def _checked(sample: Sample) -> Sample:
    """A sample of an index.

    Raises:
        TypeError: a value is not of its type.
    """
    member, *place = sample.image or ("", 0, 0)
    texts = [sample.key, member, *sample.kinds, *(sample.lines or ())]
    numbers = len(place) == 2 and all(type(each) is int and each >= 0 for each in place)
    if not (numbers and all(isinstance(text, str) for text in texts)):
        raise TypeError(f"{sample} is no sample.")
    return sample


def index_file(file: Path) -> Path:
    """The index beside a shard."""
    return file.with_name(f"{file.name}.index.json")


def _scan(file: Path) -> Iterator[Sample]:
    """The samples of a tar file, from its headers and captions.

    Raises:
        DataError: it is truncated, damaged, compressed, or no tar file.
    """
    found: dict[str, Sample] = {}
    try:
        with (
            open(file, "rb") as handle,  # mapped: a damaged size cannot make it read too much
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
            tarfile.open(fileobj=content, mode="r:") as tar,
        ):
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isreg() and not member.issparse():
                    _add_member(found, file, member, content)
            if content[end : end + _BLOCK] != bytes(_BLOCK):
                last = f"behind '{next(reversed(found))}'" if found else "at its beginning"
                raise DataError(
                    f"{file} is truncated or damaged {last} (byte {end:,}): a tar file ends with "
                    "empty blocks. Copy or write it again."
                )
    except DataError:
        raise
    except Exception as error:  # tarfile raises many kinds on damaged headers
        raise DataError(
            f"{file} cannot be read as a tar file ({error or type(error).__name__}). Expected an "
            "uncompressed tar file of samples such as 000012.jpg, 000012.json."
        ) from error
    yield from found.values()


def _add_member(
    found: dict[str, Sample], file: Path, member: tarfile.TarInfo, content: mmap.mmap
) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, _, kind = name.partition(".")
    kind = kind.lower()
    if not stem:
        return  # hidden, or a note of macOS
    begin, size = member.offset_data, member.size
    if begin + size > len(content):
        raise tarfile.ReadError("unexpected end of data")
    key = f"{folder}{slash}{stem}"
    sample = found.setdefault(key, Sample(key, None, None, None, []))
    sample.kinds.append(kind)
    if f".{kind}" in SUFFIXES and sample.image is None:
        sample.image = (member.name, begin, size)
    if kind in ("json", *_TEXTS) and size <= _MAX_TEXT:
        text = content[begin : begin + size].decode("utf-8", "replace").removeprefix("\ufeff")
        if kind != "json":
            sample.lines = text.split("\n")
            return
        with suppress(DataError):  # it is reported with its sample
            sample.about = parse_json(text, f"{file}:{member.name}")


def _example(
    file: Path, sample: Sample, again: bool, captioned: bool, report: DataReport
) -> Example | None:
    place = f"sample {sample.key}"
    about: Any = sample.about if isinstance(sample.about, dict) else {}
    given = image_name(about.get("image_id"))
    name = given or (f"{file.stem}/{sample.key}" if again else sample.key)
    if sample.image is None:
        report.add(Problem("missing image", str(file), place, name))
        return None
    image = TarImage(file, *sample.image)
    if not captioned:
        return Example.unlabelled(name, image)
    field = next((about[each] for each in CAPTION_COLUMNS if each in about), None)
    lines = [line for line in sample.lines or () if line.strip()]
    texts = lines if field is None else caption_texts(field)
    usable = usable_captions(texts, report, str(file), place, name)
    if usable:
        options = {key: about[key] for key in ("references", "weights") if key in about}
        try:
            return Example(name, image, usable, **options)
        except ValueError as error:
            report.add(Problem("malformed row", str(file), place, str(error)))
            return None
    if field == []:  # written without captions
        return Example.unlabelled(name, image)
    reason = f"{name}: its .json is not JSON" if "json" in sample.kinds and not about else name
    report.add(Problem("image without caption", str(file), place, reason))
    return None
