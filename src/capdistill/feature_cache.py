"""Features of a frozen trunk on disk: one memory map for each encoder and set of images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capdistill.data.collate import FeatureCache, open_features
from capdistill.data.source import Source
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError
from capdistill.files import write_atomically, write_text
from capdistill.runtime import autocast, evaluating
from capdistill.runtime import progress as report_progress

_FORMAT = "capdistill.features/1"


def default_cache_dir() -> Path:
    """The default directory of cached features, in the user's cache directory.

    Raises:
        ConfigError: there is no home directory.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:  # HOME is not set and the user has no entry
        raise ConfigError(
            "Cached features need a directory, but this user has no home directory. Give "
            "cache_dir=, or set cache_features=False."
        ) from error
    return home / "capdistill" / "features"


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


def cache_trunk(
    encoder: Encoder,
    source: Source,
    data_key: str,
    directory: Path,
    precision: str,
    progress: bool = False,
    trained: bool = True,
) -> FeatureCache:
    """Encode every image of a source once, or open what an earlier run wrote.

    Args:
        encoder: Has frozen stages.
        source: Batches of images without augmentation.
        data_key: Identifies the images and their size; with the encoder's `cache_key` it is the
            key.
        directory: Directory of the memory maps.
        precision: Precision of the forward passes.
        progress: Show progress: a bar on a terminal, occasional lines elsewhere.
        trained: Whether the encoder's other stages run at every step; otherwise its whole trunk is
            cached.

    Raises:
        ConfigError: the directory cannot be written, or tokens do not fit in float16.
    """
    about = f"{encoder.cache_key(trained)} {data_key} {precision}"
    path = directory / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.f16"
    return _open_cache(path) or _write_cache(encoder, source, path, precision, progress, trained)


def _open_cache(path: Path) -> FeatureCache | None:
    """The cache that an earlier run wrote, if it is complete."""
    try:
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        ids, shape = index["image_ids"], (len(index["image_ids"]), *index["shape"])
        whole = index["format"] == _FORMAT and path.stat().st_size == 2 * int(np.prod(shape))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return FeatureCache(open_features(path, shape), ids) if whole else None


def _write_cache(
    encoder: Encoder, source: Source, path: Path, precision: str, progress: bool, trained: bool
) -> FeatureCache:
    """Write the tokens, then the index, which makes them valid."""
    index: dict[str, Any] = {"format": _FORMAT, "image_ids": [], "shape": []}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            values = _encoded(encoder, source, precision, trained)
            for ids, tokens in report_progress(
                values, len(source), "Caching features", unit="batch", show=progress
            ):
                index["image_ids"] += ids
                index["shape"] = tokens.shape[1:]
                file.write(tokens.tobytes())

    try:
        write_atomically(path, write)
        write_text(path.with_suffix(".json"), json.dumps(index))
    except ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ConfigError(f"{error} cache_dir= sets where features are cached.") from error
    return FeatureCache(
        open_features(path, (len(index["image_ids"]), *index["shape"])), index["image_ids"]
    )


def _encoded(
    encoder: Encoder, source: Source, precision: str, trained: bool
) -> Iterator[tuple[tuple[str, ...], np.ndarray[Any, Any]]]:
    """Ids and float16 values (I, ...) of every readable image."""
    device = next(encoder.parameters()).device
    for batch in source.epoch(0):
        with evaluating(encoder), torch.no_grad(), autocast(device, precision):
            tokens = encoder.to_cache(batch.images.to(device), trained).half()
        finite = tokens.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            names = [batch.image_ids[i] for i in bad]
            raise ConfigError(
                f"cache_features=True keeps tokens as float16, but those of {', '.join(names[:5])} "
                "are NaN or larger than 65504. Set cache_features=False for this encoder."
            )
        yield batch.image_ids, tokens.cpu().numpy()


def data_key(data: Any, source: Source, image_size: int) -> str:
    """A key for the images of a data set, at a size in pixels.

    Files are known by name, size and modification time. Images of any other data set are read and
    hashed.
    """
    digest = hashlib.sha256(str(image_size).encode())
    examples = getattr(data, "examples", None)
    if examples is None:
        for batch in source.epoch(0):
            digest.update(f"{batch.image_ids}".encode())
            digest.update(batch.images.contiguous().numpy().data)
        return digest.hexdigest()
    for example in examples:
        path = Path(example.path)
        status = path.stat() if path.exists() else None
        stamp = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(f"{example.image_id} {path.absolute()} {stamp}\n".encode())
    return digest.hexdigest()
