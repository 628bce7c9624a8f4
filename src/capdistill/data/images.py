"""Images in any form to RGB pixels, and the squares that models see in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from capdistill.data.pixels import ImageSource, read_pixels
from capdistill.runtime import generator, stable_hash


def read_image(source: ImageSource) -> Tensor:
    """Any image as uint8 RGB pixels (3, H, W), upright.

    Orientation tags are applied, transparency is laid over white, 16-bit and float images are
    scaled by their depth and never stretched. The same image gives the same pixels from a path,
    bytes, an open file or an image opened with Pillow, and the argument is not changed. Threads may
    read at the same time.

    Example:
        >>> read_image(torch.ones(2, 4))[:, 0, 0].tolist()
        [255, 255, 255]

    Args:
        source: A path, encoded bytes, a binary file, a `PIL.Image.Image`, or an array or tensor
            (HW, HWC or CHW with 1, 3 or 4 channels; uint8, bool, uint16, or float in [0, 1]); or a
            row of a Hugging Face data set: {"image": ...}, or {"bytes": ..., "path": ...}.

    Raises:
        DataError: it is missing, not an image, truncated, too large, or its values have no clear
            meaning; the message names the file and the reason.
    """
    # (3, H, W), but in memory as (H, W, 3): so it is resized twice as fast, to the same values
    return torch.from_numpy(read_pixels(source)).permute(2, 0, 1)


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
    area, ratio, down, right, mirror = torch.rand(5, generator=rng, device="cpu").tolist()
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
