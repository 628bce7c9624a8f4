"""Pieces are joined as by the library tokenizers, without it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from capdistill.errors import ConfigError
from capdistill.tokenizers.joining import Joining, byte_alphabet

META = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
RULES = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "WordPiece", "prefix": "@@", "cleanup": False},
    META,
    {**META, "prepend_scheme": "never"},
    {**META, "prepend_scheme": "first"},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, META]},
    {"type": "Strip", "content": "a", "start": 1, "stop": 0},
    {"type": "Strip", "content": "b", "start": 0, "stop": 1},
]
FIXED = ["a", "aab", "Ġdog", "▁dog", "▁", "##s", "@@s", "dog</w>", ".", "n't", "'s", " do not"]
BYTES = ["<0x41>", "<0xE2>", "<0x96>", "<0x81>", "<0xc3>", "<0xA9>", "<0xZZ>", "<0x4>", "Ã", "©"]
WORDS = [*FIXED, *BYTES, "é日", "🐕", "Ġ▁ ", "  "]


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(deadline=None, max_examples=60)
@given(pieces=st.lists(st.sampled_from(WORDS), max_size=8))
def test_the_text_is_that_of_the_library(rule, pieces):
    theirs = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "a"))
    content = {**json.loads(theirs.to_str()), "decoder": rule}
    theirs = Tokenizer.from_str(json.dumps(content))
    assert Joining(rule)(pieces) == theirs.decode([WORDS.index(piece) for piece in pieces])


def test_the_alphabet_of_bytes_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"type": "CTC"}, r"decoder \{'type': 'CTC'\} is not known here.*Available: BPEDecoder"),
        ({"type": "Metaspaces"}, "Did you mean 'Metaspace'"),
        ({"type": "WordPiece", "prefix": 3}, "WordPiece has prefix=3; expected str"),
        ({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}, "only strings"),
    ],
)
def test_a_rule_that_is_not_known_is_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        Joining(rule)
