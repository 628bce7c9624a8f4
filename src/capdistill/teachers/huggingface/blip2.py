"""BLIP-2: queries that look at a ViT, read by a language model (OPT, or T5) before the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capdistill.teachers.huggingface.base import Encoded, EncoderDecoder


class Blip2(EncoderDecoder):
    """BLIP-2. The queries are its visual tokens.

    Source:
        Li et al. (2023), "BLIP-2". transformers, `Blip2ForConditionalGeneration`: OPT reads the
        queries, its start token and the prompt. T5 reads queries and prompt in its encoder.
    """

    model_class = "Blip2ForConditionalGeneration"

    def __init__(self, module: Any, *parts: Any) -> None:
        self.reads_prompt_once = module.config.use_decoder_only_language_model
        self.image_columns = slice(module.config.num_query_tokens)
        super().__init__(module, *parts)

    def first_ids(self) -> list[int]:
        """The start token of the language model, and the prompt if it has no encoder."""
        text, prompt = self.module.config.text_config, self.ids_of(self.prompt or "")
        return [text.bos_token_id, *prompt] if self.reads_prompt_once else super().first_ids()[:1]

    @property
    def reader(self) -> Any:
        """The language model."""
        return self.module.language_model

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter; the encoder of a T5 reads queries and prompt."""
        features = self.module.get_image_features(**self.pixels(images)).pooler_output  # (I, N, D)
        if self.reads_prompt_once:
            return Encoded({"features": features})
        start = [self.setting("bos_token_id")]
        first = self.tokenizer.encode(self.prompt) if self.prompt else start
        words = self._embed(torch.tensor([first] * len(images), device=images.device))
        states = self.reader.encoder(inputs_embeds=torch.cat([features, words], 1))
        return Encoded({"features": features, "states": states.last_hidden_state})

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """As for every adapter; OPT reads the queries before the first words."""
        if not self.reads_prompt_once:
            return super().read(ids, encoded, keep, **options)
        cache, words = options.get(self.cache_name), self._embed(ids)
        if cache is None or not cache.get_seq_length():
            words = torch.cat([encoded["features"].to(words), words], 1)
        return self.reader(inputs_embeds=words, logits_to_keep=keep, **options)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.module.get_input_embeddings()(ids)  # type: ignore[no-any-return]
