"""The directory of an exported captioner: its files, and the manifest that describes them.

Nothing here loads torch or ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from capdistill.errors import CheckpointError, ConfigError, as_float, is_count, shortened
from capdistill.files import (
    from_json,
    remove_abandoned,
    system_error,
    temporary_name,
    user_path,
    write_text,
)

MANIFEST = "manifest.json"
ENCODER, STEP, GREEDY = "encoder.onnx", "step.onnx", "greedy.onnx"
ENCODER_PROGRAM, STEP_PROGRAM = "encoder.pte", "step.pte"
TOKENIZER, GENERATION = "tokenizer.json", "generation.json"
REQUIRED = (ENCODER, STEP, TOKENIZER, GENERATION)
FORMAT = 1
PRECISIONS = ("float32", "int8")
_MAX_BYTES = 2**24  # of a manifest; they take a few kilobytes
_BLOCK = 2**20  # bytes hashed at once
_SEEN = 100  # entries of a directory that are looked at for a hint


@dataclass(frozen=True)
class Manifest:
    """What the files of an exported captioner are, and how they fit together.

    The inputs of the step graph are `tokens`, `position` and the tensors in `image_inputs` and
    `state`. The encoder graph returns the first value of each; the step graph returns `logits` and,
    as `next_<name>`, the next value of those that change.

    Example:
        >>> manifest = Manifest(
        ...     name="student", precision="float32", image_size=224, mean=(0.5,) * 3,
        ...     std=(0.5,) * 3, image_inputs=("image_keys",), state=("state_h",), vocabulary=9,
        ...     max_length=41, files={}, versions={},
        ... )
        >>> manifest.step_inputs
        ('tokens', 'position', 'image_keys', 'state_h')

    Args:
        name: Name of the captioner.
        precision: "float32" or "int8".
        image_size: S, side in pixels of the uint8 RGB squares that the encoder graph reads.
        mean, std: Normalisation of pixels in [0, 1]. The encoder graph applies it.
        image_inputs: Tensors with one row per image, (I, ...), all beams of which share them.
        state: Tensors with one row per hypothesis, (I, beams, ...).
        vocabulary: V, width of the logits.
        max_length: Maximum number of tokens, including the end token, unless an option says less.
        files: Name -> checksum and size of every other file.
        versions: Of the libraries that wrote it, and of the operators ("opset").
    """

    name: str
    precision: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_inputs: tuple[str, ...]
    state: tuple[str, ...]
    vocabulary: int
    max_length: int
    files: Mapping[str, FileEntry]
    versions: Mapping[str, Any]

    @property
    def step_inputs(self) -> tuple[str, ...]:
        """Names of all inputs of the step graph, in its order."""
        return ("tokens", "position", *self.image_inputs, *self.state)

    @property
    def size(self) -> int:
        """Bytes of all files that it lists."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, with a checksum of itself."""
        content = {
            "format": FORMAT,
            "capdistill": self.versions.get("capdistill", ""),
            "versions": dict(self.versions),
            "name": self.name,
            "precision": self.precision,
            "image": {"size": self.image_size, "mean": list(self.mean), "std": list(self.std)},
            "image_inputs": list(self.image_inputs),
            "state": list(self.state),
            "vocabulary": self.vocabulary,
            "max_length": self.max_length,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        return {**content, "checksum": _checksum(content)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Manifest:
        """The manifest in the content of a file.

        Raises:
            ValueError, LookupError, TypeError: something is missing or of another kind.
        """
        image, named = content["image"], (*content["image_inputs"], *content["state"])
        counts = image["size"], content["vocabulary"], content["max_length"]
        texts = (content["name"], *named)
        if not all(map(is_count, counts)) or not all(isinstance(each, str) for each in texts):
            raise ValueError("names must be strings, sizes positive whole numbers")
        if len({*named}) < len(named):
            raise ValueError("an input of the step graph is listed twice")
        if content["precision"] not in PRECISIONS:
            raise ValueError(f"its precision is {shortened(content['precision'])}")
        mean, std = (tuple(map(as_float, image[name])) for name in ("mean", "std"))
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, (*mean, *std))):
            raise ValueError("mean and std must be three finite numbers each")
        return cls(
            name=content["name"],
            precision=content["precision"],
            image_size=image["size"],
            mean=mean,
            std=std,
            image_inputs=tuple(content["image_inputs"]),
            state=tuple(content["state"]),
            vocabulary=content["vocabulary"],
            max_length=content["max_length"],
            files={name: FileEntry.of(name, each) for name, each in content["files"].items()},
            versions=dict(content["versions"]),
        )


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 and size of a file.

    Example:
        >>> FileEntry.of("a.onnx", {"sha256": "0" * 64, "bytes": 12}).bytes
        12
    """

    sha256: str
    bytes: int

    @classmethod
    def of(cls, name: str, content: Mapping[str, Any]) -> FileEntry:
        """An entry of a manifest; the name must be one of a file beside it."""
        sha256, size = content["sha256"], content["bytes"]
        if name in ("", ".", "..", MANIFEST) or not name.isprintable() or {*"/\\:"} & {*name}:
            raise ValueError(f"{name!r} is not the name of a file beside it")
        if not isinstance(sha256, str) or not is_count(size, 0):
            raise ValueError(f"the checksum or the size of {name} is invalid")
        return cls(sha256, size)

    @classmethod
    def measured(cls, path: Path) -> FileEntry:
        """Of a file on the disk."""
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return cls(digest.hexdigest(), size)


def is_exported(directory: Path) -> bool:
    """Whether a directory is one that `export` wrote, or part of its copy."""
    return sum((directory / name).is_file() for name in (MANIFEST, ENCODER, STEP)) > 1


def read_manifest(directory: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
    """The manifest of an exported captioner, whose files are those that were written.

    Example:
        >>> read_manifest("nowhere")
        Traceback (most recent call last):
        ...
        capdistill.errors.CheckpointError: nowhere holds no exported captioner: there is no \
manifest.json. Write one with capdistill.deploy.export(captioner, directory).

    Args:
        directory: As given to `capdistill.deploy.export`.
        verify: Compare the files with their checksums (about 20 milliseconds for 30 MB).

    Raises:
        CheckpointError: it is no exported captioner, or one of a newer format, or a file is
            missing, truncated or changed; the message names it.
    """
    directory = user_path(directory, CheckpointError)
    path = directory / MANIFEST
    content = _read_content(path)
    try:
        manifest = Manifest.of(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not describe an exported captioner ({type(error).__name__}: {error}). "
            "Export it again."
        ) from error
    for name in REQUIRED:
        if name not in manifest.files:
            raise CheckpointError(f"{path} does not list {name}. Export the captioner again.")
    for name, entry in manifest.files.items():
        _require_file(directory / name, entry, verify)
    return manifest


def _read_content(path: Path) -> dict[str, Any]:
    try:
        if (size := _size(path)) > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        content = from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path.parent} holds no exported captioner: there is no {MANIFEST}. "
            f"{_instead_of(path.parent)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Copy the directory again, "
            "or export the captioner again."
        ) from error
    if not isinstance(content, dict) or "capdistill" not in content or "format" not in content:
        raise CheckpointError(
            f"{path} was not written by capdistill.deploy.export. Give the directory of an "
            "exported captioner."
        )
    form = content["format"]
    if is_count(form) and form > FORMAT:
        raise CheckpointError(
            f"{path} has format {form}, written by capdistill {content['capdistill']}; this "
            f"version reads formats up to {FORMAT}. Upgrade capdistill, or export with this one."
        )
    if form != FORMAT or isinstance(form, bool):
        raise CheckpointError(
            f"{path} has format {shortened(form)}; expected {FORMAT}. Export the captioner again."
        )
    given = content.pop("checksum", None)
    if given != _checksum(content):
        raise CheckpointError(
            f"{path} has changed since it was written: its checksum is wrong. Copy it again, or "
            "export the captioner again."
        )
    return content


def _instead_of(directory: Path) -> str:
    """What to give in place of a path that holds no exported captioner."""
    folder = directory.parent if directory.is_file() else directory
    inside = sorted(islice(folder.iterdir(), _SEEN)) if os.access(folder, os.R_OK) else ()
    found = next((each for each in (folder, *inside) if is_exported(each)), None)
    if found is not None and found != directory:
        return f"Give {found}, which holds one."
    if found is None and (folder / "captioner.json").is_file():
        return (
            f"{folder} is a saved captioner: export it (capdistill export {folder} --out DIR), or "
            "read it with capdistill.Captioner.load."
        )
    return "Write one with capdistill.deploy.export(captioner, directory)."


def _require_file(path: Path, entry: FileEntry, verify: bool) -> None:
    try:
        size = _size(path)
        if size == entry.bytes and (not verify or FileEntry.measured(path) == entry):
            return
    except OSError as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise CheckpointError(
            f"{path} {reason}. Copy all files of the exported captioner."
        ) from error
    kind = "has changed since it was exported (its checksum is wrong)"
    if size != entry.bytes:
        kind = f"has {size:,} bytes, but {entry.bytes:,} were exported"
    raise CheckpointError(f"{path} {kind}. Copy it again, or export the captioner again.")


def _size(path: Path) -> int:
    """Bytes of a file; reading a pipe would wait for its other end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a file")
    return status.st_size


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_directory(directory: Path, fill: Callable[[Path], Manifest]) -> Manifest:
    """Let `fill` write all files to a temporary directory, then put them in place.

    Until `fill` has returned, an earlier export stays as it is. Its manifest is removed first, and
    the new one comes last: a directory that a killed process leaves has no manifest, or all the
    files that it lists. Other files in the directory are left alone.

    Args:
        directory: Where the files go.
        fill: Is given the temporary directory; returns the manifest of the files in it.

    Raises:
        ConfigError: the directory cannot be written, or holds the manifest of something else.
    """
    _require_free(directory)
    staged = directory / temporary_name("export")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        staged.mkdir()
        try:
            manifest = fill(staged)
            write_text(staged / MANIFEST, json.dumps(manifest.to_json(), indent=2) + "\n")
            _sync(*staged.iterdir(), staged)
            _put_in_place(staged, directory, manifest)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except (OSError, ConfigError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ConfigError(
            f"Cannot write {directory}: {cause.strerror or cause}. Give a directory that exists or "
            "can be created, is writable and has space."
        ) from cause
    return manifest


def _put_in_place(staged: Path, directory: Path, manifest: Manifest) -> None:
    earlier = _listed(directory)
    (directory / MANIFEST).unlink(missing_ok=True)
    _sync(directory)
    for name in manifest.files:
        (staged / name).replace(directory / name)
    for name in earlier - set(manifest.files):
        (directory / name).unlink(missing_ok=True)
    _sync(directory)
    (staged / MANIFEST).replace(directory / MANIFEST)
    _sync(directory)


def _listed(directory: Path) -> set[str]:
    """The files of an earlier export."""
    try:
        return set(read_manifest(directory, verify=False).files)
    except CheckpointError:
        return set()


def _require_free(directory: Path) -> None:
    """Refuse a directory whose manifest.json is of something else, such as a web page."""
    path = directory / MANIFEST
    if not path.exists():
        return
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {"capdistill", "format"} <= content.keys():
        raise ConfigError(
            f"{path} was not written by capdistill.deploy.export. Give another directory."
        )


def _sync(*paths: Path) -> None:
    if os.name != "posix":
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
