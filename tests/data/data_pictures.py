"""Pictures that tests of the data package share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def broken_files(folder: Path) -> list[Path]:
    """Half a JPEG, an empty file, a web page, a PNG's first bytes, a PNG with one bit turned."""
    jpeg, png = _encoded("JPEG", quality=90), bytearray(_encoded("PNG"))
    png[len(png) // 2] ^= 255
    content = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "stub.png": b"\x89PNG\r\n\x1a\n",
        "flip.png": bytes(png),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content]


def _encoded(kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    noise().save(file, kind, **options)
    return file.getvalue()
