"""BLIP: a ViT, and a BERT decoder that attends to its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from capdistill.teachers.huggingface.base import Adapter, Encoded


class Blip(Adapter):
    """BLIP for captioning.

    Source:
        Li et al. (2022), "BLIP". transformers, `BlipForConditionalGeneration`: captions begin with
        [DEC] (the text configuration's `bos_token_id`) and end with [SEP]. The hidden states of its
        output are those of the image, so `text_decoder` is called.
    """

    model_class = "BlipForConditionalGeneration"
    prefix_tokens = 1

    def first_ids(self) -> list[int]:
        """[DEC], then the prompt."""
        return [self.module.config.text_config.bos_token_id, *self.ids_of(self.prompt or "")]

    def end_ids(self) -> list[int]:
        """[SEP]."""
        return [self.module.config.text_config.sep_token_id]

    @property
    def reader(self) -> Any:
        """The text decoder."""
        return self.module.text_decoder

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter."""
        output = self.module.vision_model(**self.pixels(images))
        return Encoded({"features": output.last_hidden_state})

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """As for every adapter."""
        return self.reader(input_ids=ids, encoder_hidden_states=encoded["features"], **options)
