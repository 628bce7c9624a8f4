"""A part that lacks an attribute is named when the captioner is made, not somewhere in training."""

from __future__ import annotations

import re

import pytest
from torch import nn

from capdistill import Captioner, decoders
from capdistill.errors import ConfigError

from .toy_captioner import LetterTokenizer, Patches, tokenizer


def decoder(dim: int = 8):
    return decoders.create("lstm", dim=dim, embed=6, hidden=8, layers=1, heads=2)


class Forgetful(Patches):
    """Lacks one attribute."""

    missing = "dim"

    def __getattribute__(self, name):
        if name == type(self).missing:
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "name", ["dim", "tokens", "prefix_tokens", "grid", "image_size", "mean", "std", "trunk"]
)
def test_a_missing_attribute_of_an_encoder_is_named(name, monkeypatch):
    encoder = Forgetful()
    monkeypatch.setattr(Forgetful, "missing", name)
    message = rf"The encoder Forgetful has no attribute '{name}'\. An Encoder needs it: "
    with pytest.raises(ConfigError, match=message):
        Captioner(encoder, decoder(), tokenizer())


def test_a_plain_module_is_no_encoder():
    with pytest.raises(ConfigError, match=r"The encoder Linear has no attribute 'dim'"):
        Captioner(nn.Linear(1, 1), decoder(), tokenizer())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dim", "8", r"Patches.dim is '8'; expected D, the width"),
        ("dim", True, "Patches.dim is True"),
        ("tokens", 0, "Patches.tokens is 0; expected N"),
        ("image_size", (8, 8), r"Patches.image_size is \(8, 8\); expected the side in pixels"),
        ("grid", 4, r"Patches.grid is 4; expected \(h, w\), or None"),
        ("mean", 0.5, "Patches.mean is 0.5; expected one number per channel"),
        ("prefix_tokens", 1, r"4 tokens, but prefix_tokens=1 and a grid of 2 x 2 make 5"),
        ("grid", (2, 3), r"4 tokens, but prefix_tokens=0 and a grid of 2 x 3 make 6"),
    ],
)
def test_an_attribute_of_another_kind_is_named_with_its_value(name, value, message):
    encoder = Patches()
    setattr(encoder, name, value)
    with pytest.raises(ConfigError, match=message):
        Captioner(encoder, decoder(), tokenizer())


@pytest.mark.parametrize("name", ["dim", "hidden_dims"])
def test_a_missing_attribute_of_a_decoder_is_named(name):
    given = decoder()
    delattr(given, name)
    message = rf"The decoder LSTMDecoder has no attribute '{name}'\. A Decoder needs it: "
    with pytest.raises(ConfigError, match=message):
        Captioner(Patches(), given, tokenizer())


@pytest.mark.parametrize("value", [8, ("8",), None])
def test_widths_of_another_kind_are_named(value):
    given = decoder()
    given.hidden_dims = value
    message = re.escape(f"LSTMDecoder.hidden_dims is {value!r}; expected a tuple of widths")
    with pytest.raises(ConfigError, match=message):
        Captioner(Patches(), given, tokenizer())


def test_a_missing_attribute_of_a_tokenizer_is_named():
    class Endless(LetterTokenizer):
        end_id = None

    with pytest.raises(ConfigError, match=r"Endless.end_id is None; expected the id of the end"):
        Captioner(Patches(), decoder(), Endless())
    with pytest.raises(ConfigError, match=r"The tokenizer object has no attribute 'vocabulary'"):
        Captioner(Patches(), decoder(), object())


def test_a_class_or_a_name_in_place_of_a_part_is_refused():
    with pytest.raises(ConfigError, match="encoder= was given the class Patches"):
        Captioner(Patches, decoder(), tokenizer())
    with pytest.raises(ConfigError, match="decoder= was given 'lstm'"):
        Captioner(Patches(), "lstm", tokenizer())
