"""VisionEncoderDecoder, such as ViT-GPT2: any image encoder with any text decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from capdistill.teachers.huggingface.base import Encoded, EncoderDecoder

PREFIX = {"vit": 1, "deit": 2}  # leading tokens of encoders with a grid


class VisionEncoderDecoder(EncoderDecoder):
    """The decoder attends to the encoder's tokens.

    Source:
        transformers, `VisionEncoderDecoderModel`. Captions begin with `decoder_start_token_id`.
    """

    model_class = "VisionEncoderDecoderModel"

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.prefix_tokens = PREFIX.get(self.module.config.encoder.model_type)

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter."""
        return Encoded({"states": self.module.encoder(**self.pixels(images)).last_hidden_state})

    def features(self, encoded: Encoded) -> Tensor:
        """As for every adapter: the encoder's tokens, before any projection."""
        return encoded["states"]
