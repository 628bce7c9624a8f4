"""The contract of an adapter: how a family of Hugging Face captioners reads images and words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from capdistill.generation.decode import USUAL_SIZE

ALL = frozenset({"logits", "hidden", "features", "attention", "captions"})


@dataclass(frozen=True)
class Encoded:
    """What the text part of a model reads of I images.

    Args:
        values: Tensors with one row per image.
        kept: What an adapter has computed of exactly these rows.
    """

    values: dict[str, Tensor]
    kept: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the values."""
        return next((v.dtype for v in self.values.values() if v.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return next(iter(self.values.values())).device

    def repeat(self, k: int) -> Encoded:
        """Every image k times, side by side."""
        if k == 1:
            return self
        return Encoded({name: v.repeat_interleave(k, 0) for name, v in self.values.items()})


class Adapter:
    """How one family reads images and words. A new family is a subclass and its registration.

    Example:
        See `capdistill.teachers.huggingface.blip`, and "Write an adapter" in docs/teachers.md.

    Args:
        module: The model.
        processor: Its processor, or its image processor alone.
        tokenizer: Its tokenizer, of transformers.
        prompt: Text that the caption continues; None is the family's own prompt.

    Attributes:
        model_class: Name of the class in transformers that has the family's language-model head.
        knowledge: Which outputs it gives.
        reads_prompt_once: The images stand among the words (no cross-attention), so images and
            prompt are read once per image and kept in the cache for its captions.
        prefix_tokens: Leading visual tokens outside the grid; None if there is no grid.
        prompt_ids: (P,) ids that stand before the caption, its start token included.
        image_columns: The visual tokens among the columns of the attention.
        first_words: (V,) the id that the model reads for each id of a first word; None for itself.
    """

    model_class: ClassVar[str]
    knowledge: ClassVar[frozenset[str]] = ALL
    reads_prompt_once: bool = False
    prefix_tokens: int | None = None
    image_columns: Any = slice(None)
    first_words: Tensor | None = None

    def __init__(
        self, module: Any, processor: Any, tokenizer: Any, prompt: str | None = None
    ) -> None:
        self.module, self.processor, self.tokenizer = module, processor, tokenizer
        self.prompt = prompt
        self.prompt_ids = torch.tensor(self.first_ids())

    def first_ids(self) -> list[int]:
        """The ids before the caption: by default the model's start token, then the prompt."""
        starts = self.setting("decoder_start_token_id", "bos_token_id"), self.forced_start()
        return [*(i for i in starts if i is not None), *self.ids_of(self.prompt or "")]

    def forced_start(self) -> int | None:
        """The id that `generate` of the model forces after the start token."""
        token: int | None = self.setting("forced_bos_token_id")
        return token

    def encode(self, images: Tensor) -> Encoded:
        """(I, 3, H, W) uint8 images to what `read` needs of them; runs once per image."""
        raise NotImplementedError

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """One forward pass of the language model.

        Args:
            ids: (R, L) ids: prompt and caption, or those that follow what is in the cache.
            encoded: Of the R rows.
            keep: How many of the last logits are used.
            options: Those of the model's forward: its cache, which outputs it returns.

        Returns:
            The model's own output, with `logits` (R, L' >= keep, V).
        """
        raise NotImplementedError

    def features(self, encoded: Encoded) -> Tensor:
        """(I, N, D) of the encoder."""
        return encoded["features"]

    def end_ids(self) -> list[int]:
        """The ids that end a caption; the first is the end token."""
        value = self.setting("eos_token_id")
        return [value] if isinstance(value, int) else list(value or ())

    @property
    def reader(self) -> Any:
        """The module whose forward takes the cache."""
        return self.module

    def new_cache(self) -> Any:
        """An empty cache: of the words, and of image keys where the decoder attends to them."""
        from transformers import DynamicCache, EncoderDecoderCache

        if self.reads_prompt_once:
            return DynamicCache(config=self.module.config.get_text_config(decoder=True))
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    # What adapters share

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """What the model's image processor makes of (I, 3, H, W) uint8 images, on their device."""
        processor = getattr(self.processor, "image_processor", self.processor)
        made = processor(images=list(images), return_tensors="pt")
        return dict(made.to(images.device, dtype=self.module.dtype))

    def grey_image(self) -> Tensor:
        """(1, 3, S, S) uint8."""
        side = self.image_size or USUAL_SIZE
        return torch.full((1, 3, side, side), 127, dtype=torch.uint8, device=self.module.device)

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def setting(self, *names: str) -> Any:
        """The first of some settings that generation, the model or its text part has."""
        config = self.module.config
        places = (
            getattr(self.module, "generation_config", None),
            config,
            config.get_text_config(decoder=True),
        )
        values = (getattr(place, name, None) for name in names for place in places)
        return next((value for value in values if value is not None), None)

    def with_cache(self, cache: Any) -> dict[str, Any]:
        """The options of `read` for a cache; its name depends on the version of transformers."""
        return (
            {"use_cache": False} if cache is None else {"use_cache": True, self.cache_name: cache}
        )

    @cached_property
    def cache_name(self) -> str:
        """The name of the cache among the options of the model's forward."""
        known = inspect.signature(type(self.reader).forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images that the model reads; None if it reads any."""
        processor = getattr(self.processor, "image_processor", self.processor)
        sizes = [getattr(processor, name, None) for name in ("crop_size", "size")]
        sides = [dict(s).get("height") for s in sizes if isinstance(s, Mapping) or s is not None]
        config = self.module.config
        parts = [getattr(config, name, None) for name in ("vision_config", "encoder")]
        sides += [getattr(part, "image_size", None) for part in parts]
        return next((side for side in sides if isinstance(side, int)), None)


class EncoderDecoder(Adapter):
    """A model whose forward takes `encoder_outputs` and `decoder_input_ids`."""

    def read(self, ids: Tensor, encoded: Encoded, keep: int, **options: Any) -> Any:
        """As for every adapter; the decoder attends to the value "states"."""
        from transformers.modeling_outputs import BaseModelOutput

        cache = options.get(self.cache_name)
        seen = 0 if cache is None else cache.get_seq_length()
        return self.reader(
            decoder_input_ids=ids,
            decoder_attention_mask=ids.new_ones(len(ids), seen + ids.shape[1]),
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded["states"]),
            **options,
        )


@contextmanager
def answering(owner: Any, method: str, answer: Any) -> Iterator[None]:
    """Within the block, a method of an object returns what it has already computed, if anything."""
    if answer is None:
        yield
        return
    hooked = vars(owner).get(method)  # device_map replaces methods, too
    setattr(owner, method, lambda *_, **__: answer)
    try:
        yield
    finally:
        if hooked is None:
            delattr(owner, method)
        else:
            setattr(owner, method, hooked)
