"""Encoder + decoder + tokenizer: what is trained, distilled, saved and asked for captions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capdistill import saved
from capdistill.decoders.base import Decoder
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError, IncompatibleModels
from capdistill.generation import Hypothesis, greedy
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.tokenizer import Tokenizer
from capdistill.weights import load_exactly, read_state_dict, strip_prefixes


class Captioner(nn.Module):
    """An image captioner made of three parts.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> isinstance(captioner.caption(image), str)
        True

    Args:
        encoder: Images to (I, N, D) tokens.
        decoder: Words given tokens of width D; it is built for the tokenizer's vocabulary here.
        tokenizer: Captions to ids and back.
        name: How messages call the model.

    Raises:
        IncompatibleModels: the encoder's width is not the one the decoder reads.
        ConfigError: the decoder already belongs to another vocabulary.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, tokenizer: Tokenizer, *, name: str = "captioner"
    ) -> None:
        super().__init__()
        if encoder.dim != decoder.dim:
            raise IncompatibleModels(
                f"The encoder gives tokens of width {encoder.dim} but the decoder reads width "
                f"{decoder.dim}. Create both with the same dim=, for instance dim={decoder.dim}."
            )
        decoder.build(len(tokenizer.vocabulary))
        self.encoder, self.decoder = encoder, decoder
        self.tokenizer, self.name = tokenizer, name

    @classmethod
    def create(
        cls,
        preset: str,
        *,
        tokenizer: Tokenizer,
        weights: bool | str | Path = True,
        encoder: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
    ) -> Captioner:
        """A preset by name; `capdistill models` lists them.

        Args:
            preset: For instance "vit_transformer" or "lite0_lstm".
            tokenizer: Its vocabulary sizes the decoder.
            weights: Of the encoder: True (from the hub), False (random), or a local file.
            encoder, decoder: Arguments that replace or join those of the preset.

        Raises:
            UnknownName: no such preset; the message lists them.
        """
        from capdistill import presets

        return presets.create(preset, tokenizer, weights=weights, encoder=encoder, decoder=decoder)

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """Teacher-forced logits for a batch, aligned with `batch.targets`."""
        features = self.encode(batch)
        out = self.decoder(batch.inputs, features, need)
        return CaptionerOutput(out.logits, out.hidden, features, out.attention, batch.target_mask)

    def encode(self, batch: Batch) -> Tensor:
        """(I, N, D) features of a batch, from cached trunk tokens where it carries ours.

        Raises:
            DataError: it carries neither pixels nor our tokens.
        """
        if batch.cached and (self.encoder.trunk_frozen or not torch.is_grad_enabled()):
            tokens = batch.cached.get(self.encoder.fingerprint() or "")
            if tokens is not None:
                return self.encoder.head(tokens.to(next(self.decoder.parameters()).dtype))
        if not batch.images.numel():
            raise DataError(
                f"{self.name}: the batch has no pixels, and no tokens of this encoder as it is now "
                "(its trunk is trained, or was changed since). Load it without cached features."
            )
        features: Tensor = self.encoder(batch.images)
        return features

    def generate(self, batch: Batch | Tensor, max_length: int | None = None) -> list[Hypothesis]:
        """One caption an image, greedily, in evaluation mode; training flags are restored.

        Args:
            batch: A batch, or (I, 3, H, W) uint8 images.
            max_length: Tokens at most; the tokenizer's limit and the end token unless given.

        Raises:
            ConfigError: max_length < 1.
        """
        if max_length is None:
            max_length = getattr(self.tokenizer, "max_length", 40) + 1
        with evaluating(self), torch.no_grad():
            features = self.encode(batch) if isinstance(batch, Batch) else self.encoder(batch)
            hypotheses = greedy(
                self.decoder,
                features,
                start_id=self.tokenizer.start_id,
                end_id=self.tokenizer.end_id,
                max_length=max_length,
                banned=self._never_said(),
            )
        return [replace(h, text=self.tokenizer.decode(h.tokens)) for h in hypotheses]

    def _never_said(self) -> list[int]:
        """Unknown, padding and start tokens are no words; the end token must stay possible."""
        ids = {getattr(self.tokenizer, key, None) for key in ("unk_id", "pad_id", "start_id")}
        return sorted(i for i in ids if i is not None and i != self.tokenizer.end_id)

    def caption(
        self, images: Any, *, max_length: int | None = None, batch_size: int = 32
    ) -> str | list[str]:
        """Caption a path, bytes, PIL image, array or tensor, or each of an iterable of them.

        Example:
            `student.caption("dog.jpg")` gives "a brown dog runs through the grass".

        Args:
            images: One image gives a text; an iterable of any length, or a (I, 3, H, W) array or
                tensor, gives a list of texts in its order.
            max_length: As for `generate`.
            batch_size: Images that are in memory, and in the model, at once.

        Raises:
            DataError: an image that can not be read, by name.
            ConfigError: batch_size or max_length < 1.
        """
        if batch_size < 1:
            raise ConfigError(f"caption: batch_size must be at least 1, got {batch_size}.")
        many = _is_many(images)
        texts: list[str] = []
        for chunk in _chunks(images if many else [images], batch_size):
            pixels = torch.stack([self._pixels(image) for image in chunk])
            texts += [h.text for h in self.generate(pixels.to(self.device), max_length)]
        return texts if many else texts[0]

    def _pixels(self, image: Any) -> Tensor:
        from capdistill.data.images import read_image
        from capdistill.data.transforms import centre_square

        return centre_square(read_image(image), self.encoder.image_size)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of parameters, shared ones once; only those that are trained on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """What losses and checks must know of this model."""
        return ModelSpec(
            feature_dim=self.encoder.dim,
            tokens=self.encoder.tokens,
            prefix_tokens=self.encoder.prefix_tokens,
            grid=self.encoder.grid,
            hidden_dims=self.decoder.hidden_dims,
            vocabulary=self.tokenizer.vocabulary,
            has_attention=self.decoder.has_attention,
            name=self.name,
        )

    def save(self, directory: str | Path, *, allow_unregistered: bool = False) -> None:
        """Write model.safetensors, captioner.json and the tokenizer; the directory loads alone.

        Arguments of the parts are kept as JSON: paths as strings, tuples and arrays as lists. A
        tokenizer that is not a `WordTokenizer` is not written: give it to `load`.

        Args:
            directory: Made where there is none.
            allow_unregistered: Save although a part was not made by a registry; `load` must then
                be given that part.

        Raises:
            ConfigError: a part was not made by a registry, or the directory can not be written.
        """
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "decoder": self.decoder}
        description = {
            "name": self.name,
            **{k: saved.describe_part(p, k, allow_unregistered) for k, p in parts.items()},
            "tokenizer": saved.describe_tokenizer(self.tokenizer),
        }
        saved.write(Path(directory), self, self.tokenizer, description)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
        device: str | torch.device = "cpu",
    ) -> Captioner:
        """Read what `save` wrote. Touches no hub, no teacher and no pickle.

        What wrappers add to names (`module.`, `_orig_mod.`, `model.`) is removed; everything else
        must fit exactly.

        Args:
            directory: As given to `save`.
            encoder, decoder: Parts that no registry could make again.
            tokenizer: The one it was trained with, where that is no `WordTokenizer`.
            device: Where the model goes.

        Raises:
            CheckpointError: a file is missing, truncated, or does not fit the parts.
        """
        directory = Path(directory)
        content = saved.read_description(directory)
        captioner = cls(
            saved.make_part(content, "encoder") if encoder is None else encoder,
            saved.make_part(content, "decoder") if decoder is None else decoder,
            saved.find_tokenizer(directory, content, tokenizer),
            name=content["name"],
        )
        path = directory / saved.WEIGHTS
        state = strip_prefixes(read_state_dict(path), captioner.state_dict())
        load_exactly(captioner, state, f"The weights in '{path}'")
        return captioner.to(device).eval()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own flag comes back after it."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training


def _is_many(images: Any) -> bool:
    """Whether this is an iterable of images rather than one image."""
    if isinstance(images, Tensor):
        return images.ndim == 4
    if hasattr(images, "__array__"):
        return getattr(images, "ndim", 3) == 4
    single = isinstance(images, (str, bytes, bytearray, os.PathLike)) or hasattr(images, "read")
    return not single and isinstance(images, Iterable)


def _chunks(items: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
