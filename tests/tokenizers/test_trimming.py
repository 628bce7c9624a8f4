"""Trimming on random vocabularies of two and three letters, over all short words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import capdistill as cd
from capdistill.tokenizers.trimming import Speller

LETTERS = "abc"
WORDS = ["".join(w) for n in range(1, 5) for w in itertools.product(LETTERS, repeat=n)]
END = "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@st.composite
def byte_pairs(draw: st.DrawFn) -> Tokenizer:
    """Merges in random order: also of pieces that exist only later, or by several ways."""
    pieces, merges = [*LETTERS], []
    for _ in range(draw(st.integers(1, 9))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        merges.append(pair)
        pieces += [joined for joined in ["".join(pair)] if joined not in pieces]
    merges = list(dict.fromkeys(draw(st.permutations(merges))))
    vocabulary = {piece: index for index, piece in enumerate([END, *pieces])}
    whole = draw(st.booleans())
    return _made(models.BPE(vocabulary, merges, ignore_merges=whole), decoders.Fuse())


@st.composite
def unigrams(draw: st.DrawFn) -> Tokenizer:
    """Pieces with few different scores, so that there are ties; letters may lack a piece."""
    pieces = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12, unique=True))
    letters = draw(st.sampled_from([LETTERS, "ab", "", LETTERS]))
    scores = st.sampled_from([-1.0, -2.0, -3.0, -4.5])
    entries = [(piece, draw(scores)) for piece in dict.fromkeys([*letters, *pieces])]
    fallback = draw(st.booleans())
    bytes_ = [(piece, -9.0) for piece in BYTES] if fallback else []
    model = models.Unigram([("<unk>", 0.0), (END, 0.0), *entries, *bytes_], 0, fallback)
    return _made(model, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))


@st.composite
def word_pieces(draw: st.DrawFn) -> Tokenizer:
    """Pieces at the start of words and within; letters may lack either."""
    inside = [f"##{word}" for word in WORDS]
    drawn = draw(st.lists(st.sampled_from([*WORDS, *inside]), max_size=14, unique=True))
    letters = draw(st.sampled_from([[*LETTERS, *(f"##{c}" for c in LETTERS)], [*LETTERS], []]))
    pieces = dict.fromkeys(["[UNK]", END, *letters, *drawn])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return _made(models.WordPiece(vocabulary, unk_token="[UNK]"), decoders.WordPiece(cleanup=False))


def _made(model: Any, decoder: Any) -> Tokenizer:
    made = Tokenizer(model)
    made.add_special_tokens([END])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoder
    return made


@pytest.mark.parametrize("kind", [byte_pairs, unigrams, word_pieces])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_kept_words_are_split_as_before_and_no_word_is_lost(kind: Any, data: st.DataObject) -> None:
    theirs = data.draw(kind())
    keep = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    small = cd.tokenizers.HuggingFace(theirs, keep)
    for word in WORDS:
        full = theirs.encode(word, add_special_tokens=False).ids
        own = small.encode(word)[1:-1]
        assert small.decode(own) == theirs.decode(full, skip_special_tokens=True).replace(
            "<unk>", ""
        ).replace("[UNK]", ""), word
        if word in keep:
            assert [small.full_ids[index] for index in own] == full


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(WORDS), min_size=1, max_size=10, unique=True),
    word=st.text(LETTERS, min_size=1, max_size=7),
    scored=st.booleans(),
)
def test_the_spelling_is_the_best_of_all(pieces: list[str], word: str, scored: bool) -> None:
    scores = {piece: -1.0 - 0.37 * (len(piece) % 3) for piece in pieces}
    model: dict[str, Any] = {"type": "Unigram", "vocab": [*scores.items()]}
    cost = {piece: -score for piece, score in scores.items()}
    if not scored:
        model, cost = {"type": "BPE", "vocab": dict.fromkeys(pieces, 0)}, dict.fromkeys(pieces, 1.0)
    cuts = itertools.product([False, True], repeat=len(word) - 1)
    every = [_parts(word, cut) for cut in cuts]
    possible = [sum(cost[p] for p in parts) for parts in every if {*parts} <= {*pieces}]
    found = Speller(model, pieces)(word)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert "".join(found) == word
    assert sum(cost[piece] for piece in found) == pytest.approx(min(possible), abs=1e-12)


def _parts(word: str, cut: tuple[bool, ...]) -> list[str]:
    parts = [""]
    for letter, ends in zip(word, (*cut, False), strict=True):
        parts[-1] += letter
        parts += [""] * ends
    return parts
