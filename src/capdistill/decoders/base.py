"""The contract of a decoder: visual tokens and words in, logits of the next word out.

To write a decoder, subclass `Decoder`. Generation calls `start` and `step` only. The attention that
the built-in decoders share stands below it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import (
    ConfigError,
    Requirement,
    are_counts,
    is_count,
    require_attributes,
    require_int,
    require_number,
)
from capdistill.outputs import DecoderOutput


@dataclass(frozen=True)
class DecoderState:
    """State of a decoder between two words. Rows stay grouped by image.

    Example:
        >>> import torch
        >>> features, cache = torch.zeros(2, 9, 8), torch.tensor([[1.0], [2.0]])
        >>> state = DecoderState({"features": features}, {"cache": cache}).expand(2)
        >>> state.row["cache"].tolist(), state.image["features"] is features
        ([[1.0], [1.0], [2.0], [2.0]], True)
        >>> state.keep(torch.tensor([1])).row["cache"].tolist()
        [[2.0], [2.0]]

    Args:
        image: Tensors with one row per image (I, ...): features and their projections.
        row: Tensors with one row per hypothesis (I * beams, ...): recurrent states, masks.
        beams: Hypotheses per image.
        position: Words consumed so far.
        cache: Data shared by all beams of an image.
    """

    image: dict[str, Tensor]
    row: dict[str, Tensor]
    beams: int = 1
    position: int = 0
    cache: Cache | None = None

    def expand(self, k: int) -> DecoderState:
        """Repeat every row k times, side by side; tensors in `image` are not copied."""
        rows = {key: value.repeat_interleave(k, 0) for key, value in self.row.items()}
        return replace(self, row=rows, beams=self.beams * k)

    def reorder(self, index: Tensor) -> DecoderState:
        """Select rows: row r becomes old row `index[r]`, (R,), within the group of its image."""
        return replace(self, row={key: value[index] for key, value in self.row.items()})

    def keep(self, images: Tensor) -> DecoderState:
        """Keep only the given images, (J,) indices or (I,) bool, with all their rows."""
        kept = {key: value[images] for key, value in self.image.items()}
        rows = {
            key: value.reshape(-1, self.beams, *value.shape[1:])[images].flatten(0, 1)
            for key, value in self.row.items()
        }
        cache = None if self.cache is None else self.cache.keep(images)
        return replace(self, image=kept, row=rows, cache=cache)


class Decoder(nn.Module):
    """Words given visual tokens. `forward` and repeated `step` give the same logits.

    The vocabulary is not known when a decoder is created. Layers that depend on its size are
    created by `build`, which `Captioner` calls.

    Attributes:
        dim: D, width of the features it reads.
        hidden_dims: Width of each entry of `DecoderOutput.hidden`.
        has_attention: Whether it can return attention over visual tokens.
        vocabulary: V once built, else None.
        hub_arguments: Names of the arguments of `__init__` that select pretrained weights, which
            loading a saved captioner sets to False.
    """

    dim: int
    hidden_dims: tuple[int, ...]
    has_attention: bool = True
    vocabulary: int | None = None
    hub_arguments: ClassVar[tuple[str, ...]] = ()

    def build(self, vocabulary: int) -> None:
        """Create the layers that depend on V, once, on the device of the others; idempotent.

        Raises:
            ConfigError: the decoder was built for another vocabulary.
        """
        if self.vocabulary == vocabulary:
            return
        if self.vocabulary is not None:
            raise ConfigError(
                f"{type(self).__name__} was built for {self.vocabulary} words but is now used with "
                f"{vocabulary}. Create a new decoder for each captioner."
            )
        self.vocabulary = vocabulary
        rest = next(self.parameters(), None)
        self.build_vocabulary(vocabulary)
        if rest is not None:
            self.to(rest.device, rest.dtype)

    @abstractmethod
    def build_vocabulary(self, vocabulary: int) -> None:
        """Create the word embedding and the output projection for V words."""

    @abstractmethod
    def forward(
        self, input_ids: Tensor, features: Tensor, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and (I, N, D) features to logits; `need` may hold "hidden", "attention"."""

    @abstractmethod
    def start(self, features: Tensor) -> DecoderState:
        """(I, N, D) features to a state with one row per image."""

    @abstractmethod
    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One word per row, (R,), to logits (R, V) of the next and the state after it."""

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """The matrix (V, H) and the bias (V,), or None, that turn `hidden[-1]` into logits.

        Override it where that is how logits are made; cached targets of a teacher need it.

        Raises:
            ConfigError: the decoder does not say.
        """
        raise ConfigError(
            f"{type(self).__name__} has no output_layer(), which gives the matrix and the bias "
            "that turn hidden[-1] into logits. Define it to cache the targets of a teacher."
        )


def require_decoder(decoder: Decoder) -> None:
    """Check that a decoder has the attributes of its contract.

    Raises:
        ConfigError: one is missing, or has another kind of value.
    """
    require_attributes("decoder", decoder, "Decoder", _ATTRIBUTES)


_ATTRIBUTES: dict[str, Requirement] = {
    "dim": (is_count, "D, the width of the features it reads, a positive whole number"),
    "hidden_dims": (are_counts, "a tuple of widths, one per entry of DecoderOutput.hidden"),
    "has_attention": (lambda flag: isinstance(flag, bool), "True or False"),
    "build": (callable, "a method that creates the layers that depend on the vocabulary"),
    "start": (callable, "a method from features to the first state"),
    "step": (callable, "a method from words and a state to logits and the next state"),
}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(R, T, W) to (R, heads, T, W / heads)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(R, heads, T, d) to (R, T, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, need: bool, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; the weights are returned only on request.

    Args:
        query: (R, heads, T, d).
        keys: (R, heads, N, d).
        values: (R, heads, N, d).
        need: Whether to return the weights; otherwise a fused kernel runs.
        dropout: Dropout on the weights; applied only if `need` is False.

    Returns:
        (R, heads, T, d) contexts, and (R, T, N) weights, mean over heads, or None.
    """
    if not need:
        return F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout), None
    exact = torch.promote_types(query.dtype, torch.float32)  # halves are too coarse for a softmax
    scores = query.to(exact) @ keys.to(exact).transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.softmax(-1)  # (R, heads, T, N)
    dropped = F.dropout(weights, dropout) if dropout else weights
    return dropped.to(values.dtype) @ values, weights.mean(1)


def require_sizes(owner: str, dropout: float, **sizes: int) -> None:
    """Check the sizes of a decoder, which are counts, and its dropout.

    Raises:
        ConfigError: one is out of range; the message names it.
    """
    for name, size in sizes.items():
        require_int(f"{owner}: {name}", size, minimum=1)
    require_number(f"{owner}: dropout", dropout, minimum=0, maximum=1)


class CrossAttention(nn.Module):
    """Multi-head attention whose queries are folded by image.

    Args:
        width: Width of the queries.
        dim: D, width of the features.
        heads: Attention heads.
        inner: Total width of queries and keys over all heads; `width` by default.
        dropout: Dropout on the attention weights.
    """

    def __init__(
        self, width: int, dim: int, heads: int, inner: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(dim, 2 * inner)

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(I, N, D) features to keys and values (I, heads, N, d), once per image."""
        keys, values = self.key_value(features).chunk(2, dim=-1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, need: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, W) words, rows grouped by image, to (B, T, inner) and (B, T, N) or None."""
        rows, length = x.shape[:2]
        images = keys.shape[0]
        folded = self.query(x).reshape(images, -1, keys.shape[1] * keys.shape[3])  # (I, k*T, inner)
        query = split_heads(folded, self.heads)  # (I, h, k*T, d)
        dropout = self.dropout if self.training else 0.0
        context, weights = attend(query, keys, values, need, dropout)
        if weights is not None:
            weights = weights.reshape(rows, length, -1)  # (B, T, N)
        return merge_heads(context).reshape(rows, length, -1), weights


ROOM = 64  # slots allocated at once, or 24 per beam


class Cache:
    """Key-value cache of self-attention for all layers, one row per image.

    It behaves like an immutable value: a second continuation of the same words is written to a copy
    and leaves the first one unchanged. With gradients enabled, nothing is written in place.

    Example:
        >>> with torch.no_grad():
        ...     cache = Cache.empty(layers=1, like=torch.zeros(2, 1, 1, 4)).extend(3)
        ...     keys, values = cache.put(0, torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        >>> keys.shape, cache.keep(torch.tensor([1])).used
        (torch.Size([2, 1, 3, 4]), 3)

    Args:
        rooms: Keys and values of the layers in turn, each (I, heads, capacity, d).
        used: Number of slots that hold words.
        new: Number of these slots that are still to be `put`.
        tip: The last slot written, shared by all caches with the same `rooms`.
    """

    def __init__(
        self, rooms: list[Tensor], used: int = 0, new: int = 0, tip: list[int] | None = None
    ) -> None:
        self.rooms, self.used, self.new = rooms, used, new
        self.tip = [used] if tip is None else tip
        self.moves = tip is None  # the words so far must first be copied to new tensors

    @classmethod
    def empty(cls, layers: int, like: Tensor) -> Cache:
        """An empty cache with the images, heads and dimensions of keys (I, heads, N, d)."""
        return cls([like.new_empty(*like.shape[:2], 0, like.shape[3])] * (2 * layers))

    def extend(self, slots: int) -> Cache:
        """Make room for more words per image; they are then `put`, layer by layer."""
        used = self.used + slots
        free = self.tip[0] == self.used and used <= self.rooms[0].shape[2]
        if not free or torch.is_grad_enabled():
            return Cache([*self.rooms], used, slots)
        self.tip[0] = used
        return Cache([*self.rooms], used, slots, self.tip)

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest words (I, heads, k, d) of a layer; return all, (I, heads, used, d)."""
        return self._put(2 * layer, key), self._put(2 * layer + 1, value)

    def _put(self, place: int, words: Tensor) -> Tensor:
        room, before = self.rooms[place], self.used - self.new
        past = room[:, :, :before]
        if torch.is_grad_enabled():
            self.rooms[place] = torch.cat([past, words.to(room.dtype)], 2)
            return self.rooms[place]
        if self.moves:
            room = room.new_empty(*room.shape[:2], before + max(ROOM, 24 * self.new), room.shape[3])
            room[:, :, :before] = past
            self.rooms[place] = room
        room[:, :, before : self.used] = words
        return room[:, :, : self.used]

    def keep(self, images: Tensor) -> Cache:
        """The cache of the given images only."""
        rooms = [room[images] for room in self.rooms]
        return Cache(rooms, self.used, tip=[self.used])
