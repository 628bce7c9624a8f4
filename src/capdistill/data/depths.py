"""Pixels of 16 bits, floats and arrays, as images of 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from capdistill.errors import DataError

_BITS_PER_SAMPLE = 258


def eight_bits(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """The pixels of an image with one channel of 16 bits or floats, scaled by their depth.

    Raises:
        DataError: its values have no clear meaning.
    """
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


def image_of(values: npt.NDArray[Any], name: str, *, channels_first: bool) -> Image.Image:
    """An array (HW, HWC or CHW with 1, 3 or 4 channels) as an image: L, RGB or RGBA.

    Args:
        values: uint8, bool, uint16, or float in [0, 1].
        name: What messages call it.
        channels_first: Which of HWC and CHW it is where both can be.

    Raises:
        DataError: another shape or type.
    """
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
    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(flat))


def _channels_last(values: npt.NDArray[Any], name: str, first: bool) -> npt.NDArray[Any]:
    if values.ndim == 2:
        return values[:, :, None]
    axes = (0, 2) if first else (2, 0)
    for axis in axes:
        if values.ndim == 3 and values.shape[axis] in (1, 3, 4):
            return np.moveaxis(values, axis, 2)
    raise DataError(f"{name}: expected (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4.")
