"""The contract of a decoder: visual tokens and words in, logits of the next word out.

To write a decoder, subclass `Decoder`. Generation calls `start` and `step` only.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from capdistill.decoders.attention import Cache
from capdistill.errors import ConfigError, Requirement, are_counts, is_count, require_attributes
from capdistill.outputs import DecoderOutput


@dataclass(frozen=True)
class DecoderState:
    """What a decoder remembers between two words. Rows stay grouped by image.

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
        cache: What was written once for all beams of an image.
    """

    image: dict[str, Tensor]
    row: dict[str, Tensor]
    beams: int = 1
    position: int = 0
    cache: Cache | None = None

    def expand(self, k: int) -> DecoderState:
        """Every row k times, side by side; what belongs to the image is not copied."""
        rows = {key: value.repeat_interleave(k, 0) for key, value in self.row.items()}
        return replace(self, row=rows, beams=self.beams * k)

    def reorder(self, index: Tensor) -> DecoderState:
        """Row r becomes old row `index[r]`, (R,); an index stays within its image's group."""
        return replace(self, row={key: value[index] for key, value in self.row.items()})

    def keep(self, images: Tensor) -> DecoderState:
        """Only the given images, (J,) indices or (I,) bool, with all their rows."""
        kept = {key: value[images] for key, value in self.image.items()}
        rows = {
            key: value.reshape(-1, self.beams, *value.shape[1:])[images].flatten(0, 1)
            for key, value in self.row.items()
        }
        cache = None if self.cache is None else self.cache.keep(images)
        return replace(self, image=kept, row=rows, cache=cache)


class Decoder(nn.Module):
    """Words given visual tokens. `forward` and repeated `step` give the same logits.

    The vocabulary is not known when a decoder is composed, so that what depends on its size is
    made by `build`, which `Captioner` calls.

    Attributes:
        dim: D, width of the features it reads.
        hidden_dims: Width of each entry of `DecoderOutput.hidden`.
        has_attention: Whether it can show attention over visual tokens.
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
        """Make what depends on V, once, where the rest is; the same V again does nothing.

        Raises:
            ConfigError: the decoder was built for another vocabulary.
        """
        if self.vocabulary == vocabulary:
            return
        if self.vocabulary is not None:
            raise ConfigError(
                f"{type(self).__name__} was built for {self.vocabulary} words and is now given "
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
    "build": (callable, "a method that makes what depends on the vocabulary"),
    "start": (callable, "a method from features to the first state"),
    "step": (callable, "a method from words and a state to logits and the next state"),
}
