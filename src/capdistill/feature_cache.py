"""Outputs of frozen trunks: every image is encoded once and kept in a memory map on disk."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def cache_trunk(
    encoder: Encoder,
    source: Loader,
    data_key: str,
    directory: Path,
    precision: str,
    progress: bool = False,
    trained: bool = True,
    dtype: CacheType = "fp16",
    ranks: Ranks | None = None,
) -> FeatureCache:
    """Encode every image of a loader once, or open what an earlier run wrote.

    What a process that was killed has encoded is kept.

    Args:
        encoder: Has frozen stages.
        source: Loads the images in order, without augmentation.
        data_key: Identifies the images and their size; with the encoder's `cache_key` it is the
            key.
        directory: Directory of the memory maps.
        precision: Precision of the forward passes.
        progress: Show progress: a bar on a terminal, occasional lines elsewhere.
        trained: Whether the encoder's other stages run at every step; otherwise its whole trunk is
            cached.
        dtype: Type of the cached values: "fp16", or "bf16" for values beyond 65504.
        ranks: The processes that share the images; all of them call this function.

    Raises:
        ConfigError: the directory cannot be written, or values are not finite in that type.
        DataError: no image can be read.
    """
    about = f"{encoder.cache_key(trained)} {data_key} {precision} {dtype}"
    name = hashlib.sha256(about.encode()).hexdigest()[:32]
    path = directory / f"{name}.{dtype}"
    ranks = ranks or Ranks()
    cache = _open_cache(path, source.collator.image_ids)
    elsewhere = ranks.any(cache is None)  # a disk that not all processes see
    if cache is not None:
        for _ in range(2 if elsewhere else 0):
            ranks.wait()  # as those that write it do
        return cache
    try:
        with evaluating(encoder), torch.no_grad():
            return _Caching(encoder, source, path, precision, trained, progress, ranks).run()
    except (OSError, ConfigError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ConfigError(
            f"Cannot write {path}: {cause.strerror or cause}. cache_dir= sets where features are "
            "cached. What was written stays there, and the next run continues."
        ) from error


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


class _Caching:
    """Writes one cache, in this process and in the others of the run."""

    def __init__(
        self,
        encoder: Encoder,
        source: Loader,
        path: Path,
        precision: str,
        trained: bool,
        progress: bool,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.encoder, self.source, self.path = encoder, source, path
        self.precision, self.trained, self.show = precision, trained, progress
        self.device = next(encoder.parameters()).device
        self.image_ids = list(source.collator.image_ids)
        self.files: CacheFiles | None = None  # opened once the shape of the values is known

    def run(self) -> FeatureCache:
        """Encode what is missing: first the part of this process, then what the others left."""
        size, images = self.source.batch_size, len(self.image_ids)
        batches = [(0, tuple(range(i, min(i + size, images)))) for i in range(0, images, size)]
        rank, ranks = self.ranks.rank, self.ranks.world_size
        first, last = (len(batches) * i // ranks for i in (rank, rank + 1))
        try:
            self._encode_missing(batches[first:last])
            if self.files is not None:
                self.files.flush()
            self.ranks.wait()
            self._encode_missing(batches)  # none is left where all see the same files
            if self.files is None:
                none = f"None of the {images} images can be used."
                raise DataError(f"{none}\n{self.source.skipped}")
            self.files.flush()
            marks, shape = self.files.marks(), self.files.shape
            self.ranks.wait()
        finally:
            if self.files is not None:
                self.files.close()
        unreadable = np.flatnonzero(marks == UNREADABLE).tolist()
        rows = np.memmap(self.path, np.int16, "r", shape=(len(self.image_ids), *shape))
        checksums = [zlib.crc32(row.data) for row in rows]
        more = {"complete": True, "unreadable": unreadable, "checksums": checksums}
        self._write_index(shape, more)
        cache = _open_cache(self.path, self.image_ids)
        assert cache is not None
        return cache

    def _encode_missing(self, batches: Sequence[BatchIndex]) -> None:
        shape = self._known_shape()
        if self.files is None and shape is not None:
            self.files = self._open(shape)
        marks = np.zeros(len(self.image_ids)) if self.files is None else self.files.marks()
        missing = [batch for batch in batches if not marks[list(batch[1])].all()]
        for encoded in report_progress(
            self._encoded(missing),
            sum(len(numbers) for _, numbers in missing),
            "Caching features",
            show=self.show and self.ranks.main,
            size=lambda each: len(each.numbers),
        ):
            self._write(encoded)

    def _encoded(self, batches: Sequence[BatchIndex]) -> Iterator[_Encoded]:
        """One batch behind: the device encodes the next while this one is copied and written."""
        last: _Encoded | None = None
        for (_, numbers), (batch, _, _) in zip(batches, self.source.read([*batches]), strict=True):
            encoded = _Encoded(numbers)
            if batch is not None:
                with autocast(self.device, self.precision):
                    values = self.encoder.to_cache(batch.images.to(self.device), self.trained)
                host, ready = _to_host(values.to(_DTYPES[kind_of(self.path)]))
                encoded = _Encoded(numbers, batch.image_ids, host, ready)
            if last is not None:
                yield last
            last = encoded
        if last is not None:
            yield last

    def _write(self, encoded: _Encoded) -> None:
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
            "data": str(getattr(self.source.data, "name", type(self.source.data).__name__)),
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
