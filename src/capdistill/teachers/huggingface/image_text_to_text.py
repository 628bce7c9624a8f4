"""Prompted models, such as SmolVLM, Qwen-VL and PaliGemma: image and prompt among the words."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from capdistill.teachers.huggingface import prompts
from capdistill.teachers.huggingface.base import ALL, Adapter, Encoded, answering


class ImageTextToText(Adapter):
    """Any model of `AutoModelForImageTextToText` that continues a prompt.

    Attention is left out: the model would return it for all pairs of prompt tokens.
    """

    model_class = "AutoModelForImageTextToText"
    knowledge = ALL - {"attention"}
    reads_prompt_once = True

    def first_ids(self) -> list[int]:
        """The prompt with the image tokens of one image."""
        self.base = getattr(self.module, "model", self.module)  # has the image encoder
        self.text = prompts.prompt_text(self.processor, self.prompt)
        return self.encode(self.grey_image())["input_ids"][0].tolist()

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter; tensors that join the patches of all images are cut into rows."""
        count = len(images)
        values = prompts.model_inputs(self.processor, self.text, images, self.module)
        self.joined = {name for name, value in values.items() if len(value) != count}
        parts = {name: prompts.cut(values[name], count) for name in self.joined}
        return Encoded({**values, **parts})

    def features(self, encoded: Encoded) -> Tensor:
        """(I, N, D) visual tokens as they stand among the words."""
        known = inspect.signature(method := self.base.get_image_features).parameters
        found = method(**{name: v for name, v in self._flat(encoded).items() if name in known})
        encoded.kept["image"] = found
        return prompts.visual_tokens(found, len(encoded))

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """As for every adapter; images are read once, with the prompt."""
        cache, kept = options.get(self.cache_name), encoded.kept.get("image")
        if cache is not None and cache.get_seq_length():
            return self.module(input_ids=ids, logits_to_keep=keep, **options)
        values = prompts.with_captions(self._flat(encoded), ids, self.module)
        with answering(self.base, "get_image_features", kept):  # where it has been called
            output = self.module(**values, logits_to_keep=keep, **options)
        if getattr(self.base, "rope_deltas", None) is not None:  # equal for images of one size
            self.base.rope_deltas = self.base.rope_deltas[:1]
        return output

    def _flat(self, encoded: Encoded) -> dict[str, Tensor]:
        return {n: v.flatten(0, 1) if n in self.joined else v for n, v in encoded.values.items()}
