"""Captioners by name: which encoder and decoder make them, and how large they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from capdistill import decoders, encoders
from capdistill.decoders.base import Decoder
from capdistill.encoders.base import Encoder
from capdistill.errors import UnknownName, suggest

__all__ = ["Preset", "Size", "describe", "names", "parts", "table"]


def __dir__() -> list[str]:
    return sorted(__all__)


@dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Example:
        >>> describe("debug_student").decoder
        'lstm'

    Args:
        description: One line.
        encoder, decoder: Names in the registries.
        encoder_kwargs, decoder_kwargs: Their arguments; the decoder's width in is the encoder's
            width out.
        random: True where pretrained weights are never wanted.
    """

    description: str
    encoder: str
    encoder_kwargs: Mapping[str, Any]
    decoder: str
    decoder_kwargs: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False


@dataclass(frozen=True)
class Size:
    """A row of `table`.

    Args:
        name, description: Of the preset.
        parameters: In all; `encoder` and `decoder` are its two parts.
        trainable: Those that are trained unless the encoder is unfrozen.
        tokens, dim: N and D, what the decoder looks at.
        image_size: Side in pixels.
    """

    name: str
    description: str
    parameters: int
    encoder: int
    decoder: int
    trainable: int
    tokens: int
    dim: int
    image_size: int


def names() -> list[str]:
    """All presets, teachers first.

    Example:
        >>> names()[0]
        'vit_transformer'
    """
    return list(_PRESETS)


def describe(name: str) -> Preset:
    """What a name stands for.

    Example:
        >>> describe("lite0_lstm").encoder_kwargs["name"]
        'tf_efficientnet_lite0'

    Raises:
        UnknownName: no such preset; the message lists them.
    """
    try:
        return _PRESETS[name]
    except (KeyError, TypeError):
        raise UnknownName(f"There is no preset {name!r}. {suggest(str(name), _PRESETS)}") from None


def parts(
    name: str,
    *,
    weights: bool | str | os.PathLike[str] = True,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> tuple[Encoder, Decoder]:
    """The encoder and the decoder of a preset; `Captioner.create` joins them with a tokenizer.

    Example:
        >>> encoder, decoder = parts("debug_student", encoder={"trainable": 1})
        >>> encoder.trunk_frozen
        False

    Args:
        name: For instance "vit_transformer" or "lite0_lstm".
        weights: Weights of the backbone: True (from the hub), False (random), or a local file.
            Debug presets are random unless a file is given.
        encoder, decoder: Arguments that replace or extend those of the preset.

    Raises:
        UnknownName: no such preset; the message lists them.
        CheckpointError: the weights cannot be found, read or fitted.
        ConfigError: an argument that is invalid.
    """
    preset = describe(name)
    if preset.random and weights is True:
        weights = False
    return _create(preset, weights, encoder, decoder)


def table(vocabulary: int = 3000) -> list[Size]:
    """Every preset's true size, counted on the meta device where timm can be built there.

    Example:
        >>> all(row.parameters == row.encoder + row.decoder for row in table(100))
        True

    Args:
        vocabulary: V, words and special tokens.
    """
    return [_size(name, preset, vocabulary) for name, preset in _PRESETS.items()]


def _create(
    preset: Preset,
    weights: bool | str | os.PathLike[str],
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> tuple[Encoder, Decoder]:
    options = {**preset.encoder_kwargs, "weights": weights, **(encoder or {})}
    built = encoders.create(preset.encoder, **options)
    options = {**preset.decoder_kwargs, "dim": built.dim, **(decoder or {})}
    return built, decoders.create(preset.decoder, **options)


def _built(preset: Preset, vocabulary: int) -> tuple[Encoder, Decoder]:
    encoder, decoder = _create(preset, weights=False)
    decoder.build(vocabulary)
    return encoder, decoder


def _size(name: str, preset: Preset, vocabulary: int) -> Size:
    encoders.get(preset.encoder), decoders.get(preset.decoder)  # imported off the meta device
    try:
        with torch.device("meta"):
            encoder, decoder = _built(preset, vocabulary)
    except (RuntimeError, NotImplementedError):  # older versions of timm read values while building
        encoder, decoder = _built(preset, vocabulary)
    of_encoder, of_decoder = list(encoder.parameters()), list(decoder.parameters())
    return Size(
        name=name,
        description=preset.description,
        parameters=sum(p.numel() for p in of_encoder + of_decoder),
        encoder=sum(p.numel() for p in of_encoder),
        decoder=sum(p.numel() for p in of_decoder),
        trainable=sum(p.numel() for p in of_encoder + of_decoder if p.requires_grad),
        tokens=encoder.tokens,
        dim=encoder.dim,
        image_size=encoder.image_size,
    )


def _vit(layers: int) -> Preset:
    words = "3 layers" if layers == 3 else "1 layer"
    return Preset(
        f"teacher: ViT-S/16, 197 x 384 tokens; Transformer 512, {words}",
        "timm",
        {"name": "vit_small_patch16_224"},
        "transformer",
        {"width": 512, "layers": layers, "heads": 8, "ffn": 2048},
    )


def _resnet(dim: int, hidden: int, layers: int, refine: str) -> Preset:
    refined = "refined" if refine != "none" else "not refined"
    return Preset(
        f"student: ResNet-50, 49 tokens, {refined}, projected to {dim}; LSTM {layers} x {hidden}",
        "torchvision",
        {"name": "resnet50", "dim": dim, "refine": refine},
        "lstm",
        {"hidden": hidden, "layers": layers, "dropout": 0.3, "tied": False},
    )


_PRESETS = {
    "vit_transformer": _vit(layers=3),
    "vit_transformer_small": _vit(layers=1),
    "resnet50_lstm": _resnet(256, 512, 2, "pre"),
    "resnet50_lstm_small": _resnet(128, 256, 1, "none"),
    "resnet50_lstm_large": _resnet(384, 768, 3, "pre"),
    "lite0_lstm": Preset(
        "small student: EfficientNet-lite0, 49 tokens projected to 256; LSTM 1 x 512, tied",
        "timm",
        {"name": "tf_efficientnet_lite0", "dim": 256},
        "lstm",
        {"embed": 256, "hidden": 512, "layers": 1, "tied": True},
    ),
    "debug_teacher": Preset(
        "tiny and random: test_vit; Transformer 128, 1 layer",
        "timm",
        {"name": "test_vit"},
        "transformer",
        {"width": 128, "layers": 1, "heads": 4, "ffn": 256},
        random=True,
    ),
    "debug_student": Preset(
        "tiny and random: test_efficientnet; LSTM 1 x 256",
        "timm",
        {"name": "test_efficientnet", "dim": 32},
        "lstm",
        {"embed": 128, "hidden": 256, "layers": 1},
        random=True,
    ),
}
