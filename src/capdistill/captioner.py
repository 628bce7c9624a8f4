"""`Captioner`: encoder, decoder and tokenizer as one model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capdistill import saving
from capdistill.decoders.base import Decoder, require_decoder
from capdistill.encoders.base import Encoder, require_encoder
from capdistill.errors import CheckpointError, ConfigError, DataError, IncompatibleModels, suggest
from capdistill.files import user_path
from capdistill.generation.decode import CaptionGenerator
from capdistill.int8 import Ranges, read_ranges
from capdistill.outputs import FEATURES_ONLY, OUTPUTS, Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import isolated
from capdistill.tokenizer import Tokenizer, require_tokenizer


class Captioner(CaptionGenerator):
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

    Attributes:
        activation_ranges: Lowest and highest values of inputs and outputs of convolutions, if
            training with `quantize` has found them; see `FakeQuantizer`. They are saved with it.

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
        self.activation_ranges: Ranges | None = None

    def __repr__(self) -> str:
        encoder, decoder, words = self.encoder, self.decoder, len(self.tokenizer.vocabulary)
        return (
            f"Captioner '{self.name}': {type(encoder).__name__} ({encoder.tokens} tokens x "
            f"{encoder.dim}) + {type(decoder).__name__}, {words:,} vocabulary entries, "
            f"{self.num_parameters():,} parameters ({self.num_parameters(True):,} trainable)"
        )

    @classmethod
    @torch.inference_mode(False)  # weights that are made in it could not be trained
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
        if isinstance(need, str) or not isinstance(need, Collection):
            raise ConfigError(f"need={need!r}: expected a set of names, such as {{'features'}}.")
        if not OUTPUTS.issuperset(need):
            unknown = min(set(need) - OUTPUTS)
            raise ConfigError(f"need: there is no output '{unknown}'. {suggest(unknown, OUTPUTS)}")
        features = self.encode(batch)
        if need == FEATURES_ONLY:
            return CaptionerOutput(features=features, mask=batch.target_mask)
        inputs = batch.inputs if input_fn is None else input_fn(batch, features)
        out = self.decoder(inputs, features, need)
        return CaptionerOutput(out.logits, out.hidden, features, out.attention, batch.target_mask)

    def encode(self, batch: Batch | Tensor) -> Tensor:
        """(I, N, D) features of a batch, from cached values if it has those of this encoder.

        Args:
            batch: A batch, or (I, 3, H, W) uint8 images.

        Raises:
            DataError: it carries neither pixels nor cached values of this encoder, or is no batch.
        """
        if isinstance(batch, Tensor):
            return self.encoder(batch)  # type: ignore[no-any-return]
        if not isinstance(batch, Batch):
            raise DataError(
                f"{self.name}: {type(batch).__name__} was given; expected a Batch, as "
                "capdistill.data.Loader gives them."
            )
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

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Tensor]:
        """The decoder, and the features that it reads."""
        require_loaded(self)
        return self.decoder, self.encode(images)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it reads."""
        return int(self.encoder.image_size)

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
            tokenizer=self.tokenizer,
        )

    def save(self, directory: str | Path, *, allow_unregistered: bool = False) -> None:
        """Write model.safetensors, captioner.json and tokenizer.json: all of them, or none.

        Arguments of the parts are kept as JSON. A tokenizer of another class than
        those of `capdistill.tokenizers` is not written: pass it to `load`.

        Args:
            directory: Created if it does not exist.
            allow_unregistered: Save a part that no registry created; pass it to `load`.

        Raises:
            ConfigError: a part was not made by a registry, or the directory cannot be written.
        """
        require_loaded(self)
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "decoder": self.decoder}
        description = {
            "name": self.name,
            **{k: saving.describe_part(p, k, allow_unregistered) for k, p in parts.items()},
            "tokenizer": saving.describe_tokenizer(self.tokenizer),
        }
        if self.activation_ranges is not None:
            description["activation_ranges"] = self.activation_ranges
        saving.write(user_path(directory), self, self.tokenizer, description)

    @classmethod
    @isolated(torch.float32)
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
            tokenizer: The tokenizer it was trained with, unless it is in the directory.
            device: Device of the loaded model.

        Raises:
            CheckpointError: a file is missing, truncated, or does not fit the parts.
        """
        directory = user_path(directory, CheckpointError)
        content = saving.read_description(directory)
        captioner = cls(
            saving.make_part(content, "encoder", directory) if encoder is None else encoder,
            saving.make_part(content, "decoder", directory) if decoder is None else decoder,
            saving.find_tokenizer(directory, content, tokenizer),
            name=content["name"],
        )
        saving.load_weights(directory, content, captioner)
        captioner.activation_ranges = read_ranges(content.get("activation_ranges"), directory)
        return captioner.to(device).eval()


def require_loaded(captioner: Captioner) -> None:
    """Refuse a captioner some of whose weights are loaded only while a part of it runs.

    Raises:
        ConfigError: with such a weight.
    """
    away = [key for key, value in captioner.named_parameters() if value.is_meta]
    if away and not any(hasattr(part, "_hf_hook") for part in captioner.modules()):
        raise ConfigError(
            f"'{captioner.name}' was made on the device 'meta', where weights such as {away[0]} "
            "have no values. Make it on another one: torch.set_default_device('cpu')."
        )
    if away:
        raise ConfigError(
            f"'{captioner.name}': weights such as {away[0]} lie on the device "
            "'meta': device_map= has put them on a disk or in another memory, and loads them for "
            "the forward pass of their own part alone. A capdistill.Captioner reads weights "
            "outside of it. Place it on devices without offloading, shard it by fully_shard(...), "
            "or cache its targets on a machine that holds it."
        )
