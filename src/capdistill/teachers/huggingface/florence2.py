"""Florence-2: a BART that reads the tokens of the image, then the task, in its encoder."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from capdistill.errors import ConfigError, suggest
from capdistill.teachers.huggingface.base import Encoded, EncoderDecoder

TASKS = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
}


class Florence2(EncoderDecoder):
    """Florence-2. The prompt is a task: "<CAPTION>", "<DETAILED_CAPTION>", ...

    Source:
        Xiao et al. (2024), "Florence-2". transformers, `Florence2ForConditionalGeneration`: the
        words of the task stand in the place of its name. Captions begin with
        `decoder_start_token_id`, then the `forced_bos_token_id` of the generation configuration.
    """

    model_class = "Florence2ForConditionalGeneration"
    prefix_tokens = 1

    def first_ids(self) -> list[int]:
        """Start tokens of the decoder; the task stands in the encoder.

        Raises:
            ConfigError: there is no such task.
        """
        task = self.prompt or "<CAPTION>"
        if task not in TASKS and re.fullmatch(r"<\w+>", task):
            raise ConfigError(
                f"Florence-2: the task {task!r} is no caption. {suggest(task, TASKS)}"
            )
        words, self.prompt = self.ids_of(TASKS.get(task, task)), None
        self.task_ids = [self.tokenizer.bos_token_id, *words, self.tokenizer.eos_token_id]
        return super().first_ids()

    def encode(self, images: Tensor) -> Encoded:
        """As for every adapter."""
        features = self.module.get_image_features(**self.pixels(images)).pooler_output  # (I, N, D)
        self.image_columns = slice(features.shape[1])
        ids = torch.tensor([self.task_ids] * len(images), device=images.device)
        words = self.module.get_input_embeddings()(ids)
        both = torch.cat([features.to(words), words], 1)
        states = self.module.model.language_model.encoder(inputs_embeds=both).last_hidden_state
        return Encoded({"features": features, "states": states})
