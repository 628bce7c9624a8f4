"""What stands between a backbone's tokens and the decoder: refinement and projection."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import ConfigError

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
        ConfigError: a value that can not work.
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
