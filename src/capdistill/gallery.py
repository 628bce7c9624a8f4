"""Small pictures for a report: spread evenly over the data, not chosen by how well they did."""

from __future__ import annotations

import base64
import io

from torch import Tensor

_SIDE = 192  # pixels


class Gallery:
    """Keeps between `wanted` and twice as many of the images it is offered, evenly spread.

    Example:
        >>> import torch
        >>> gallery = Gallery(wanted=2)
        >>> for i in range(9):
        ...     gallery.offer(str(i), torch.zeros(3, 4, 4, dtype=torch.uint8))
        >>> list(gallery.pictures())
        ['0', '8']

    Args:
        wanted: How many images `pictures` gives where there are enough.
    """

    def __init__(self, wanted: int = 12) -> None:
        self.wanted = wanted
        self._kept: list[tuple[str, Tensor]] = []
        self._stride, self._seen = 1, 0

    def offer(self, image: str, pixels: Tensor) -> None:
        """Keep this image or not. (3, H, W) uint8."""
        if self._seen % self._stride == 0:
            self._kept.append((image, pixels.cpu().clone()))
        self._seen += 1
        if len(self._kept) > 2 * self.wanted:
            self._kept = self._kept[::2]
            self._stride *= 2

    def pictures(self) -> dict[str, str]:
        """Image id -> its thumbnail as a `data:` address."""
        spread = (len(self._kept) - 1) / max(1, self.wanted - 1)
        chosen = sorted({round(i * max(spread, 1.0)) for i in range(self.wanted)})
        kept = [self._kept[i] for i in chosen if i < len(self._kept)]
        return {image: thumbnail(pixels) for image, pixels in kept}


def thumbnail(pixels: Tensor) -> str:
    """(3, H, W) uint8 pixels as a small JPEG in a `data:` address.

    Example:
        >>> import torch
        >>> thumbnail(torch.zeros(3, 8, 8, dtype=torch.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
