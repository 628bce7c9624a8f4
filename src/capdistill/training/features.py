"""Trunk tokens of frozen encoders, computed once an image and kept as an fp16 memory map."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capdistill.data.loader import Source
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError
from capdistill.files import write_atomically, write_text
from capdistill.runtime import autocast, evaluating

_FORMAT = "capdistill.features/1"


class TrunkStore:
    """Trunk tokens by image id.

    Args:
        tokens: (images, N, D0) float16; a memory map is opened anew in every worker.
        image_ids: In the order of the rows.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], image_ids: Iterable[str]) -> None:
        self.tokens = tokens
        self.rows = {image_id: row for row, image_id in enumerate(image_ids)}

    def __getitem__(self, image_id: str) -> Tensor:
        return torch.from_numpy(np.array(self.tokens[self.rows[image_id]]))  # (N, D0)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to another process as its file's name, not as its content."""
        if not isinstance(self.tokens, np.memmap):
            return vars(self)
        return {"rows": self.rows, "file": self.tokens.filename, "shape": self.tokens.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "file" in state:
            state["tokens"] = _open(state.pop("file"), state.pop("shape"))
        vars(self).update(state)


def default_cache_dir() -> Path:
    """Where features lie unless the user says: capdistill's part of the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "capdistill" / "features"


def cache_trunk(
    encoder: Encoder, source: Source, data_key: str, directory: Path, precision: str
) -> TrunkStore:
    """Encode every image of a source once, or open what an earlier run wrote.

    Args:
        encoder: Its trunk must be frozen.
        source: Batches of images without augmentation.
        data_key: Stands for the images and their size; with the trunk's fingerprint it is the key.
        directory: Where the memory maps lie.
        precision: Of the forward passes.

    Raises:
        ConfigError: the directory can not be written, or tokens do not fit in float16.
    """
    key = hashlib.sha256(f"{encoder.fingerprint()} {data_key} {precision}".encode()).hexdigest()
    path = directory / f"{key[:32]}.f16"
    return _stored(path) or _store(encoder, source, path, precision)


def _stored(path: Path) -> TrunkStore | None:
    """What an earlier run wrote, if it is all there."""
    try:
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        ids, shape = index["image_ids"], (len(index["image_ids"]), *index["shape"])
        whole = index["format"] == _FORMAT and path.stat().st_size == 2 * int(np.prod(shape))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return TrunkStore(_open(path, shape), ids) if whole else None


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.memmap(path, np.float16, "r", shape=shape)


def _store(encoder: Encoder, source: Source, path: Path, precision: str) -> TrunkStore:
    """Write the tokens, then the index: without it they count for nothing."""
    index: dict[str, Any] = {"format": _FORMAT, "image_ids": [], "shape": []}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for ids, tokens in _encoded(encoder, source, precision):
                index["image_ids"] += ids
                index["shape"] = tokens.shape[1:]
                file.write(tokens.tobytes())

    write_atomically(path, write)
    write_text(path.with_suffix(".json"), json.dumps(index))
    return TrunkStore(_open(path, (len(index["image_ids"]), *index["shape"])), index["image_ids"])


def _encoded(
    encoder: Encoder, source: Source, precision: str
) -> Iterator[tuple[tuple[str, ...], np.ndarray[Any, Any]]]:
    """Ids and (I, N, D0) float16 tokens of every readable image."""
    device = next(encoder.parameters()).device
    for batch in source.epoch(0):
        with evaluating(encoder), torch.no_grad(), autocast(device, precision):
            tokens = encoder.trunk(batch.images.to(device)).half()
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
    """What stands for the images of a data set, at a size in pixels.

    Files are known by name, size and time; images of any other data set are read and hashed.
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
