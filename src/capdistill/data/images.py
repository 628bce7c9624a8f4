"""Images in any form to RGB pixels, and the squares that models see."""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from capdistill.data.caption_files import Policy
from capdistill.data.image_names import StoredImage
from capdistill.errors import ConfigError, DataError, require_int
from capdistill.files import user_path
from capdistill.runtime import generator, stable_hash

Encoded: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | IO[bytes]"
Decoded: TypeAlias = "Image.Image | npt.NDArray[Any] | Tensor"
ImageSource: TypeAlias = "Encoded | Decoded | StoredImage | Mapping[str, Any]"

MAX_BYTES = 2**28  # bytes of an image file
MAX_PIXELS = 2**27  # pixels of a decoded image
_PROGRAMS = ("EPS", "WMF", "EMF")  # Pillow would hand them to another program
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
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


def read_image(source: ImageSource) -> Tensor:
    """Any image as uint8 RGB pixels (3, H, W), upright.

    Orientation tags are applied, transparency is laid over white, 16-bit and float images are
    scaled by their depth and never stretched. The same image gives the same pixels from a path,
    bytes, an open file or an image opened with Pillow, and the argument is not changed. Threads may
    read at the same time.

    Example:
        >>> read_image(np.full((2, 4), 65535, np.uint16))[:, 0, 0].tolist()
        [255, 255, 255]

    Args:
        source: A path, encoded bytes, a binary file, a `PIL.Image.Image`, or an array or tensor
            (HW, HWC or CHW with 1, 3 or 4 channels; uint8, bool, uint16, or float in [0, 1]); or a
            row of a Hugging Face data set: {"image": ...}, or {"bytes": ..., "path": ...}.

    Raises:
        DataError: it is missing, not an image, truncated, too large, or its values have no clear
            meaning; the message names the file and the reason.
    """
    if isinstance(source, StoredImage):
        return _read_stored(source)
    if isinstance(source, Mapping):
        return read_image(held_image(source))
    if isinstance(source, Tensor):
        values = source.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
        return _from_array(values.numpy(), "tensor", channels_first=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array", channels_first=False)
    if isinstance(source, Image.Image):
        return _guarded(source, _name_of(source))
    name, data = image_bytes(source)
    if not data:
        raise DataError(f"{name}: the file is empty; expected an image.")
    return _decode(data, name)


def _read_stored(source: StoredImage) -> Tensor:
    try:
        held = source.load()
    except Exception as error:  # a data set of any kind
        raise DataError(f"{source}: the image cannot be read ({error}).") from error
    if isinstance(held, bytes):
        return _decode(_bounded(held, str(source)), str(source))
    try:
        return read_image(held)
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


def _decode(data: bytes, name: str) -> Tensor:
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


def _guarded(image: Image.Image, name: str) -> Tensor:
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
        return _planes(rgb if turn is None else rgb.transpose(turn))
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
        return Image.fromarray(_depth(image, name)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _depth(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    values = np.asarray(image)
    if values.dtype.kind == "f":
        return _from_unit(values, name)
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    top = 2 ** (bits if 8 < bits < 16 else 16) - 1
    if values.min() < 0 or values.max() > top:
        raise DataError(
            f"{name}: {image.mode} pixels from {values.min()} to {values.max()}; only depths up to "
            "16 bits are read. Save it with 8 or 16 bits."
        )
    return _from_depth(values, top)


def _from_depth(values: npt.NDArray[Any], top: int) -> npt.NDArray[np.uint8]:
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _from_unit(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    if not (values.min() >= 0 and values.max() <= 1):  # refuses NaN, too
        raise DataError(
            f"{name}: float pixels from {values.min():.4g} to {values.max():.4g}; expected [0, 1]. "
            "Undo any normalisation, or give uint8."
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def _from_array(values: npt.NDArray[Any], name: str, *, channels_first: bool) -> Tensor:
    name = f"{name} {tuple(values.shape)} {values.dtype}"
    values = _channels_last(values, name, channels_first)
    if values.size == 0:
        raise DataError(f"{name}: the image has no pixels.")
    if values.dtype == np.bool_:
        pixels = values.astype(np.uint8) * np.uint8(255)
    elif values.dtype == np.uint16:
        pixels = _from_depth(values, 65535)
    elif values.dtype.kind == "f":
        pixels = _from_unit(values, name)
    elif values.dtype == np.uint8:
        pixels = values
    else:
        raise DataError(f"{name}: expected uint8, uint16, bool, or float in [0, 1]; convert it.")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    flat = pixels[:, :, 0] if mode == "L" else pixels
    return _planes(_to_rgb(Image.fromarray(np.ascontiguousarray(flat)), name))


def _channels_last(values: npt.NDArray[Any], name: str, first: bool) -> npt.NDArray[Any]:
    if values.ndim == 2:
        return values[:, :, None]
    axes = (0, 2) if first else (2, 0)
    for axis in axes:
        if values.ndim == 3 and values.shape[axis] in (1, 3, 4):
            return np.moveaxis(values, axis, 2)
    raise DataError(f"{name}: expected (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4.")


def _planes(rgb: Image.Image) -> Tensor:
    """(3, H, W), but in memory as (H, W, 3): so it is resized twice as fast, to the same values."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def image_bytes(source: Encoded) -> tuple[str, bytes]:
    """The name of an encoded image, for messages, and its bytes.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    if isinstance(source, (bytes, bytearray)):
        return "image bytes", _bounded(bytes(source), "image bytes")
    if isinstance(source, (str, os.PathLike)):
        path = user_path(source, DataError)
        try:
            with open(path, "rb") as file:  # buffered: a pipe gives its content in pieces
                status = os.fstat(file.fileno())  # reading allocates what it asks for
                size = status.st_size if stat.S_ISREG(status.st_mode) else MAX_BYTES
                return str(path), _bounded(file.read(min(size, MAX_BYTES) + 1), str(path))
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{path}: the image cannot be read ({reason}).") from error
    if not hasattr(source, "read"):
        raise DataError(
            f"An image was given as {type(source).__name__}; expected a path, bytes, a binary "
            "file, a Pillow image, an array or a tensor."
        )
    return _read_file(source)


def _read_file(file: IO[bytes]) -> tuple[str, bytes]:
    name = str(getattr(file, "name", "image file"))
    try:
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


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image format that Pillow knows (it begins with {data[:12]!r})"
    return f"cannot be opened as an image ({error or type(error).__name__})"


MIN_AREA = 0.75  # of the largest square, in a training crop: captions describe the whole image
MAX_RATIO = 1.1


def centre_square(image: Tensor, size: int) -> Tensor:
    """The largest centred square at `size` pixels, antialiased. (3, H, W) -> (3, size, size).

    The square is cut before it is resized: a very long image costs no more than others.

    Example:
        >>> centre_square(torch.zeros(3, 40, 90, dtype=torch.uint8), 16).shape
        torch.Size([3, 16, 16])
    """
    height, width = image.shape[1:]
    side = min(height, width)
    return _cut(image, (height - side) // 2, (width - side) // 2, side, side, size)


def random_square(image: Tensor, size: int, rng: torch.Generator, *, flip: bool = False) -> Tensor:
    """A mild random crop at `size` pixels: at least 3/4 of the largest square, slightly stretched.

    Example:
        >>> picture = torch.zeros(3, 40, 90, dtype=torch.uint8)
        >>> random_square(picture, 16, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 16, 16])

    Args:
        image: (3, H, W) uint8.
        size: Rows and columns of the result.
        rng: The source of all randomness.
        flip: Also mirror every other image. Off by default, because captions name left and right.
    """
    height, width = image.shape[1:]
    area, ratio, down, right, mirror = torch.rand(5, generator=rng).tolist()
    side = min(height, width) * math.sqrt(MIN_AREA + (1 - MIN_AREA) * area)
    stretch = MAX_RATIO ** (ratio - 0.5)
    rows = min(height, max(1, round(side / stretch)))
    columns = min(width, max(1, round(side * stretch)))
    top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
    square = _cut(image, top, left, rows, columns, size)
    return square.flip(2) if flip and mirror < 0.5 else square


def view_square(image: Tensor, size: int, view: int, image_id: str, *, flip: bool) -> Tensor:
    """View 0 is the centred square. Any other is a random crop that depends on its key alone.

    Example:
        >>> picture = torch.arange(3 * 40 * 90).view(3, 40, 90).to(torch.uint8)
        >>> a, b = (view_square(picture, 16, view=2, image_id="dog.jpg", flip=True) for _ in "ab")
        >>> bool((a == b).all())
        True
    """
    if view == 0:
        return centre_square(image, size)
    return random_square(image, size, generator("view", view, image_id), flip=flip)


def view_of(epoch: int, image_id: str, views: int) -> int:
    """The view of an image in an epoch: the epochs cycle through the views, from a varying start.

    Example:
        >>> sorted(view_of(epoch, "dog.jpg", views=4) for epoch in range(4))
        [0, 1, 2, 3]
    """
    return (epoch + stable_hash("view", image_id)) % views


def _cut(image: Tensor, top: int, left: int, rows: int, columns: int, size: int) -> Tensor:
    piece = image[:, top : top + rows, left : left + columns]
    resized: Tensor = F.resize(piece, [size, size], antialias=True)
    return resized.contiguous()


def read_batches(
    images: Iterable[Any], size: int, batch_size: int, errors: Policy
) -> Iterator[list[Tensor | None]]:
    """Read images in any form, a batch at a time, as (3, size, size) uint8 tensors.

    Args:
        images: Any number of images that `read_image` takes; read when they are needed.
        size: Side in pixels.
        batch_size: Images per batch.
        errors: "raise" stops at an image that cannot be read; "skip" warns and gives None for it.

    Raises:
        ConfigError: another value of `errors`, or `batch_size` < 1.
        DataError: an image that cannot be read, by name, unless it is skipped.
    """
    require_int("caption: batch_size", batch_size, 1)
    if errors not in ("skip", "raise"):
        raise ConfigError(f"errors={errors!r} was given; use errors='skip' or 'raise'.")
    place = 0
    for chunk in chunks(images, batch_size):
        yield [_read(image, size, place + i, errors) for i, image in enumerate(chunk)]
        place += len(chunk)


def _read(image: Any, size: int, place: int, errors: Policy) -> Tensor | None:
    try:
        return centre_square(read_image(image), size)
    except DataError as error:
        if errors == "raise":
            raise
        warnings.warn(f"caption: image {place} was left out: {error}", stacklevel=5)
        return None


def is_many(images: Any) -> bool:
    """Whether this is an iterable of images rather than one image.

    Example:
        >>> is_many("dog.jpg"), is_many(["dog.jpg"]), is_many(torch.zeros(2, 3, 8, 8))
        (False, True, True)
    """
    if isinstance(images, Tensor):
        return images.ndim == 4
    if hasattr(images, "__array__"):
        return getattr(images, "ndim", 3) == 4
    alone = (str, bytes, bytearray, os.PathLike, StoredImage, Mapping)
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
