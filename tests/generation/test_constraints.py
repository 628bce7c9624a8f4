"""Constraints hold for greedy decoding, beams, groups and sampling alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.errors import ConfigError
from capdistill.generation import GenerationConfig, GenerationSpec, Hypothesis, generate
from capdistill.generation.words import FUNCTION_WORDS
from capdistill.tokenizer import WordTokenizer
from tests.generation.decoding_cases import (
    END,
    FORMS,
    LIMIT,
    PAD,
    START,
    A,
    B,
    decoder_b,
    next_log_probs,
    pictures,
    real,
    run_toy,
)

MODES = {
    "greedy": {},
    "beam": {"beam_size": 3, "num_return": 3},
    "groups": {"beam_size": 4, "num_return": 4, "beam_groups": 2, "diversity_penalty": 0.5},
    "sample": {"sample": True, "num_return": 4, "temperature": 2.0},
}
every_mode = pytest.mark.parametrize("mode", MODES)
some = given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 999))


def decode(form: str, seed: int, mode: str, limit: int = LIMIT, **ids) -> list[Hypothesis]:
    """All hypotheses of three pictures; options are the spec's, those of `GenerationConfig` too."""
    spec_keys = {"banned", "phrases", "not_last", "prefix"}
    spec = {"banned": (PAD, START), **{k: ids[k] for k in ids if k in spec_keys}}
    options = {k: v for k, v in ids.items() if k not in spec_keys}
    config = GenerationConfig(**MODES[mode], **options)
    found = generate(
        real(form, seed), pictures(3, seed), GenerationSpec(START, END, limit, config, **spec)
    )
    return [each for best in found for each in (best.n_best or (best,))]


def grams(tokens: tuple[int, ...], n: int) -> list[tuple[int, ...]]:
    return [tokens[i : i + n] for i in range(len(tokens) - n + 1)]


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_no_n_tokens_in_a_row_occur_twice(mode, form, seed):
    for n in (1, 2, 3):
        for found in decode(form, seed, mode, no_repeat_ngram=n):
            assert len(set(grams(found.tokens, n))) == len(grams(found.tokens, n))


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_what_is_banned_is_never_said(mode, form, seed):
    for found in decode(form, seed, mode, banned=(PAD, START, 4), phrases=((5, 6), (7, 7, 3))):
        assert not {PAD, START, 4} & set(found.tokens)
        assert (5, 6) not in grams(found.tokens, 2)
        assert (7, 7, 3) not in grams(found.tokens, 3)


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_a_caption_has_at_least_so_many_words(mode, form, seed):
    assert all(len(found.tokens) >= 5 for found in decode(form, seed, mode, min_length=5))


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_no_caption_ends_on_some_words_not_even_at_the_limit(mode, form, seed):
    for found in decode(form, seed, mode, not_last=(3, 5, 6), limit=4):
        assert found.tokens[-1:] not in [(3,), (5,), (6,)]


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_every_caption_begins_with_the_prefix_which_counts_in_its_probability(mode, form, seed):
    for found in decode(form, seed, mode, prefix=(3, 4, 4), no_repeat_ngram=1, banned=(4,)):
        assert found.tokens[:3] == (3, 4, 4)
        assert found.log_prob == pytest.approx(sum(found.token_log_probs), abs=1e-12)
        assert len(found.token_log_probs) == len(found.tokens) + found.finished


@every_mode
@settings(deadline=None, max_examples=8)
@some
def test_constraints_do_not_change_the_probability_of_what_is_said(mode, form, seed):
    decoder, images = real(form, seed), pictures(3, seed)
    config = GenerationConfig(**MODES[mode], no_repeat_ngram=2, min_length=2)
    spec = GenerationSpec(START, END, 4, config, banned=(PAD, START, 5), not_last=(3,))
    for best, picture in zip(generate(decoder, images, spec), images, strict=True):
        for found in best.n_best or (best,):
            ids = (*found.tokens, *[END] * found.finished)
            each = [next_log_probs(decoder, picture, ids[:i])[t] for i, t in enumerate(ids)]
            assert found.token_log_probs == pytest.approx(each, abs=1e-9)
            assert found.log_prob == pytest.approx(sum(each), abs=1e-9)


@every_mode
def test_a_caption_that_no_word_can_continue_ends(mode):
    banned = (PAD, START, B)
    config = GenerationConfig(**MODES[mode], no_repeat_ngram=1, min_length=4)
    decoder = real("parallel", 0, vocabulary=5)
    spec = GenerationSpec(START, END, 6, config, banned=banned)
    for found in generate(decoder, pictures(2), spec):
        assert (found.tokens, found.finished) == ((A,), True)
        assert math.isfinite(found.log_prob)


def test_the_limit_is_the_plans():
    (found,) = run_toy(decoder_b, 3, beam_size=3)
    assert (found.tokens, found.finished) == ((A,) * 3, False)


# Words of a tokenizer

WORDS = WordTokenizer(["a", "dog", "runs", "on", "grass"], max_length=6)


def ids(*words: str) -> tuple[int, ...]:
    return tuple(WORDS.vocabulary.index(word) for word in words)


def test_a_plan_holds_the_ids_of_the_words():
    config = GenerationConfig(banned_words=["grass", "a dog"], not_last=["on", "a"], prefix="A dog")
    spec = GenerationSpec.of(config, WORDS)
    assert spec.max_length == 7
    assert spec.banned == tuple(sorted((WORDS.pad_id, WORDS.start_id, WORDS.unk_id, *ids("grass"))))
    assert spec.phrases == (ids("a", "dog"),)
    assert spec.not_last == ids("on", "a")
    assert spec.prefix == ids("a", "dog")


def test_function_words_are_those_of_the_list_that_the_vocabulary_has():
    spec = GenerationSpec.of(GenerationConfig(not_last="function_words"), WORDS)
    assert set(spec.not_last) == set(ids("a", "on"))
    assert {"a", "on"} <= set(FUNCTION_WORDS)


def test_unknown_words_are_said_on_request_alone():
    assert WORDS.unk_id in GenerationSpec.of(GenerationConfig(), WORDS).banned
    assert WORDS.unk_id not in GenerationSpec.of(GenerationConfig(allow_unknown=True), WORDS).banned


def test_banning_a_word_that_the_vocabulary_has_not_bans_nothing_more():
    config = GenerationConfig(banned_words=["zebra", "a zebra"], not_last=["zebra"])
    spec = GenerationSpec.of(config, WORDS)
    bare = GenerationSpec.of(GenerationConfig(), WORDS)
    assert (spec.banned, spec.phrases, spec.not_last) == (bare.banned, (), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "a zebra"}, "has words that are not in the vocabulary: zebra. Leave them out"),
        ({"prefix": "!!"}, "prefix='!!' holds no word"),
        ({"banned_words": ["..."]}, r"banned_words has '...', which holds no word"),
        ({"prefix": "a dog", "max_length": 2}, "prefix has 2 tokens and max_length is 2; use max"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSpec.of(GenerationConfig(**options), WORDS)


def test_case_7_an_end_id_that_is_also_padding_and_start_stays_possible():
    class Shared:
        pad_id = start_id = end_id = 0
        max_length = 6
        vocabulary = ("<|end|>", "a", "dog")

        def encode(self, caption):
            return [0, *map(self.vocabulary.index, caption.split()), 0]

        def decode(self, tokens):
            return " ".join(self.vocabulary[i] for i in tokens)

    spec = GenerationSpec.of(
        GenerationConfig(beam_size=2, prefix="a", banned_words=["dog"]), Shared()
    )
    assert (spec.banned, spec.prefix, spec.end_id) == ((2,), (1,), 0)
    decoder = real("transformer", 1, vocabulary=3)
    (found,) = generate(decoder, pictures(1), spec)
    assert 0 not in found.tokens
    assert found.tokens[0] == 1
    assert torch.isfinite(torch.tensor(found.log_prob))
