"""Greedy decoding: toy decoders by hand, real ones against a plain loop over `forward`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capdistill.decoders import Decoder
from capdistill.errors import ConfigError
from capdistill.generation import GenerationSpec, Hypothesis, greedy
from tests.generation.decoding_cases import (
    END,
    FORMS,
    LIMIT,
    PAD,
    START,
    A,
    B,
    Toy,
    decoder_a,
    decoder_b,
    ends_after,
    real,
)


def run(table, max_length: int, numbers: Sequence[float] = (0.0,), **options):
    toy = table if isinstance(table, Toy) else Toy(table)
    features = torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1)
    return greedy(toy, features, start_id=START, end_id=END, max_length=max_length, **options)


@pytest.mark.parametrize(
    ("table", "limit", "tokens", "log_prob", "finished"),
    [
        (decoder_a, 6, (A,) * 6, -3.0649537, False),
        (decoder_a, 1, (A,), math.log(0.6), False),
        (decoder_b, 8, (A,) * 4, -1.2315496, True),
    ],
)
def test_case_12_a_limit_is_no_end_and_an_end_is_not_forced(
    table, limit, tokens, log_prob, finished
):
    (found,) = run(table, limit)
    assert (found.tokens, found.finished) == (tokens, finished)
    assert found.log_prob == pytest.approx(log_prob, abs=1e-7)


@pytest.mark.parametrize(
    ("logits", "banned", "word"),
    [
        ((0.2, 0.2, 0.2, 0.2, 0.2), (), PAD),
        ((0.2, 0.2, 0.2, 0.2, 0.2), (PAD, START), END),
        ((0.1, 0.1, 0.1, 0.35, 0.35), (), A),
        ((0.1, 0.1, 0.1, 0.35, 0.35), (A,), B),
    ],
)
def test_of_equal_words_the_smaller_id_that_is_not_banned_is_said(logits, banned, word):
    (found,) = run(lambda *_: logits, 1, banned=banned)
    assert found.tokens == (() if word == END else (word,))


def test_logits_that_differ_in_float64_alone_are_no_tie():
    (found,) = run(lambda *_: (0, 0, 0, 0.5, 0.5 + 1e-12), 1)
    assert found.tokens == (B,)


def test_banned_words_are_never_said_and_the_others_keep_their_probability():
    (found,) = run(decoder_a, 3, banned=(A, PAD, START))
    assert found.tokens == (B, B, B)
    assert found.log_prob == pytest.approx(3 * math.log(0.4), abs=1e-12)


def test_a_banned_word_is_worse_than_an_impossible_one():
    (found,) = run(lambda *_: (0.5, 0.5, 0, 0, 0), 1, banned=(PAD, START, END, A))
    assert found.tokens == (B,)
    assert found.log_prob == -math.inf


def test_the_end_token_may_be_banned():
    (found,) = run(decoder_b, 8, banned=(END,))
    assert found.tokens == (A, A, A, A, B, B, B, B)
    assert not found.finished


def test_a_vocabulary_that_is_banned_whole_is_refused():
    with pytest.raises(ConfigError, match="All 5 ids are banned; leave at least one"):
        run(decoder_a, 1, banned=range(5))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_token_is_refused(limit):
    with pytest.raises(ConfigError, match=f"max_length must be at least 1 token, got {limit}"):
        run(decoder_a, limit)


def test_the_end_token_counts_towards_the_limit():
    (four,), (five,) = run(decoder_b, 4), run(decoder_b, 5)
    assert (four.tokens, four.finished) == ((A,) * 4, False)
    assert (five.tokens, five.finished) == ((A,) * 4, True)


def test_an_empty_caption_is_a_caption():
    (found,) = run(lambda *_: (0, 0, 0.9, 0.1, 0), 4)
    assert (found.tokens, found.finished) == ((), True)
    assert found.log_prob == pytest.approx(math.log(0.9), abs=1e-12)


def test_images_that_have_ended_leave_the_batch_and_change_nothing():
    toy = Toy(ends_after)
    found = run(toy, 9, numbers=[2, 0, 5, 2, 1])
    assert toy.rows_seen == [5, 4, 3, 1, 1, 1]
    assert [len(h.tokens) for h in found] == [2, 0, 5, 2, 1]
    assert all(h.finished for h in found)
    for hypothesis, number in zip(found, [2, 0, 5, 2, 1], strict=True):
        expected = number * math.log(0.7) + math.log(0.9)
        assert hypothesis.log_prob == pytest.approx(expected, abs=1e-12)


def test_no_step_is_made_after_the_last_end():
    toy = Toy(ends_after)
    run(toy, 100, numbers=[3])
    assert len(toy.rows_seen) == 4


def test_no_image_gives_no_caption():
    assert run(decoder_a, 3, numbers=[]) == []


# Real decoders


def plain(decoder: Decoder, features: Tensor, banned: Sequence[int]) -> Hypothesis:
    """One image, the whole caption so far through `forward` for every word."""
    ids, total = [START], 0.0
    for _ in range(LIMIT):
        log_probs = decoder(torch.tensor([ids]), features[None]).logits[0, -1].log_softmax(-1)
        allowed = [i for i in range(len(log_probs)) if i not in banned]
        best = max(allowed, key=lambda i: (float(log_probs[i]), -i))
        total += float(log_probs[best])
        if best == END:
            return Hypothesis(tuple(ids[1:]), total, True)
        ids.append(best)
    return Hypothesis(tuple(ids[1:]), total, False)


def close(found: Hypothesis, expected: Hypothesis) -> bool:
    same = (found.tokens, found.finished) == (expected.tokens, expected.finished)
    return same and math.isclose(found.log_prob, expected.log_prob, abs_tol=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 99),
    images=st.integers(1, 6),
    banned=st.sampled_from([(), (PAD, START), (PAD, START, 3, 8)]),
)
def test_law_8_an_image_alone_or_in_a_batch_gets_the_caption_of_a_full_forward(
    form, seed, images, banned
):
    decoder = real(form, seed)
    features = 2 * torch.randn(images, 3, 4, dtype=torch.float64)

    def captions(some: Tensor) -> list[Hypothesis]:
        options = {"start_id": START, "end_id": END, "max_length": LIMIT, "banned": banned}
        return greedy(decoder, some, **options)

    together = captions(features)
    with torch.no_grad():
        expected = [plain(decoder, image, banned) for image in features]
    alone = [captions(image[None])[0] for image in features]
    assert [close(*pair) for pair in zip(together, expected, strict=True)] == [True] * images
    assert [close(*pair) for pair in zip(alone, expected, strict=True)] == [True] * images


def test_the_law_is_tried_on_captions_of_many_lengths():
    """Otherwise the law above could not fail."""
    lengths = set()
    for seed in range(10):
        decoder = real("transformer", seed)
        features = 2 * torch.randn(6, 3, 4, dtype=torch.float64)
        found = greedy(decoder, features, start_id=START, end_id=END, max_length=LIMIT)
        lengths |= {len(h.tokens) for h in found}
    assert len(lengths) >= 4


@pytest.mark.parametrize("form", sorted(FORMS))
def test_half_precision_features_give_finite_scores(form):
    decoder = real(form, 0).bfloat16()
    features = torch.randn(3, 3, 4).bfloat16()
    found = greedy(decoder, features, start_id=START, end_id=END, max_length=LIMIT)
    assert all(math.isfinite(h.log_prob) and h.log_prob <= 0 for h in found)


def test_no_graph_is_kept():
    decoder = real("parallel", 0)
    seen = []
    step = decoder.step

    def spy(tokens, state):
        logits, state = step(tokens, state)
        seen.append(logits.requires_grad)
        return logits, state

    decoder.step = spy
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    greedy(decoder, features, start_id=START, end_id=END, max_length=3)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": True}, "'sample' is no option of greedy decoding"),
        ({"beam_size": 3}, r"'beam_size' is no option of greedy decoding\. Use beam_search"),
        ({"prefix": "a dog"}, "'prefix' is no option of greedy decoding"),
        ({"min_lenght": 3}, "Did you mean 'min_length'"),
    ],
)
def test_options_that_greedy_decoding_does_not_read_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(decoder_b, 4, **options)


def test_options_that_take_words_need_a_tokenizer():
    for option in ({"banned_words": ["dog"]}, {"not_last": ["a"]}, {"prefix": "a"}):
        with pytest.raises(ConfigError, match=f"'{next(iter(option))}' takes words.*banned="):
            GenerationSpec.from_ids(START, END, 4, **option)
