"""A foreign captioner as a decoder, so that every search of ours can ask it word by word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.outputs import Batch, DecoderOutput


class PrefixDecoder(Decoder):
    """Reads the whole caption so far again for every word: slow, but it asks for `adapt` alone.

    The features are the images themselves, (I, 3, H, W) uint8.

    Args:
        teacher: A `ForeignTeacher`; it is not moved, and its mode is not changed.
    """

    has_attention = False

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.ask = teacher.forward
        self.vocabulary = len(teacher.tokenizer.vocabulary)

    def build_vocabulary(self, vocabulary: int) -> None:
        """Nothing: the words are the teacher's."""

    def forward(
        self, input_ids: Tensor, features: Tensor, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and (I, 3, H, W) images to logits (B, T, V)."""
        ids = torch.cat([input_ids, input_ids[:, -1:]], 1)  # a target for the last word, not read
        batch = Batch(
            images=features,
            input_ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            captions=("",) * len(ids),
            image_ids=tuple(map(str, range(len(features)))),
        )
        return DecoderOutput(self.ask(batch).logits)

    def start(self, features: Tensor) -> State:
        """No word has been read yet."""
        words = torch.zeros(len(features), 0, dtype=torch.int64, device=features.device)
        return State(image={"images": features}, row={"words": words})

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """(R,) words to logits (R, V)."""
        words = torch.cat([state.row["words"], tokens[:, None]], 1)  # (R, t)
        logits = self(words, state.image["images"]).logits[:, -1]
        return logits, State(state.image, {"words": words}, state.beams, state.position + 1)
