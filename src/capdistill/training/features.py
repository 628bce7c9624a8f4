"""Trunk tokens of frozen encoders, computed once an image and kept as an fp16 memory map."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capdistill.captioner import evaluating
from capdistill.encoders.base import Encoder
from capdistill.files import write_text
from capdistill.training.runtime import autocast
from capdistill.training.source import Source


class TrunkStore:
    """Trunk tokens by image id.

    Args:
        tokens: (images, N, D0) float16.
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
    """
    key = hashlib.sha256(f"{encoder.fingerprint()} {data_key} {precision}".encode()).hexdigest()
    path = directory / f"{key[:32]}.npy"
    index = path.with_suffix(".json")
    if not (path.exists() and index.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(index, json.dumps(_encode_all(encoder, source, path, precision)))
    ids = json.loads(index.read_text(encoding="utf-8"))
    return TrunkStore(np.load(path, mmap_mode="r")[: len(ids)], ids)


def _encode_all(encoder: Encoder, source: Source, path: Path, precision: str) -> list[str]:
    """Write the tokens of all readable images to `path`; their ids in order."""
    ids: list[str] = []
    rows: np.ndarray[Any, Any] | None = None
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    device = next(encoder.parameters()).device
    try:
        with evaluating(encoder), torch.no_grad():
            for batch in source.epoch(0):
                with autocast(device, precision):
                    tokens = encoder.trunk(batch.images.to(device))  # (I, N, D0)
                if rows is None:
                    shape = (len(source) * len(tokens), *tokens.shape[1:])
                    rows = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                rows[len(ids) : len(ids) + len(tokens)] = tokens.half().cpu().numpy()
                ids += batch.image_ids
        if rows is not None:
            rows.flush()  # type: ignore[attr-defined]
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return ids


def data_key(data: Any, image_size: int) -> str:
    """What stands for the images of a data set: ids, files with size and time, pixel size."""
    digest = hashlib.sha256(str(image_size).encode())
    for example in getattr(data, "examples", ()):
        status = Path(example.path).stat() if Path(example.path).exists() else None
        stamp = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(f"{example.image_id} {example.path} {stamp}\n".encode())
    return digest.hexdigest()
