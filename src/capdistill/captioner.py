"""`Captioner`: encoder, decoder and tokenizer as one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from capdistill import saving
from capdistill.data.images import is_many, read_batches
from capdistill.decoders.base import Decoder, require_decoder
from capdistill.encoders.base import Encoder, require_encoder
from capdistill.errors import CheckpointError, ConfigError, DataError, IncompatibleModels, suggest
from capdistill.files import user_path
from capdistill.generation.config import (
    CaptionOptions,
    DecodingOptions,
    GenerationConfig,
    GenerationOptions,
    GenerationSpec,
    resolve,
)
from capdistill.generation.decode import generate_text
from capdistill.generation.hypotheses import CaptionResult, Hypothesis
from capdistill.outputs import FEATURES_ONLY, OUTPUTS, Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import inference
from capdistill.tokenizer import Tokenizer, pad_batch, require_tokenizer

OneImage: TypeAlias = "str | os.PathLike[str] | bytes"
SeveralImages: TypeAlias = "list[str] | list[Path] | list[bytes]"


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
        decoder: Reads tokens of width D; it is built here for the tokenizer's vocabulary.
        tokenizer: Captions to ids and back.
        name: Name of the model in messages.

    Raises:
        IncompatibleModels: the encoder's width is not the one the decoder reads.
        ConfigError: a part lacks an attribute, or the decoder belongs to another vocabulary.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, tokenizer: Tokenizer, *, name: str = "captioner"
    ) -> None:
        super().__init__()
        require_encoder(encoder)
        require_decoder(decoder)
        require_tokenizer(tokenizer)
        if encoder.dim != decoder.dim:
            raise IncompatibleModels(
                f"The encoder gives tokens of width {encoder.dim} but the decoder reads width "
                f"{decoder.dim}. Create both with the same dim=, for instance dim={decoder.dim}."
            )
        decoder.build(len(tokenizer.vocabulary))
        self.encoder, self.decoder = encoder, decoder
        self.tokenizer, self.name = tokenizer, name

    def __repr__(self) -> str:
        encoder, decoder, words = self.encoder, self.decoder, len(self.tokenizer.vocabulary)
        return (
            f"Captioner '{self.name}': {type(encoder).__name__} ({encoder.tokens} tokens x "
            f"{encoder.dim}) + {type(decoder).__name__}, {words:,} vocabulary entries, "
            f"{self.num_parameters():,} parameters ({self.num_parameters(True):,} trainable)"
        )

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
            weights: Weights of the encoder: True (from the hub), False (random), or a local file.
            encoder, decoder: Arguments that replace or extend those of the preset.

        Raises:
            UnknownName: no such preset; the message lists them.
        """
        from capdistill import presets

        parts = presets.parts(preset, weights=weights, encoder=encoder, decoder=decoder)
        return cls(*parts, tokenizer, name=preset)

    def forward(
        self,
        batch: Batch,
        need: frozenset[str] = frozenset(),
        input_fn: Callable[[Batch, Tensor], Tensor] | None = None,
    ) -> CaptionerOutput:
        """Teacher-forced outputs for a batch, aligned with `batch.targets`.

        Args:
            batch: B = I * k captions.
            need: What the caller will use, of "logits", "features", "hidden" and "attention".
                Logits and features are there in any case, the other two only on request. But
                {"features"} means features alone: the decoder does not run, and logits are None.
            input_fn: `input_fn(batch, features)` gives the (B, T - 1) ids that the decoder reads;
                those of the batch by default.

        Raises:
            ConfigError: `need` names something else.
        """
        if not OUTPUTS.issuperset(need):
            unknown = min(set(need) - OUTPUTS)
            raise ConfigError(f"need: there is no output '{unknown}'. {suggest(unknown, OUTPUTS)}")
        features = self.encode(batch)
        if need == FEATURES_ONLY:
            return CaptionerOutput(features=features, mask=batch.target_mask)
        inputs = batch.inputs if input_fn is None else input_fn(batch, features)
        out = self.decoder(inputs, features, need)
        return CaptionerOutput(out.logits, out.hidden, features, out.attention, batch.target_mask)

    def encode(self, batch: Batch) -> Tensor:
        """(I, N, D) features of a batch, from cached values if it has those of this encoder.

        Raises:
            DataError: it carries neither pixels nor cached values of this encoder.
        """
        if batch.cached:
            dtype = next(self.decoder.parameters()).dtype
            tokens = self.encoder.tokens_from(batch.cached, dtype)
            if tokens is not None:
                return self.encoder.head(tokens)
        if not batch.images.numel():
            raise DataError(
                f"{self.name}: the batch has no pixels, and no tokens of this encoder as it is now "
                "(its frozen stages are trained, or were changed since). Load it without cached "
                "features."
            )
        features: Tensor = self.encoder(batch.images)
        return features

    def generate(
        self,
        batch: Batch | Tensor,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Hypothesis]:
        """One caption per image, greedily by default; training flags are restored.

        Example:
            `captioner.generate(batch, beam_size=3, no_repeat_ngram=3)`

        Args:
            batch: A batch, or (I, 3, H, W) uint8 images.
            generation: A whole configuration.
            options: Fields of `GenerationConfig`; they override those of `generation`.

        Raises:
            ConfigError: invalid options.
        """
        spec = self._generation_spec(generation, **options)
        with inference(self):
            features = self.encode(batch) if isinstance(batch, Batch) else self.encoder(batch)
            return generate_text(self.decoder, features, self.tokenizer, spec, batch)

    @overload
    def caption(
        self, images: OneImage, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> str: ...
    @overload
    def caption(
        self, images: OneImage, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> CaptionResult: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> list[str]: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> list[CaptionResult]: ...
    @overload
    def caption(
        self,
        images: Any,
        *,
        details: bool = ...,
        errors: Literal["raise", "skip"] = ...,
        **how: Unpack[CaptionOptions],
    ) -> Any: ...

    def caption(
        self,
        images: Any,
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        progress: bool = False,
        **generation: Any,
    ) -> Any:
        """Caption a path, bytes, PIL image, array or tensor, or each of an iterable of them.

        Example:
            `student.caption("dog.jpg")` gives "a brown dog runs through the grass", and
            `student.caption(paths, beam_size=3, errors="skip")` a list of such.

        Args:
            images: One image gives a text; an iterable of any length, or a (I, 3, H, W) array or
                tensor, gives a list of texts in the same order.
            batch_size: Images in memory, and in the model, at once.
            errors: For an image that cannot be read: "raise", or "skip", which names it in a
                warning and puts None in its place.
            details: Return a `CaptionResult` (log-probabilities, n-best, attention) per image.
            progress: Show a bar.
            generation: As for `generate`: `beam_size=3`, `max_length=20`, `generation=config`, ...

        Raises:
            DataError: an image that cannot be read, by name.
            ConfigError: batch_size < 1, or invalid options of `generate`.
        """
        many = is_many(images)
        wanted: dict[str, Any] = {"batch_size": batch_size, "errors": errors, "details": details}
        stream = self.caption_stream(images if many else [images], **wanted, **generation)
        if not many:
            return next(stream)
        return list(_bar(stream, images) if progress else stream)

    def caption_stream(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        **generation: Unpack[DecodingOptions],
    ) -> Iterator[Any]:
        """As `caption` for an iterable; each caption comes as soon as its batch is done.

        Nothing is kept: the iterable may be endless (a camera, a queue).

        Example:
            `for text in student.caption_stream(frames, batch_size=1): print(text)`
        """
        spec = self._generation_spec(**generation)
        for squares in read_batches(images, self.image_size, batch_size, errors):
            readable = [square for square in squares if square is not None]
            made = iter(_caption(self, torch.stack(readable), spec, details) if readable else ())
            yield from (None if square is None else next(made) for square in squares)

    def _generation_spec(
        self, generation: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> GenerationSpec:
        return GenerationSpec.of(resolve(generation, options), self.tokenizer)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it reads."""
        return int(self.encoder.image_size)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of parameters, shared ones once; only those that are trained on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification of this model, for losses and checks."""
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
        """Write model.safetensors, captioner.json and tokenizer.json: all of them, or none.

        Arguments of the parts are kept as JSON. A tokenizer that is not a `WordTokenizer` is not
        written: pass it to `load`.

        Args:
            directory: Created if it does not exist.
            allow_unregistered: Save a part that no registry created; pass it to `load`.

        Raises:
            ConfigError: a part was not made by a registry, or the directory cannot be written.
        """
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "decoder": self.decoder}
        description = {
            "name": self.name,
            **{k: saving.describe_part(p, k, allow_unregistered) for k, p in parts.items()},
            "tokenizer": saving.describe_tokenizer(self.tokenizer),
        }
        saving.write(user_path(directory), self, self.tokenizer, description)

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
        """Read what `save` wrote, without a hub, a teacher or pickle.

        Prefixes of wrappers (`module.`, `_orig_mod.`, `model.`) are removed from the names of
        weights; everything else must fit exactly.

        Args:
            directory: As given to `save`.
            encoder, decoder: Parts that were not created by a registry.
            tokenizer: The tokenizer it was trained with, unless it is a `WordTokenizer`.
            device: Device of the loaded model.

        Raises:
            CheckpointError: a file is missing, truncated, or does not fit the parts.
        """
        directory = user_path(directory, CheckpointError)
        content = saving.read_description(directory)
        captioner = cls(
            saving.make_part(content, "encoder") if encoder is None else encoder,
            saving.make_part(content, "decoder") if decoder is None else decoder,
            saving.find_tokenizer(directory, content, tokenizer),
            name=content["name"],
        )
        saving.load_weights(directory, content, captioner)
        return captioner.to(device).eval()


def _bar(stream: Iterator[Any], images: Any) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(stream, total=length_hint(images) or None, desc="captioning", unit="image")


def _caption(
    captioner: Captioner, pixels: Tensor, spec: GenerationSpec, details: bool
) -> Sequence[str | CaptionResult]:
    """(I, 3, S, S) uint8 images to texts, or to detailed results."""
    decoder, tokenizer = captioner.decoder, captioner.tokenizer
    pixels = pixels.to(captioner.device)
    with inference(captioner):
        features = captioner.encoder(pixels)  # (I, N, D)
        hypotheses = generate_text(decoder, features, tokenizer, spec, pixels)
        if not details:
            return [hypothesis.text for hypothesis in hypotheses]
        attention = _attention(captioner, features, hypotheses)
    return [
        _result(captioner, hypothesis, weights, square)
        for hypothesis, weights, square in zip(hypotheses, attention, pixels.cpu(), strict=True)
    ]


def _result(
    captioner: Captioner, hypothesis: Hypothesis, attention: Tensor | None, pixels: Tensor
) -> CaptionResult:
    vocabulary = captioner.tokenizer.vocabulary
    return CaptionResult(
        text=hypothesis.text,
        tokens=tuple(vocabulary[token] for token in hypothesis.tokens),
        log_prob=hypothesis.log_prob,
        token_log_probs=hypothesis.token_log_probs,
        finished=hypothesis.finished,
        n_best=hypothesis.n_best or (hypothesis,),
        attention=attention,
        grid=captioner.encoder.grid,
        prefix_tokens=captioner.encoder.prefix_tokens,
        image=pixels,
    )


def _attention(
    captioner: Captioner, features: Tensor, hypotheses: Sequence[Hypothesis]
) -> list[Tensor | None]:
    """(T, N) attention of each caption's tokens, from the decoder's `forward`; None without any."""
    tokenizer = captioner.tokenizer
    rows = [[tokenizer.start_id, *hypothesis.tokens] for hypothesis in hypotheses]
    ids = pad_batch(rows, tokenizer.pad_id)[0].to(features.device)  # (I, T + 1)
    weights = captioner.decoder(ids, features, frozenset({"attention"})).attention
    if weights is None:  # a decoder without attention
        return [None] * len(hypotheses)
    pairs = zip(weights.float().cpu(), hypotheses, strict=True)
    return [each[: len(hypothesis.tokens)] for each, hypothesis in pairs]  # (T, N)
