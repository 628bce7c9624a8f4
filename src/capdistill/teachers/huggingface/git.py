"""GIT: the tokens of a CLIP encoder, then the words, in one Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capdistill.teachers.huggingface.base import Adapter, Encoded, answering


class Git(Adapter):
    """GIT. Its logits and states begin with those of the image: the last ones are the words'.

    Source:
        Wang et al. (2022), "GIT". transformers, `GitForCausalLM`: captions begin with [CLS] and end
        with [SEP]. Its cache is wrong up to transformers 5.12 at least, which a teacher notices.
    """

    model_class = "GitForCausalLM"
    reads_prompt_once = True
    prefix_tokens = 1

    def first_ids(self) -> list[int]:
        """[CLS], then the prompt."""
        return [self.setting("bos_token_id"), *self.ids_of(self.prompt or "")]

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter."""
        output = self.module.git.image_encoder(**self.pixels(images))
        features = output.last_hidden_state  # (I, N, D)
        self.image_columns = slice(features.shape[1])
        return Encoded({"features": features})

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """As for every adapter; the image is read once, with the first words."""
        from transformers.modeling_outputs import BaseModelOutput

        cache, features = options.get(self.cache_name), encoded["features"]
        seen = cache.get_seq_length() - features.shape[1] if cache is not None else -1
        if seen > 0:  # words in the cache; positions count words alone
            total = seen + ids.shape[1]
            options["position_ids"] = torch.arange(seen, total, device=ids.device)[None]
            options["attention_mask"] = ids.new_ones(len(ids), total)
            return self.module(input_ids=ids, logits_to_keep=keep, **options)
        known = BaseModelOutput(last_hidden_state=features)
        with answering(self.module.git.image_encoder, "forward", known):
            return self.module(
                input_ids=ids, pixel_values=features[:, None], logits_to_keep=keep, **options
            )
