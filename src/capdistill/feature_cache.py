"""Outputs of frozen trunks: every image is encoded once and kept in a memory map on disk."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capdistill.data.collate import STORED_AS, BatchIndex, FeatureCache
from capdistill.data.image_keys import images_key
from capdistill.data.loader import Loader
from capdistill.data.source import Source
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError, is_count
from capdistill.feature_files import (
    DONE,
    FORMAT,
    UNREADABLE,
    CacheFiles,
    CacheType,
    kind_of,
    marks_file,
    read_index,
)
from capdistill.files import system_error, write_text
from capdistill.progress import progress as report_progress
from capdistill.ranks import Ranks
from capdistill.runtime import autocast, evaluating

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_EXPONENT = {"fp16": 0x7C00, "bf16": 0x7F80}


def keeps_frozen_stages(encoder: Encoder, changed: bool = False) -> bool:
    """What is cached of an encoder: True for the output of its last frozen stage, else its trunk's.

    A run that trains the last stages caches the former. Where the model is a teacher later, the
    same is cached: it is smaller as a rule, the cache of that run is used, and models with one
    pretrained encoder share it.

    Args:
        encoder: Frozen or trained in parts.
        changed: Whether steps of this run change it.
    """
    return changed or (not encoder.trunk_frozen and encoder.cache_key() is not None)


def data_key(
    data: Any, source: Source, image_size: int, directory: Path, progress: bool = False
) -> str:
    """A key for the images of a data set, at a size in pixels.

    Args:
        data: Images in files are known by their bytes, wherever they lie and whenever they were
            written. Those of any other data set are read and their pixels hashed.
        source: Gives those pixels.
        image_size: Side in pixels.
        directory: Where the hashes of files are remembered.
        progress: Show progress.
    """
    examples = getattr(data, "examples", None)
    if examples is not None:
        return f"{image_size} {images_key(examples, directory, progress)}"
    digest = hashlib.sha256(str(image_size).encode())
    for batch in source.epoch(0):
        digest.update(f"{batch.image_ids}".encode())
        digest.update(batch.images.contiguous().numpy().data)
    return digest.hexdigest()


class Wanted(NamedTuple):
    """What is cached of the images: an encoder's values of one view.

    Args:
        encoder: Has frozen stages.
        data_key: Identifies the images, their size and the view; with the encoder's `cache_key` it
            is the key.
        view: Number of the view, for `Loader`.
        trained: Whether the encoder's other stages run at every step; otherwise its whole trunk is
            cached.
    """

    encoder: Encoder
    data_key: str
    view: int = 0
    trained: bool = True


def cache_trunks(
    wanted: Sequence[Wanted],
    source: Loader,
    directory: Path,
    precision: str,
    progress: bool = False,
    dtype: CacheType = "fp16",
    ranks: Ranks | None = None,
) -> list[FeatureCache]:
    """Encode every image of a loader once, or open what an earlier run wrote.

    An image is decoded once for all that is wanted. What a process that was killed has encoded is
    kept.

    Args:
        wanted: One entry for each cache.
        source: Loads the images in order, without augmentation.
        directory: Directory of the memory maps.
        precision: Precision of the forward passes.
        progress: Show progress: a bar on a terminal, occasional lines elsewhere.
        dtype: Type of the cached values: "fp16", or "bf16" for values beyond 65504.
        ranks: The processes that share the images; all of them call this function.

    Raises:
        ConfigError: the directory cannot be written, or values are not finite in that type.
        DataError: no image can be read.
    """
    abouts = [f"{w.encoder.cache_key(w.trained)} {w.data_key} {precision} {dtype}" for w in wanted]
    names = [hashlib.sha256(about.encode()).hexdigest()[:32] for about in abouts]
    paths = [directory / f"{name}.{dtype}" for name in names]
    ranks = ranks or Ranks()
    ids = source.collator.image_ids
    opened = [_open_cache(path, ids) for path in paths]
    missing = [
        _Caching(each, source, path, precision)
        for each, path, cache in zip(wanted, paths, opened, strict=True)
        if cache is None
    ]
    elsewhere = ranks.any(bool(missing))  # a disk that not all processes see
    if not missing:
        for _ in range(2 if elsewhere else 0):
            ranks.wait()  # as those that write it do
    else:
        try:
            with evaluating(*{each.encoder: None for each in missing}), torch.no_grad():
                _write_all(missing, source, ranks, progress)
        except (OSError, ConfigError) as error:
            cause = system_error(error)
            if cause is None:
                raise
            raise ConfigError(
                f"Cannot write {missing[0].path}: {cause.strerror or cause}. cache_dir= sets where "
                "features are cached. What was written stays there, and the next run continues."
            ) from error
    for place, path in enumerate(paths):
        if opened[place] is None:
            opened[place] = _open_cache(path, ids)
    return [cache for cache in opened if cache is not None]


def _open_cache(path: Path, image_ids: Sequence[str]) -> FeatureCache | None:
    """The cache that an earlier run wrote, if it is complete."""
    index = read_index(path.with_suffix(".json"))
    try:
        ids, shape = index["image_ids"], (len(index["image_ids"]), *index["shape"])
        whole = index["complete"] and path.stat().st_size == 2 * int(np.prod(shape))
        if not whole or ids != [*image_ids]:
            return None
        for row in index["unreadable"]:
            ids[row] = None
        values = np.memmap(path, STORED_AS[kind_of(path)], "r", shape=shape)
        cache = FeatureCache(values, ids, _checksums_in(index, len(ids)))
    except (OSError, LookupError, TypeError, ValueError):  # damaged: it is written anew
        return None
    with suppress(OSError):  # such as a directory that may only be read
        marks_file(path).unlink(missing_ok=True)  # of a process killed at the last moment
    return cache


def _checksums_in(index: dict[str, Any], rows: int) -> list[int] | None:
    """The checksums of all rows; None in the index of an older version.

    Raises:
        ValueError: they are damaged.
    """
    checksums = index.get("checksums")
    if checksums is None:
        return None
    if len(checksums) != rows or not all(type(each) is int for each in checksums):
        raise ValueError("a checksum is no whole number")
    return list(checksums)


def _write_all(caches: Sequence[_Caching], source: Loader, ranks: Ranks, progress: bool) -> None:
    """Encode what is missing: first the part of this process, then what the others left."""
    size, images = source.batch_size, len(source.collator.image_ids)
    batches = [(0, tuple(range(i, min(i + size, images)))) for i in range(0, images, size)]
    first, last = (len(batches) * i // ranks.world_size for i in (ranks.rank, ranks.rank + 1))
    show = progress and ranks.rank == 0
    source = source.in_views(sorted({each.view for each in caches}))
    try:
        _encode_missing(caches, source, batches[first:last], show)
        for each in caches:
            each.flush()
        ranks.wait()
        _encode_missing(caches, source, batches, show)  # none is left where all see the same files
        marks = [each.finish(source) for each in caches]
        ranks.wait()
    finally:
        source.close()
        for each in caches:
            each.close()
    for each, mark in zip(caches, marks, strict=True):
        each.complete(mark)


def _encode_missing(
    caches: Sequence[_Caching], source: Loader, batches: Sequence[BatchIndex], show: bool
) -> None:
    marks = [each.begin() for each in caches]
    found = [
        (batch, [c for c, m in zip(caches, marks, strict=True) if not m[list(batch[1])].all()])
        for batch in batches
    ]
    missing = [(batch, lacking) for batch, lacking in found if lacking]
    for encoded in report_progress(
        _encoded(missing, source),
        sum(len(numbers) for (_, numbers), _ in missing),
        "Caching features",
        show=show,
        size=lambda each: len(each[0][1].numbers),
    ):
        for cache, values in encoded:
            cache.write(values)


def _encoded(
    missing: Sequence[tuple[BatchIndex, list[_Caching]]], source: Loader
) -> Iterator[list[tuple[_Caching, _Encoded]]]:
    """One batch behind: the device encodes the next while this one is copied and written."""
    views, last = source.collator.together, None
    results = source.read([index for index, _ in missing])
    for ((_, numbers), lacking), (batch, _, _) in zip(missing, results, strict=True):
        made = []
        for cache in lacking:
            encoded = _Encoded(numbers)
            if batch is not None:
                count = batch.num_images // len(views)
                begin = views.index(cache.view) * count
                pixels = batch.images[begin : begin + count]
                encoded = cache.encode(numbers, batch.image_ids[:count], pixels)
            made.append((cache, encoded))
        if last is not None:
            yield last
        last = made
    if last is not None:
        yield last


class _Caching:
    """Writes one cache, in this process and in the others of the run."""

    def __init__(self, wanted: Wanted, source: Loader, path: Path, precision: str) -> None:
        self.encoder, self.view, self.trained = wanted.encoder, wanted.view, wanted.trained
        self.path, self.precision = path, precision
        self.data_name = str(getattr(source.data, "name", type(source.data).__name__))
        self.device = next(self.encoder.parameters()).device
        self.image_ids = list(source.collator.image_ids)
        self.files: CacheFiles | None = None  # opened once the shape of the values is known

    def begin(self) -> np.ndarray[Any, Any]:
        """Open the files if their shape is known; the marks of the images."""
        shape = self._known_shape()
        if self.files is None and shape is not None:
            self.files = self._open(shape)
        return np.zeros(len(self.image_ids)) if self.files is None else self.files.marks()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self.files is not None:
            self.files.flush()

    def close(self) -> None:
        """Close the files."""
        if self.files is not None:
            self.files.close()

    def finish(self, source: Loader) -> np.ndarray[Any, Any]:
        """The marks, once all images are done.

        Raises:
            DataError: none can be used.
        """
        if self.files is None:
            none = f"None of the {len(self.image_ids)} images can be used."
            raise DataError(f"{none}\n{source.skipped}")
        self.files.flush()
        return self.files.marks()

    def complete(self, marks: np.ndarray[Any, Any]) -> None:
        """Say in the index that all is there."""
        assert self.files is not None
        shape = self.files.shape
        unreadable = np.flatnonzero(marks == UNREADABLE).tolist()
        rows = np.memmap(self.path, np.int16, "r", shape=(len(self.image_ids), *shape))
        checksums = [zlib.crc32(row.data) for row in rows]
        more = {"complete": True, "unreadable": unreadable, "checksums": checksums}
        self._write_index(shape, more)

    def encode(self, numbers: Sequence[int], ids: Sequence[str], images: Tensor) -> _Encoded:
        """The values of the images that could be read, on their way to this machine's memory."""
        with autocast(self.device, self.precision):
            values = self.encoder.to_cache(images.to(self.device), self.trained)
        host, ready = _to_host(values.to(_DTYPES[kind_of(self.path)]))
        return _Encoded(numbers, ids, host, ready)

    def write(self, encoded: _Encoded) -> None:
        """Write the values of a batch."""
        numbers, ids, values = encoded.numbers, encoded.image_ids, encoded.values
        if values is None:
            if self.files is not None:  # else it is read again when the shape is known
                self.files.write(numbers[0], None, np.full(len(numbers), UNREADABLE, np.uint8))
            return
        encoded.ready()
        block = bits = values.contiguous().view(torch.int16).numpy()  # (I, ...)
        self._require_finite(ids, bits)
        shape = tuple(bits.shape[1:])
        if self.files is not None and self.files.shape != shape:
            self.files.remove()  # its index is damaged
            self.files = None
        self.files = self.files or self._open(shape)
        given = set(ids)
        readable = np.array([self.image_ids[number] in given for number in numbers])
        if len(ids) < len(numbers):
            block = np.zeros((len(numbers), *bits.shape[1:]), np.int16)
            block[readable] = bits
        self.files.write(numbers[0], block, np.where(readable, DONE, UNREADABLE).astype(np.uint8))

    def _require_finite(self, ids: Sequence[str], bits: np.ndarray[Any, Any]) -> None:
        """Refuse infinity and NaN, whose exponent bits are all set."""
        kind = kind_of(self.path)
        exponent = np.int16(_EXPONENT[kind])
        bad = (bits & exponent) == exponent
        if not bad.any():
            return
        names = [name for name, each in zip(ids, bad, strict=True) if each.any()]
        if self.files is not None:
            self.files.remove()
            self.files = None
        limit, fix = " or larger than 65504", "Set cache_dtype='bf16', or, if they are NaN, "
        if kind == "bf16":
            limit, fix = "", "Set "
        raise ConfigError(
            f"cache_features=True keeps values as {kind}, but those of {', '.join(names[:5])} are "
            f"NaN{limit}. {fix}cache_features=False for this encoder."
        )

    def _known_shape(self) -> tuple[int, ...] | None:
        """The shape of a row, from the index; None without one, or if it is of other images."""
        index = read_index(self.path.with_suffix(".json"))
        shape = index.get("shape")
        if index.get("image_ids") != self.image_ids or not isinstance(shape, list):
            return None
        return tuple(shape) if shape and all(map(is_count, shape)) else None

    def _open(self, shape: tuple[int, ...]) -> CacheFiles:
        if self._known_shape() != shape:
            self._write_index(shape, {"complete": False})
        return CacheFiles(self.path, len(self.image_ids), shape)

    def _write_index(self, shape: tuple[int, ...], more: dict[str, Any]) -> None:
        index = {
            "format": FORMAT,
            "encoder": str(getattr(self.encoder, "name", type(self.encoder).__name__)),
            "data": self.data_name,
            "image_ids": self.image_ids,
            "shape": shape,
            **more,
        }
        write_text(self.path.with_suffix(".json"), json.dumps(index))


@dataclass(frozen=True)
class _Encoded:
    """Numbers of a batch's images, and the values (I, ...) of those that could be read."""

    numbers: Sequence[int]
    image_ids: Sequence[str] = ()
    values: Tensor | None = None
    ready: Callable[[], object] = bool  # wait until the values have arrived


def _to_host(values: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy in this machine's memory, and a function that waits for it."""
    if values.device.type != "cuda":
        return values.cpu(), bool
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived.synchronize
