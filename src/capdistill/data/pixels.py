"""Images in any form to RGB pixels, and the square that a model sees, as NumPy arrays.

Nothing here loads torch: captioners read images with it, with torch and without.
"""

from __future__ import annotations

import io
import math
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from capdistill.data.caption_files import Policy
from capdistill.data.image_names import StoredImage
from capdistill.errors import ConfigError, DataError, require_int, shortened
from capdistill.files import user_path

if TYPE_CHECKING:
    from torch import Tensor

Encoded: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
Decoded: TypeAlias = "Image.Image | npt.NDArray[Any] | Tensor"
ImageSource: TypeAlias = "Encoded | Decoded | StoredImage | Mapping[str, Any]"
OneImage: TypeAlias = "str | os.PathLike[str] | bytes"
SeveralImages: TypeAlias = "list[str] | list[Path] | list[bytes]"
Pixels: TypeAlias = npt.NDArray[np.uint8]

MAX_BYTES = 2**28  # bytes of an image file
MAX_PIXELS = 2**27  # pixels of a decoded image
_PROGRAMS = ("EPS", "WMF", "EMF")  # Pillow would hand them to another program
_ORIENTATION = 0x0112
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}


def read_pixels(source: ImageSource) -> Pixels:
    """Any image as uint8 RGB pixels (H, W, 3), upright; see `capdistill.data.read_image`.

    Example:
        >>> read_pixels(np.full((2, 4), 65535, np.uint16))[0, 0].tolist()
        [255, 255, 255]

    Args:
        source: What `read_image` takes.

    Raises:
        DataError: it is missing, not an image, truncated, too large, or its values have no clear
            meaning; the message names the file and the reason.
    """
    if isinstance(source, StoredImage):
        return _read_stored(source)
    if isinstance(source, Mapping):
        return read_pixels(held_image(source))
    if is_tensor(source):
        values = source.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
        return _from_array(values.numpy(), "tensor", channels_first=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array", channels_first=False)
    if isinstance(source, Image.Image):
        return _guarded(source, _name_of(source))
    name, data = image_bytes(cast("Encoded", source))
    if not data:
        raise DataError(f"{name}: the file is empty; expected an image.")
    return _decode(data, name)


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of torch, which is not loaded to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_array(values: npt.NDArray[Any], name: str, *, channels_first: bool) -> Pixels:
    from capdistill.data.depths import image_of

    name = f"{name} {tuple(values.shape)} {values.dtype}"
    return np.array(_to_rgb(image_of(values, name, channels_first=channels_first), name))


def _read_stored(source: StoredImage) -> Pixels:
    try:
        held = source.load()
    except Exception as error:  # a data set of any kind
        raise DataError(f"{source}: the image cannot be read ({error}).") from error
    if isinstance(held, bytes):
        return _decode(_bounded(held, str(source)), str(source))
    try:
        return read_pixels(held)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def held_image(row: Mapping[str, Any]) -> Any:
    """The image in a row of a Hugging Face data set, decoded or not."""
    found = next((row[key] for key in ("image", "bytes", "path") if row.get(key) is not None), None)
    if found is None:
        raise DataError(
            f"An image was given as an object with the keys {', '.join(map(str, row))}; expected "
            '{"image": ...}, or {"bytes": ..., "path": ...}.'
        )
    return found


def _decode(data: bytes, name: str) -> Pixels:
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise DataError(f"{name}: {_reason(error, data)}.") from error
    if image.format in _PROGRAMS:
        raise DataError(f"{name}: {image.format} is a drawing, not a photo; save it as PNG.")
    if image.format == "PNG":
        _check_sums(data, name)
    return _guarded(image, name)


def _check_sums(data: bytes, name: str) -> None:
    """Pillow silently decodes a PNG with a flipped bit unless asked to verify it."""
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception as error:
        raise DataError(f"{name}: corrupt PNG ({error}).") from error


def _guarded(image: Image.Image, name: str) -> Pixels:
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"at most {MAX_PIXELS:,} are read. Make it smaller."
        raise DataError(f"{name}: {width} x {height} pixels; {limit}")
    if not width * height:
        raise DataError(f"{name}: the image is {width} x {height} and has no pixels.")
    try:
        image.load()
        rgb = _to_rgb(image, name)
        turn = _UPRIGHT.get(_orientation(image))
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded ({error or type(error).__name__}).") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged tag block does not affect the pixels
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        from capdistill.data.depths import eight_bits

        pixels, clear = eight_bits(image, name), image.info.get("transparency")
        if isinstance(clear, int):  # a grey value that a PNG calls transparent
            pixels[np.asarray(image) == clear] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def image_bytes(source: Encoded) -> tuple[str, bytes]:
    """The name of an encoded image, for messages, and its bytes.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image bytes", _bounded(bytes(source), "image bytes")
    if isinstance(source, (str, os.PathLike)):
        path = user_path(source, DataError)
        try:
            with open(path, "rb") as file:  # buffered: a pipe gives its content in pieces
                status = os.fstat(file.fileno())  # reading allocates what it asks for
                size = status.st_size if stat.S_ISREG(status.st_mode) else MAX_BYTES
                return str(path), _bounded(file.read(min(size, MAX_BYTES) + 1), str(path))
        except OSError as error:
            reason = f"the image cannot be read ({error.strerror or error})"
            raise DataError(f"{path}: {reason}.{_hint(path)}") from error
    if not hasattr(source, "read"):
        raise DataError(
            f"An image was given as {type(source).__name__}; expected a path, bytes, a binary "
            "file, a Pillow image, an array or a tensor."
        )
    return _read_file(source)


def _hint(path: Path) -> str:
    """What to do about a path that is no file."""
    if path.is_dir():
        return " It is a folder: give the image files in it."
    if not path.exists() and not path.is_absolute():
        return f" Relative paths begin at {Path.cwd()}."
    return ""


def _read_file(file: IO[bytes]) -> tuple[str, bytes]:
    name = str(getattr(file, "name", "image file"))
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)  # as Pillow does: whoever wrote it has left it at its end
        data = file.read(MAX_BYTES + 1)
    except Exception as error:  # any object with `read`, such as an HTTP response or a zip entry
        raise DataError(f"{name}: the image cannot be read ({error}).") from error
    if not isinstance(data, bytes):
        raise DataError(f"{name}: the file is open as text; open it with mode 'rb'.")
    return name, _bounded(data, name)


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise DataError(f"{name}: more than {MAX_BYTES:,} bytes; an image file may have no more.")
    return data


def _name_of(image: Image.Image) -> str:
    return str(getattr(image, "filename", "") or f"{type(image).__name__} in memory")


_FOREIGN = {  # what files with the suffix of an image often are
    b"ftyphei": "HEIC: save it as JPEG, or call register_heif_opener() of pillow_heif",
    b"ftypmif": "HEIC: save it as JPEG, or call register_heif_opener() of pillow_heif",
    b"version https://": "a pointer of Git LFS: fetch the file with `git lfs pull`",
    b"<svg": "SVG, a drawing: save it as PNG",
    b"%PDF": "PDF, a document: save its pictures as PNG",
    b"<html": "a page of a web server: download the image again",
    b"<!DOCTYPE": "a page of a web server: download the image again",
    b"<!doctype": "a page of a web server: download the image again",
}


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        known = next((what for start, what in _FOREIGN.items() if start in data[:16]), None)
        found = f", but {known}" if known else ""
        return f"not an image format that Pillow knows (it begins with {data[:12]!r}){found}"
    return f"cannot be opened as an image ({error or type(error).__name__})"


def square_pixels(pixels: Pixels, size: int) -> Pixels:
    """The largest centred square at `size` pixels, antialiased. (H, W, 3) -> (3, size, size).

    The square is cut before it is resized: a very long image costs no more than others.

    Example:
        >>> square_pixels(np.zeros((40, 90, 3), np.uint8), 16).shape
        (3, 16, 16)
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side != size:
        turned = _resized(square.transpose(1, 0, 2).reshape(side, -1), size)  # (size, side * 3)
        columns = turned.reshape(size, side, 3).transpose(1, 0, 2)
        square = _resized(columns.reshape(side, -1), size).reshape(size, size, 3)
    return np.ascontiguousarray(square.transpose(2, 0, 1))


_BLOCK, _WINDOW = 16, 2**20  # rows that are made at once; numbers that are read for them


def _resized(values: Pixels, size: int) -> Pixels:
    """(n, m) to (size, m): each row is a mean of its neighbours, rounded as torch rounds it.

    Sums of products of whole numbers are exact in floating point, in any order, as long as they
    stay below 2 ** 24 in float32 or 2 ** 53 in float64.

    Source:
        `interpolate(..., mode="bilinear", antialias=True)` of torch on uint8, after Pillow-SIMD:
        weights of a triangle as whole numbers of 16 bits, a rounded pass per axis.
    """
    start, weights, bits = _triangles(len(values), size)
    half = 1 << bits >> 1
    exact = np.float32 if 255 * int(weights.sum(1).max()) + half < 2**24 else np.float64
    made = np.empty((size, values.shape[1]), np.uint8)
    for first in range(0, size, _BLOCK):
        block = slice(first, first + _BLOCK)
        low, high = int(start[first]), min(len(values), int(start[block][-1]) + weights.shape[1])
        banded = np.zeros((len(start[block]), high - low + weights.shape[1]), exact)
        for row, (begin, each) in enumerate(zip(start[block] - low, weights[block], strict=True)):
            banded[row, begin : begin + len(each)] = each  # beyond the last row they are zero
        step = max(1, _WINDOW // (high - low))
        for left in range(0, values.shape[1], step):
            window = values[low:high, left : left + step].astype(exact)
            sums = banded[:, : high - low] @ window
            rounded = np.floor((sums + exact(half)) * exact(0.5**bits))
            made[block, left : left + step] = np.minimum(rounded, 255)
    return made


@lru_cache(maxsize=32)
def _triangles(given: int, wanted: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]:
    """For each of `wanted` rows its first neighbour and their weights, in units of 2 ** -bits."""
    scale = given / wanted
    support = max(scale, 1.0)
    centre = scale * (np.arange(wanted) + 0.5)
    start = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), given)
    place = np.arange(math.ceil(support) * 2 + 1)
    distance = np.abs((place + start[:, None] - centre[:, None] + 0.5) * (1 / support))
    inside = (distance < 1) & (place < (stop - start)[:, None])
    shares = np.where(inside, 1 - distance, 0.0)
    shares /= shares.cumsum(1)[:, -1:]  # added up in this order
    bits, largest = 0, float(shares.max())
    while bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return start, (shares * 2**bits + 0.5).astype(np.int32), bits


def read_batches(
    images: Iterable[Any], size: int, batch_size: int, errors: Policy
) -> Iterator[list[Pixels | None]]:
    """Read images in any form, a batch at a time, as (3, size, size) uint8 arrays.

    Args:
        images: Any number of images that `read_pixels` takes; read when they are needed.
        size: Side in pixels.
        batch_size: Images per batch.
        errors: "raise" stops at an image that cannot be read; "skip" warns and gives None for it.

    Raises:
        ConfigError: another value of `errors`, or `batch_size` < 1.
        DataError: one image was given; an image that cannot be read, by name, unless it is skipped.
    """
    if not is_many(images):
        raise DataError(
            f"caption_stream: {shortened(images)} was given; expected an iterable of images. Put "
            "one image into a list, or give it to `caption`."
        )
    require_int("caption: batch_size", batch_size, 1)
    if errors not in ("skip", "raise"):
        raise ConfigError(f"errors={errors!r} was given; use errors='skip' or 'raise'.")
    place = 0
    for chunk in chunks(images, batch_size):
        yield [_read(image, size, place + i, errors) for i, image in enumerate(chunk)]
        place += len(chunk)


def _read(image: Any, size: int, place: int, errors: Policy) -> Pixels | None:
    try:
        return square_pixels(read_pixels(image), size)
    except DataError as error:
        if errors == "raise":
            raise
        warnings.warn(f"caption: image {place} was left out: {error}", stacklevel=5)
        return None


def is_many(images: Any) -> bool:
    """Whether this is an iterable of images rather than one image.

    Example:
        >>> is_many("dog.jpg"), is_many(["dog.jpg"]), is_many(np.zeros((2, 3, 8, 8)))
        (False, True, True)
    """
    if is_tensor(images):
        return bool(images.ndim == 4)
    if hasattr(images, "__array__"):
        return getattr(images, "ndim", 3) == 4
    alone = (str, bytes, bytearray, memoryview, os.PathLike, StoredImage, Mapping)
    single = isinstance(images, alone) or hasattr(images, "read")
    return not single and isinstance(images, Iterable)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter, each read when it is needed.

    Example:
        >>> list(chunks("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
