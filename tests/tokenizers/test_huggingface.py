"""Subwords of any Hugging Face tokenizer: nothing is lost, captions are split as before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import capdistill as cd
from tests.tokenizers.subword_cases import KINDS, captions, full, trimmed, untrimmed

every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.one_of(
    st.text(max_size=30),
    st.text(st.sampled_from("aeiou dgstnr.,'-É日🐕▁Ġ#<>/s0x41[]\u0301 \t"), max_size=30),
    st.lists(st.sampled_from(captions()), min_size=1, max_size=2).map(" ".join),
)


def _by_theirs(kind: str, text: str) -> list[int]:
    theirs = full(kind)
    theirs.encode_special_tokens = True
    return theirs.encode(" ".join(text.split()), add_special_tokens=False).ids


@every_kind
def test_captions_that_were_kept_are_split_as_by_the_full_tokenizer(kind: str) -> None:
    tokenizer = trimmed(kind)
    assert len(tokenizer) < len(untrimmed(kind))
    for caption in captions()[::3]:
        start, *ids, end = (tokenizer.full_ids[i] for i in tokenizer.encode(caption))
        assert ids == _by_theirs(kind, caption)
        assert (start, end) == (untrimmed(kind).start_id, untrimmed(kind).end_id)


@every_kind
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_what_the_full_tokenizer_reads_back_is_read_back(kind: str, text: str) -> None:
    theirs = full(kind)
    expected = theirs.decode(_by_theirs(kind, text)).strip()
    for tokenizer in (trimmed(kind), untrimmed(kind)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == expected
        inner = [i for i in ids[1:-1] if i != tokenizer.unk_id]
        assert not {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id} & {*inner}


@every_kind
def test_ids_lead_to_the_same_entries_of_the_full_vocabulary(kind: str) -> None:
    tokenizer, theirs = trimmed(kind), full(kind)
    vocabulary = [theirs.id_to_token(index) for index in range(theirs.get_vocab_size())]
    assert list(tokenizer.full_vocabulary) == vocabulary == list(untrimmed(kind).vocabulary)
    assert [vocabulary[i] for i in tokenizer.full_ids] == list(tokenizer.vocabulary)
    assert untrimmed(kind).full_ids == tuple(range(len(vocabulary)))


def test_a_tokenizer_without_an_end_token_names_what_it_has() -> None:
    theirs = cd.tokenizers.HuggingFace
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordPiece({"a": 0, "stop": 1, "[UNK]": 2}))
    with pytest.raises(cd.errors.ConfigError, match=r"Give end=.*special tokens: none"):
        theirs(bare)
    assert theirs(bare, end="stop").end_id == 1
