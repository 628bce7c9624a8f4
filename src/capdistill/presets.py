"""Captioners by name: their encoders, decoders and sizes.

Importing this module and printing the table load neither torch nor any model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capdistill.errors import ConfigError, UnknownName, shortened, suggest

if TYPE_CHECKING:
    from capdistill.decoders.base import Decoder
    from capdistill.encoders.base import Encoder

__all__ = ["Preset", "Size", "describe", "names", "parts", "table"]


def __dir__() -> list[str]:
    return sorted(__all__)


@dataclass(frozen=True)
class Counts:
    """Parameters of a preset, and the shape of its features.

    Args:
        encoder: Parameters of the encoder.
        head: Those of them that are trained while the trunk is frozen.
        decoder: Parameters of the decoder that do not depend on the vocabulary.
        per_word: Parameters that each entry of the vocabulary adds.
        tokens, dim: N and D, the features that the decoder reads.
        image_size: Side in pixels.
    """

    encoder: int
    head: int
    decoder: int
    per_word: int
    tokens: int
    dim: int
    image_size: int


@dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Example:
        >>> describe("debug_student").decoder
        'lstm'

    Args:
        description: One line.
        counts: Its size.
        encoder, decoder: Names in the registries.
        encoder_kwargs, decoder_kwargs: Their arguments; the decoder's input width is the encoder's
            output width.
        random: True if the preset never uses pretrained weights.
    """

    description: str
    counts: Counts
    encoder: str
    encoder_kwargs: Mapping[str, Any]
    decoder: str
    decoder_kwargs: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False


@dataclass(frozen=True)
class Size:
    """A row of `table`.

    Args:
        name, description: Name and description of the preset.
        parameters: Total number; `encoder` and `decoder` are its two parts.
        trainable: Those that are trained unless the encoder is unfrozen.
        tokens, dim: N and D, the features that the decoder reads.
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
    from capdistill import decoders, encoders

    for kind, given in {"encoder": encoder, "decoder": decoder}.items():
        if not isinstance(given, Mapping | None):
            raise ConfigError(
                f"{name}: {kind}={shortened(given)} was given; expected its arguments by name, "
                'such as {"dim": 256}. Make a captioner of other parts by Captioner(...).'
            )
    preset = describe(name)
    if preset.random and weights is True:
        weights = False
    options = {**preset.encoder_kwargs, "weights": weights, **(encoder or {})}
    made = encoders.create(preset.encoder, **options)
    options = {**preset.decoder_kwargs, "dim": made.dim, **(decoder or {})}
    return made, decoders.create(preset.decoder, **options)


def table(vocabulary: int = 3000) -> list[Size]:
    """The size of every preset, computed from stored counts: no model is built.

    Example:
        >>> all(row.parameters == row.encoder + row.decoder for row in table(100))
        True

    Args:
        vocabulary: V, words and special tokens.
    """
    rows = []
    for name, preset in _PRESETS.items():
        counts = preset.counts
        decoder = counts.decoder + counts.per_word * vocabulary
        size = Size(
            name=name,
            description=preset.description,
            parameters=counts.encoder + decoder,
            encoder=counts.encoder,
            decoder=decoder,
            trainable=counts.head + decoder,
            tokens=counts.tokens,
            dim=counts.dim,
            image_size=counts.image_size,
        )
        rows.append(size)
    return rows


def _vit(layers: int, decoder: int) -> Preset:
    words = "3 layers" if layers == 3 else "1 layer"
    return Preset(
        f"teacher: ViT-S/16, 197 x 384 tokens; Transformer 512, {words}",
        Counts(21_665_664, 0, decoder, 512, 197, 384, 224),
        "timm",
        {"name": "vit_small_patch16_224"},
        "transformer",
        {"width": 512, "layers": layers, "heads": 8, "ffn": 2048},
    )


def _resnet(hidden: int, layers: int, refine: str, counts: Counts) -> Preset:
    refined = "refined" if refine != "none" else "not refined"
    return Preset(
        f"student: ResNet-50, 49 tokens, {refined}, projected to {counts.dim}; "
        f"LSTM {layers} x {hidden}",
        counts,
        "torchvision",
        {"name": "resnet50", "dim": counts.dim, "refine": refine},
        "lstm",
        {"hidden": hidden, "layers": layers, "dropout": 0.3, "tied": False},
    )


_PRESETS = {
    "vit_transformer": _vit(3, 12_482_560),
    "vit_transformer_small": _vit(1, 4_336_640),
    "resnet50_lstm": _resnet(
        512, 2, "pre", Counts(25_289_024, 1_780_992, 5_909_760, 769, 49, 256, 224)
    ),
    "resnet50_lstm_small": _resnet(
        256, 1, "none", Counts(23_774_400, 266_368, 887_936, 513, 49, 128, 224)
    ),
    "resnet50_lstm_large": _resnet(
        768, 3, "pre", Counts(26_321_856, 2_813_824, 18_211_200, 1025, 49, 384, 224)
    ),
    "lite0_lstm": Preset(
        "small student: EfficientNet-lite0, 49 tokens projected to 256; LSTM 1 x 512, tied",
        Counts(3_701_504, 330_496, 2_824_192, 257, 49, 256, 224),
        "timm",
        {"name": "tf_efficientnet_lite0", "dim": 256},
        "lstm",
        {"embed": 256, "hidden": 512, "layers": 1, "tied": True},
    ),
    "debug_teacher": Preset(
        "tiny and random: test_vit; Transformer 128, 1 layer",
        Counts(306_240, 0, 199_168, 128, 101, 64, 160),
        "timm",
        {"name": "test_vit"},
        "transformer",
        {"width": 128, "layers": 1, "heads": 4, "ffn": 256},
        random=True,
    ),
    "debug_student": Preset(
        "tiny and random: test_efficientnet; LSTM 1 x 128",
        Counts(107_932, 8_736, 140_704, 65, 25, 32, 160),
        "timm",
        {"name": "test_efficientnet", "dim": 32},
        "lstm",
        {"embed": 64, "hidden": 128, "layers": 1},
        random=True,
    ),
}
