"""The mixture of several distributions over words, and the decoder that generates from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, DecoderState
from capdistill.losses.divergence import full
from capdistill.outputs import DecoderOutput


def mixture(
    logits: Sequence[Tensor], weights: Sequence[float], by_confidence: bool = False
) -> Tensor:
    """Log-probabilities of a mixture, `log sum_m w_m softmax(logits_m)`.

    Example:
        >>> one, other = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> mixture([one, other], [0.5, 0.5]).exp()
        tensor([0.7000, 0.3000])

    Args:
        logits: (..., V) of each member, of any floating type; computed in float32 at least.
        weights: One number > 0 per member; their sum is 1.
        by_confidence: Multiply the weights by exp(-entropy) of the member at each word, and
            normalise them again.

    Returns:
        (..., V) in float32 (float64 stays).
    """
    log_probs = [full(each).log_softmax(-1) for each in logits]
    shares: list[Tensor | float] = [math.log(weight) for weight in weights]
    if by_confidence:
        entropies = [torch.special.entr(each.exp()).sum(-1, keepdim=True) for each in log_probs]
        scores = [share - each for share, each in zip(shares, entropies, strict=True)]
        shares = list(torch.stack(scores).log_softmax(0))  # (M, ..., 1)
    parts = [each + share for each, share in zip(log_probs, shares, strict=True)]
    return functools.reduce(torch.logaddexp, parts)


@dataclass(frozen=True)
class EnsembleFeatures:
    """What the members' decoders start from, in their order."""

    members: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.members[0])

    @property
    def dtype(self) -> torch.dtype:
        """The most exact type of them."""
        kinds: list[torch.dtype] = [each.dtype for each in self.members]
        return functools.reduce(torch.promote_types, kinds)

    @property
    def device(self) -> torch.device:
        """The device of them all."""
        return self.members[0].device  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EnsembleState(DecoderState):
    """The members' states side by side; whatever selects rows does so in all of them."""

    members: tuple[DecoderState, ...] = ()

    def expand(self, k: int) -> EnsembleState:
        """As for every state."""
        members = tuple(state.expand(k) for state in self.members)
        return replace(self, members=members, beams=self.beams * k)

    def reorder(self, index: Tensor) -> EnsembleState:
        """As for every state."""
        return replace(self, members=tuple(state.reorder(index) for state in self.members))

    def keep(self, images: Tensor) -> EnsembleState:
        """As for every state."""
        return replace(self, members=tuple(state.keep(images) for state in self.members))


class EnsembleDecoder(Decoder):
    """The members' decoders side by side: each reads its own features, their words are mixed.

    Args:
        decoders: Those of the members; they are not moved, and their mode is kept.
        mix: From the members' logits to those of the mixture.
        vocabulary: V.
    """

    hidden_dims = ()
    has_attention = False

    def __init__(
        self,
        decoders: Sequence[Decoder],
        mix: Callable[[Sequence[Tensor]], Tensor],
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.decoders, self.mix, self.vocabulary = tuple(decoders), mix, vocabulary

    def build_vocabulary(self, vocabulary: int) -> None:
        """Do nothing: the vocabulary is the members'."""

    def forward(
        self, input_ids: Tensor, features: Any, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and the members' features to logits (B, T, V)."""
        pairs = zip(self.decoders, features.members, strict=True)
        return DecoderOutput(self.mix([decoder(input_ids, each).logits for decoder, each in pairs]))

    def start(self, features: Any) -> EnsembleState:
        """The members' states before the first word."""
        pairs = zip(self.decoders, features.members, strict=True)
        return EnsembleState({}, {}, members=tuple(decoder.start(each) for decoder, each in pairs))

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, EnsembleState]:
        """(R,) words to logits (R, V) of the mixture."""
        pairs = zip(self.decoders, state.members, strict=True)
        logits, after = zip(*(decoder.step(tokens, each) for decoder, each in pairs), strict=True)
        return self.mix(logits), replace(state, members=after, position=state.position + 1)
