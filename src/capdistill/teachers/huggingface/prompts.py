"""Image and prompt of a prompted model as its inputs, with one row per image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REQUEST = "Describe the image in one short sentence."


def prompt_text(processor: Any, prompt: str | None) -> str:
    """The text that a processor reads for one image.

    A request is put into the chat template. Without one, and where the prompt holds the image token
    itself, it is the text: "caption en" is what PaliGemma was trained with.
    """
    tokens = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
    image = str(next(filter(None, tokens), "<image>"))
    if image in (prompt or ""):
        return str(prompt)
    if not getattr(processor, "chat_template", None):
        return image + (prompt or "caption en")
    content = [{"type": "image"}, {"type": "text", "text": prompt or REQUEST}]
    turns = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turns, add_generation_prompt=True))


def model_inputs(processor: Any, text: str, images: Tensor, module: Any) -> dict[str, Tensor]:
    """What the processor makes of (I, 3, H, W) uint8 images with one text, on their device.

    Images of one size and one text make rows of one length.
    """
    nested = [[image] for image in images]  # one image for each text
    made = processor(images=nested, text=[text] * len(images), return_tensors="pt")
    values = dict(made.to(images.device, dtype=module.dtype))
    for name in {"attention_mask", "labels"} & values.keys():
        del values[name]
    if caption_kind(module):  # not given by each version
        values["token_type_ids"] = torch.zeros_like(values["input_ids"])
    return values


def with_captions(values: dict[str, Tensor], ids: Tensor, module: Any) -> dict[str, Tensor]:
    """The inputs for prompts and captions (R, L) instead of prompts alone.

    A mask, although of ones, tells the models that positions of patches are no new sequences.
    """
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, kinds in values.items():
        if name.endswith("token_type_ids"):
            more = ids.shape[1] - kinds.shape[1]
            longer[name] = F.pad(kinds, (0, more), value=caption_kind(module))
    return {**values, **longer}


def caption_kind(module: Any) -> int:
    """The type of the caption's tokens: 1 for a PaliGemma, whose prompt sees all of itself."""
    return int(module.config.model_type.startswith("paligemma"))


def cut(value: Tensor, rows: int) -> Tensor:
    """(rows * n, ...) to (rows, n, ...)."""
    return value.view(rows, -1, *value.shape[1:])


def visual_tokens(found: Any, images: int) -> Tensor:
    """(I, N, D) of what `get_image_features` returns, which differs between models and versions."""
    tokens = getattr(found, "pooler_output", found)
    tokens = torch.cat(list(tokens)) if isinstance(tokens, (list, tuple)) else tokens
    return cut(tokens.flatten(0, -2), images)
