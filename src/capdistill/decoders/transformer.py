"""A causal, pre-norm Transformer decoder with tied embeddings and folded cross-attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.decoders.base import (
    Cache,
    CrossAttention,
    Decoder,
    DecoderState,
    merge_heads,
    require_sizes,
    split_heads,
)
from capdistill.errors import ConfigError
from capdistill.outputs import DecoderOutput


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after its own norm.

    Args:
        width: W, width of the residual stream.
        dim: D, width of the features.
        heads: Attention heads.
        ffn: Inner width of the feed-forward part.
        dropout: Dropout on each residual branch.
    """

    def __init__(self, width: int, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_key_value = nn.Linear(width, 3 * width)
        self.self_output = nn.Linear(width, width)
        self.cross = CrossAttention(width, dim, heads)
        self.cross_output = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, features: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """(B, T, W) words, each of which sees itself, those before it and the (I, N, D) features.

        Returns:
            The words of the next block, and the (B, T, N) attention if needed.
        """
        memory = self.cross.project(features)
        query, key, value = self.project(x)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.finish(x, context, memory, need)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, W) words to query, key and value of the self-attention, (B, h, T, d)."""
        parts = self.query_key_value(self.self_norm(x)).chunk(3, dim=-1)
        return tuple(split_heads(part, self.heads) for part in parts)

    def finish(
        self, x: Tensor, context: Tensor, memory: tuple[Tensor, Tensor], need: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add the self-attention's context, then apply cross-attention and feed-forward."""
        x = x + self.drop(self.self_output(merge_heads(context)))  # (B, T, W)
        seen, weights = self.cross(self.cross_norm(x), *memory, need=need)
        x = x + self.drop(self.cross_output(seen))
        return x + self.drop(self.ffn(self.ffn_norm(x))), weights


class TransformerDecoder(Decoder):
    """Transformer decoder with masked self-attention and cross-attention in every layer.

    Example:
        >>> decoder = TransformerDecoder(dim=8, width=16, layers=2, heads=2, ffn=32)
        >>> decoder.build(vocabulary=11)
        >>> ids, features = torch.zeros(4, 5, dtype=torch.int64), torch.randn(2, 9, 8)
        >>> decoder(ids, features).logits.shape     # 2 images with 2 captions of 5 words each
        torch.Size([4, 5, 11])

    Args:
        dim: D, width of the features.
        width: W, width of embeddings and layers.
        layers: Number of blocks.
        heads: Attention heads; must divide `width`.
        ffn: Inner width of the feed-forward part.
        dropout: Dropout on embeddings, residual branches and the vector before the vocabulary
            projection.

    Raises:
        ConfigError: `width` is odd or not a multiple of `heads`, or a size or `dropout` is out of
            range.

    Source:
        Vaswani et al. (2017); pre-norm as in Xiong et al. (2020), equation of figure 1 (b);
        tied embeddings as in Press and Wolf (2017).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 512,
        layers: int = 3,
        heads: int = 8,
        ffn: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "width": width, "layers": layers, "heads": heads, "ffn": ffn}
        require_sizes("TransformerDecoder", dropout, **sizes)
        if width % heads or width % 2:
            raise ConfigError(
                f"TransformerDecoder: width {width} must be even and a multiple of heads {heads}."
            )
        self.dim, self.width = dim, width
        self.hidden_dims = (width,) * (layers + 1)
        self.blocks = nn.ModuleList(Block(width, dim, heads, ffn, dropout) for _ in range(layers))
        self.output = nn.Linear(width, width)  # keeps tied logits from favouring the last word
        self.final_norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def build_vocabulary(self, vocabulary: int) -> None:
        """Create the matrix shared by embedding and output projection."""
        self.embedding = nn.Embedding(vocabulary, self.width)
        nn.init.normal_(self.embedding.weight, std=self.width**-0.5)

    def forward(
        self, input_ids: Tensor, features: Tensor, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and (I, N, D) features to logits (B, T, V) and the needed outputs."""
        x = self.embed(input_ids, 0)  # (B, T, W)
        hidden, weights = [], None
        for i, block in enumerate(self._blocks()):
            look = "attention" in need and i + 1 == len(self.blocks)
            x, weights = block(x, features, look)
            hidden.append(x)
        hidden.append(self.final_norm(self.output(x)))
        return DecoderOutput(
            logits=self.score(hidden[-1]),
            hidden=tuple(hidden) if "hidden" in need else None,
            attention=weights,
        )

    def start(self, features: Tensor) -> DecoderState:
        """Project the features for every layer; no word has been read yet."""
        image = {}
        for i, block in enumerate(self._blocks()):
            keys, values = block.cross.project(features)
            image[f"key{i}"], image[f"value{i}"] = keys.contiguous(), values.contiguous()
        return DecoderState(image=image, row={}, cache=Cache.empty(len(self.blocks), keys))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(R,) words to logits (R, V); keys and values of earlier words come from the state."""
        beams = state.beams
        cache = cast("Cache", state.cache).extend(beams)
        row = {} if beams == 1 else {"visible": see_own(state)}  # (R, slots)
        mask = row["visible"].view(-1, 1, beams, cache.used) if row else None  # (I, 1, k, slots)
        x = self.embed(tokens[:, None], state.position)  # (R, 1, W)
        for i, block in enumerate(self._blocks()):
            query, *new = (fold(part, beams) for part in block.project(x))  # (I, h, k, d)
            keys, values = cache.put(i, *new)
            context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            memory = (state.image[f"key{i}"], state.image[f"value{i}"])
            x, _ = block.finish(x, unfold(context), memory, need=False)
        after = DecoderState(state.image, row, beams, state.position + 1, cache)
        return self.score(self.final_norm(self.output(x)))[:, 0], after

    def _blocks(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.blocks))

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Scaled word embeddings plus sinusoidal positions from `position` on, (B, T, W)."""
        places = sinusoids(position, ids.shape[1], self.width)
        words = self.embedding(ids) * math.sqrt(self.width)
        x: Tensor = self.drop(words + places.to(words.dtype).to(words.device, non_blocking=True))
        return x

    def score(self, x: Tensor) -> Tensor:
        """(B, T, W) to logits (B, T, V) by the embedding matrix."""
        return F.linear(self.drop(x), *self.output_layer())

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """The embedding, without a bias."""
        return self.embedding.weight, None


def fold(x: Tensor, beams: int) -> Tensor:
    """One word of each row, (R, h, 1, d), to the words of each image, (I, h, k, d)."""
    return x.view(-1, beams, x.shape[1], x.shape[3]).transpose(1, 2)


def unfold(x: Tensor) -> Tensor:
    """(I, h, k, d) back to (R, h, 1, d)."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def see_own(state: DecoderState) -> Tensor:
    """(R, slots) mask of the cached words that belong to a row; the newest are last."""
    rows = len(next(iter(state.image.values()))) * state.beams
    device = next(iter(state.image.values())).device
    new = torch.eye(state.beams, dtype=torch.bool, device=device)
    new = new.repeat(rows // state.beams, 1)  # (R, k)
    past = state.row.get("visible")
    if past is None:  # there was one beam per image: all rows share its words
        past = new.new_ones(rows, state.position)
    return torch.cat([past, new], 1)


def sinusoids(first: int, count: int, width: int) -> Tensor:
    """Position vectors (count, width), float64: sines and cosines side by side, for any length.

    Example:
        >>> sinusoids(first=0, count=1, width=4)
        tensor([[0., 1., 0., 1.]], dtype=torch.float64)

    Source:
        Vaswani et al. (2017), section 3.5.
    """
    place = torch.arange(first, first + count, dtype=torch.float64, device="cpu")[:, None]
    even = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    rate = torch.exp(even * (-math.log(10_000.0) / width))
    # A cosine is a shifted sine. Most versions of ONNX Runtime have no cosine in float64.
    shift = torch.tensor([0.0, math.pi / 2], dtype=torch.float64, device="cpu")
    return torch.sin((place * rate)[..., None] + shift).flatten(1)
