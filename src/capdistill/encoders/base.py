"""The contract of an encoder: uint8 images in, visual tokens out.

Whoever writes an encoder subclasses `Encoder`; whoever uses one calls it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import ConfigError, DataError


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

        None, as here, where the trunk cannot be cached.
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


Refine = Literal["none", "pre", "post"]


class TokenAttention(nn.Module):
    """Self-attention among visual tokens, through a bottleneck, with a residual.

    `x + up(attention(down(norm(x))))`; where the inner width is that of the tokens, `down` and
    `up` merge with the attention's own projections.

    Example:
        >>> import torch
        >>> TokenAttention(width=64, inner=16)(torch.zeros(2, 49, 64)).shape
        torch.Size([2, 49, 64])

    Args:
        width: D0, width of the tokens.
        inner: Width of the attention; heads are the largest of 8, 4, 2, 1 that divides it.
        dropout: On attention weights and on what is added, in training.
    """

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = math.gcd(inner, 8)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Identity() if inner == width else nn.Linear(width, inner)
        self.qkv = nn.Linear(inner, 3 * inner)
        self.up = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.up.weight, std=0.02)  # begins near the identity
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D0)."""
        qkv = self.qkv(self.down(self.norm(tokens)))  # (I, N, 3 inner)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)  # (I, h, N, d)
        added: Tensor = self.dropout(self.up(mixed.transpose(1, 2).flatten(2)))  # (I, N, D0)
        return tokens + added


def make_head(width: int, dim: int | None, refine: Refine, dropout: float) -> nn.Sequential:
    """Modules from backbone tokens (I, N, D0) to features (I, N, D).

    Example:
        >>> [type(part).__name__ for part in make_head(64, 16, "pre", 0.0)]
        ['TokenAttention', 'LayerNorm', 'Linear']

    Args:
        width: D0.
        dim: D, or None for no projection.
        refine: Attention before the projection, after it, or none.
        dropout: In the refinement, and on the projected tokens.

    Raises:
        ConfigError: a value that cannot work.
    """
    if refine not in ("none", "pre", "post"):
        raise ConfigError(f"refine is {refine!r}; it must be 'none', 'pre' or 'post'.")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
        raise ConfigError(f"dim is {dim!r}; it must be a positive width, or None for {width}.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}; it must be at least 0 and below 1.")
    inner = dim or width
    parts: list[nn.Module] = []
    if refine == "pre":
        parts.append(TokenAttention(width, inner, dropout))
    if dim is not None:
        parts += [nn.LayerNorm(width), nn.Linear(width, dim)]
    if refine == "post":
        parts.append(TokenAttention(inner, inner, dropout))
    if dropout and dim is not None:
        parts.append(nn.Dropout(dropout))
    return nn.Sequential(*parts)
