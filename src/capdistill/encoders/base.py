"""The contract of an encoder: uint8 images in, visual tokens out.

Whoever writes an encoder subclasses `Encoder`; whoever uses one calls it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import DataError


class Encoder(nn.Module):
    """Images to visual tokens: `forward(images) = head(trunk(images))`.

    A subclass sets the attributes below in `__init__`, implements `trunk`, and may replace `head`
    (the identity here). What the trunk does is split off so that it can be frozen, and cached.

    Attributes:
        dim: D, width of the output tokens.
        token_dim: D0, width of the trunk's tokens.
        tokens: N, how many tokens an image gives.
        prefix_tokens: CLS and register tokens, which come first.
        grid: (h, w) with N = prefix_tokens + h * w, or None.
        image_size: Side in pixels that `trunk` works at.
        mean, std: Normalisation of pixels in [0, 1], one value a channel.
    """

    dim: int
    token_dim: int
    tokens: int
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @abstractmethod
    def trunk(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 images to (I, N, D0) tokens of the backbone."""

    def head(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D): refinement and projection, always trainable."""
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 to (I, N, D)."""
        return self.head(self.trunk(images))

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone (not of the head): they get the encoder's learning rate."""
        return iter(())

    @property
    def trunk_frozen(self) -> bool:
        """True where no parameter of the trunk is trained, so that its tokens can be cached."""
        return not any(p.requires_grad for p in self.trunk_parameters())

    def fingerprint(self) -> str | None:
        """Hash of what the trunk's tokens depend on: the key of cached tokens.

        None, as here, where the trunk can not be cached.
        """
        return None

    def normalise(self, images: Tensor) -> Tensor:
        """Resize (antialiased) to `image_size` where needed, scale to [0, 1], normalise.

        The result has the trunk's own precision, so that `encoder.double()` works in float64.

        Raises:
            DataError: the images are not (I, 3, H, W) uint8, or empty.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise DataError(
                f"{type(self).__name__}: images are {images.dtype} {tuple(images.shape)}, but "
                f"uint8 of (I, {len(self.mean)}, H, W) is expected: pixels 0 to 255, not yet "
                "normalised. Use (images * 255).to(torch.uint8) for pixels in [0, 1]."
            )
        dtype = next((p.dtype for p in self.trunk_parameters()), torch.float32)
        pixels = images.to(torch.promote_types(dtype, torch.float32))
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp_(0, 255)
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) * 255 for v in (self.mean, self.std))
        return ((pixels - mean) / std).to(dtype)  # (I, 3, S, S)
