"""The oracle: each family's own public forward, called for one beginning of one caption."""

from __future__ import annotations

import torch
from PIL import Image

ASK = "Describe the image in one short sentence."


def picture(image):
    """A uint8 tensor as Pillow's image, which processors are made for."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def seen(processor, image):
    own = getattr(processor, "image_processor", processor)
    return own(images=picture(image), return_tensors="pt")["pixel_values"]


def ids(*values):
    return torch.tensor([[int(value) for value in values]], dtype=torch.int64)


def vision_encoder_decoder(module, processor, image, words, **more):
    pixels = seen(processor, image)
    return module(pixel_values=pixels, decoder_input_ids=ids(0, *words), **more)


def blip(module, processor, image, words, **more):
    start = module.config.text_config.bos_token_id
    return module(pixel_values=seen(processor, image), input_ids=ids(start, *words), **more)


def git(module, processor, image, words, **more):
    return module(pixel_values=seen(processor, image), input_ids=ids(2, *words), **more)


def blip2_opt(module, processor, image, words, **more):
    return module(pixel_values=seen(processor, image), input_ids=ids(3, 3, 3, 1, *words), **more)


def blip2_t5(module, processor, image, words, **more):
    return module(
        pixel_values=seen(processor, image),
        input_ids=ids(3, 3, 3, 1),
        decoder_input_ids=ids(0, *words),
        **more,
    )


def florence2(module, processor, image, words, **more):
    inputs = processor(images=picture(image), text="<CAPTION>", return_tensors="pt")
    return module(
        pixel_values=inputs["pixel_values"],
        input_ids=inputs["input_ids"],
        decoder_input_ids=ids(2, 0, *words),
        **more,
    )


def prompted(text, kind=0):
    """A model that continues a text; `kind` marks what stands behind it."""

    def call(module, processor, image, words, **more):
        inputs = dict(processor(images=[picture(image)], text=[text], return_tensors="pt"))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                mark = {"attention_mask": 1, "token_type_ids": kind}.get(name, 0)
                last = words if name == "input_ids" else [mark] * len(words)
                inputs[name] = torch.cat([inputs[name], ids(*last)], 1)
        inputs.pop("labels", None)
        return module(**inputs, use_cache=False, **more)

    return call


QWEN = (
    f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{ASK}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
FAMILIES = {
    "vision_encoder_decoder": vision_encoder_decoder,
    "blip": blip,
    "git": git,
    "blip2_opt": blip2_opt,
    "blip2_t5": blip2_t5,
    "florence2": florence2,
    "smolvlm": prompted(f"User:<image>{ASK}<end_of_utterance>\nAssistant:"),
    "smolvlm_tiles": prompted(f"User:<image>{ASK}<end_of_utterance>\nAssistant:"),
    "qwen2_vl": prompted(QWEN),
    "qwen3_vl": prompted(QWEN),
    "paligemma": prompted("<image>caption en", kind=1),
    "llava": prompted("<image>caption en"),
    "gemma3": prompted("<start_of_image>caption en"),
}


SPACED = {"smolvlm", "smolvlm_tiles", "llava", "gemma3"}  # their prompts end with a word


def spaced(family, processor):
    """Id of a word as a text begins with it <-> id of the same word behind a space."""
    table = {}
    vocabulary = processor.tokenizer.get_vocab() if family in SPACED else {}
    for piece, index in vocabulary.items():
        other = vocabulary.get("Ġ" + piece)
        if other is not None and piece[0] != "Ġ":
            table |= {index: other, other: index}
    return table


@torch.no_grad()
def logits(family, module, processor, image, words):
    """(V,) logits of what follows some words."""
    table = spaced(family, processor)
    words = [*(table.get(first, first) for first in words[:1]), *words[1:]]
    found = FAMILIES[family](module, processor, image, words).logits[0, -1]
    return found if words else found[[table.get(i, i) for i in range(len(found))]]


@torch.no_grad()
def hidden(family, module, processor, image, words):
    """The states of the language model's layers at the last word."""
    call, table = FAMILIES[family], spaced(family, processor)
    words = [*(table.get(first, first) for first in words[:1]), *words[1:]]
    output = call(module, processor, image, words, output_hidden_states=True)
    if family == "blip":  # the output has those of the image
        states = module.text_decoder(
            input_ids=ids(module.config.text_config.bos_token_id, *words),
            encoder_hidden_states=output.image_embeds,
            output_hidden_states=True,
        ).hidden_states
    elif family.startswith("blip2"):
        inner = output.language_model_outputs
        states = inner.get("decoder_hidden_states") or inner.get("hidden_states")
    else:
        states = output.get("decoder_hidden_states") or output.get("hidden_states")
    return [layer[0, -1] for layer in states[1:]]
