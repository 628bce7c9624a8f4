"""Which images a data set holds: hashes of their content that are cheap to compute again.

Every file is hashed once. Its hash is remembered beside its size and times: files that were not
touched are not read again, and files that were only copied, moved or touched keep their key.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from capdistill.data.dataset import Example
from capdistill.data.image_names import StoredImage
from capdistill.errors import CapdistillError
from capdistill.feature_files import HASHES
from capdistill.files import from_json, write_text
from capdistill.progress import progress as report_progress

_MAX_BYTES = 2**28  # as for images that are read
_THREADS, _AT_ONCE = 8, 32  # reading waits for the disk or network
_UNREADABLE = "unreadable"
_WORTH_KEEPING = 1.0  # seconds that hashing took


def images_key(examples: Sequence[Example], directory: Path, progress: bool = False) -> str:
    """A key of the images of a data set, in their order: their ids and the bytes of their files.

    Example:
        >>> import capdistill as cd, tempfile
        >>> examples = cd.data.sample().val.examples
        >>> first, again = (images_key(examples, Path(tempfile.mkdtemp())) for _ in range(2))
        >>> first == again != images_key(examples[1:], Path(tempfile.mkdtemp()))
        True

    Args:
        examples: The images. A file that cannot be read has a key, too.
        directory: Where hashes are remembered.
        progress: Show progress.
    """
    digest = hashlib.sha256()
    for example, value in zip(examples, _hashes(examples, directory, progress), strict=True):
        digest.update(f"{example.image_id!r} {value}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def image_contents(
    examples: Sequence[Example], directory: Path, progress: bool = False
) -> dict[str, str]:
    """Image id -> the hash of the bytes of its file, of all images that have one.

    Example:
        >>> import capdistill as cd, tempfile
        >>> examples = [*cd.data.sample().val.examples, Example("a", "lost.jpg", ["a dog"])]
        >>> len(examples), len(image_contents(examples, Path(tempfile.mkdtemp())))
        (9, 8)

    The arguments are those of `images_key`. A file that cannot be read is left out, and so is a row
    of another data set, whose hash tells where it is.
    """
    own = [example for example in examples if _stamp(example.path) is not None]
    values = zip(own, _hashes(own, directory, progress), strict=True)
    return {example.image_id: value for example, value in values if value != _UNREADABLE}


def _hashes(examples: Sequence[Example], directory: Path, progress: bool) -> list[str]:
    """The hash of each image; those whose stamp is as before are not read."""
    memory = _read(directory / HASHES)
    places = [_place(example.path) for example in examples]
    stamps = [_stamp(example.path) for example in examples]
    found = [_known(memory.get(place), stamp) for place, stamp in zip(places, stamps, strict=True)]
    new = [i for i, value in enumerate(found) if value is None]
    began = time.monotonic()
    values = _hash_all([examples[i].path for i in new])
    values = report_progress(values, len(new), "Hashing images", show=progress)
    for i, value in zip(new, values, strict=True):
        found[i] = value
    if time.monotonic() - began > _WORTH_KEEPING:
        kept = {places[i]: [found[i], stamp] for i in new if (stamp := stamps[i]) is not None}
        with suppress(CapdistillError):  # it saves time and nothing else
            write_text(directory / HASHES, json.dumps({**memory, **kept}))
    return [value or "" for value in found]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _known(entry: Any, stamp: Sequence[int] | None) -> str | None:
    """The remembered hash of an image whose stamp is that of now."""
    if stamp is None or not isinstance(entry, list) or len(entry) != 2:
        return None
    return str(entry[0]) if entry[1] == list(stamp) else None


def _place(path: Path | StoredImage) -> str:
    return str(path) if isinstance(path, StoredImage) else str(path.absolute())


def _stamp(path: Path | StoredImage) -> Sequence[int] | None:
    return path.stamp() if isinstance(path, StoredImage) else file_stamp(path)


def file_stamp(path: Path) -> list[int] | None:
    """Size and times of a file; None if there is none. No one can set the time of its last change.

    Example:
        >>> file_stamp(Path("no/such/file")) is None
        True
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash_all(paths: Sequence[Path | StoredImage]) -> Iterator[str]:
    groups = [paths[i : i + _AT_ONCE] for i in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for values in pool.map(_hash_some, groups):
            yield from values


def _hash_some(paths: Iterable[Path | StoredImage]) -> list[str]:
    return [_hash(path) for path in paths]


def _hash(path: Path | StoredImage) -> str:
    try:
        return path.digest() if isinstance(path, StoredImage) else _hash_file(path)
    except Exception:  # it is named when it is read for its pixels
        return _UNREADABLE


def _hash_file(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())  # reading allocates what it asks for
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise OSError(f"{path} is no image file.")
        return hash_bytes(file.read(status.st_size) or b"")


def hash_bytes(data: bytes) -> str:
    """The hash of an encoded image, wherever its bytes lie.

    Example:
        >>> len(hash_bytes(b"..."))
        32
    """
    return hashlib.sha256(data).hexdigest()[:32]
