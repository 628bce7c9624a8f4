"""Decoding in NumPy finds what decoding in torch finds, with every option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capdistill.decoders import Decoder
from capdistill.deploy import choice as numpy_choice
from capdistill.deploy.search import Array, State, decode
from capdistill.errors import NotFiniteLogits
from capdistill.generation import GenerationConfig, GenerationSpec, Hypothesis, choice, generate
from capdistill.generation.words import SubwordRules
from tests.generation.decoding_cases import END, FORMS, PAD, START, Toy, pictures, real

WORDS = 9


def reread(decoder: Decoder, features: Tensor) -> tuple[Any, State]:
    """A step that reads all words again, and its first state: what was said, and features."""

    def step(tokens: Array, position: int, state: State) -> tuple[Array, State]:
        said = np.concatenate([state.row["said"], tokens[..., None]], 2)  # (I, K, T)
        assert said.shape[2] == position + 1
        rows = torch.from_numpy(said).flatten(0, 1)
        logits = decoder(rows, torch.from_numpy(state.image["features"])).logits[:, -1]
        return logits.unflatten(0, said.shape[:2]).numpy(), State(state.image, {"said": said})

    nothing = np.zeros((len(features), 1, 0), np.int64)
    return step, State({"features": features.numpy()}, {"said": nothing})


@torch.no_grad()
def both(
    decoder: Decoder, features: Tensor, spec: GenerationSpec
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    keys = torch.arange(len(features)) * 7 - 3
    expected = generate(decoder, features, spec, keys)
    step, state = reread(decoder, features)
    return decode(step, state, len(features), spec, keys.numpy().astype(np.uint64)), expected


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.tokens, mine.finished) == (theirs.tokens, theirs.finished)
        assert mine.token_log_probs == pytest.approx(theirs.token_log_probs, abs=1e-4)
        assert mine.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
        # A score is log_prob divided by a power of the length: 3 ** -5, say.
        scale = abs(theirs.score / theirs.log_prob) if theirs.log_prob else 1.0
        assert mine.score == pytest.approx(theirs.score, rel=1e-6, abs=1e-4 * max(1.0, scale))
        assert_same([*mine.n_best], [*theirs.n_best])


words = st.integers(3, WORDS - 1)
several = st.lists(words, max_size=3, unique=True).map(tuple)
sequences = st.lists(st.lists(words, min_size=2, max_size=3).map(tuple), max_size=2).map(tuple)
LENGTHS = st.fixed_dictionaries(
    {
        "length_normalisation": st.sampled_from(["none", "average", "gnmt"]),
        "length_penalty": st.sampled_from([0.0, 0.7, 1.0, -0.5, 5.0, -5.0]),
        "min_length": st.integers(0, 3),
        "no_repeat_ngram": st.integers(0, 3),
    }
)
BEAMS = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([2, 4, 6]),
        "beam_groups": st.sampled_from([1, 2]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "num_return": st.integers(1, 2),
    }
)
SAMPLES = st.fixed_dictionaries(
    {
        "sample": st.just(True),
        "num_return": st.integers(1, 3),
        "temperature": st.sampled_from([1e-6, 0.7, 1.0, 3.0, 1e6]),
        "top_k": st.integers(0, 5),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "seed": st.sampled_from([0, 1, -5]),
    }
)
RULES = st.builds(
    SubwordRules,
    banned_first=st.lists(st.lists(words, min_size=1, max_size=2).map(tuple), max_size=2).map(
        tuple
    ),
    not_last=sequences,
    not_whole=sequences,
    added=several,
    first=several,
    run_on=several,
)
IDS = st.fixed_dictionaries(
    {
        "banned": several.map(lambda each: (PAD, START, *each)),
        "phrases": sequences,
        "not_last": several,
        "prefix": st.lists(words, max_size=2).map(tuple),
        "subwords": st.none() | RULES,
    }
)


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 2**16),
    images=st.integers(1, 9),
    longest=st.integers(3, 7),
    lengths=LENGTHS,
    how=st.one_of(st.just({}), BEAMS, SAMPLES),
    penalty=st.sampled_from([0.0, 0.5]),
    ids=IDS,
)
def test_it_finds_what_torch_finds(form, seed, images, longest, lengths, how, penalty, ids) -> None:
    groups = {"diversity_penalty": penalty} if how.get("beam_groups", 1) > 1 else {}
    config = GenerationConfig(**{**lengths, **how, **groups})
    spec = GenerationSpec(START, END, longest, config, **ids)
    assert_same(*both(real(form, seed).float(), pictures(images, seed).float(), spec))


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3, "num_return": 3}, {"beam_size": 4, "beam_groups": 2, "num_return": 4}],
    ids=["greedy", "beam", "groups"],
)
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_of_equal_scores_it_takes_those_that_torch_takes(options, early_stopping) -> None:
    """Every word is as probable as any other, in every place."""
    config = GenerationConfig(early_stopping=early_stopping, **options)
    spec = GenerationSpec(START, END, 4, config, banned=(PAD, START))
    features = torch.zeros(2, 1, 1)
    toy = Toy(lambda position, number: [0.2] * 5)
    expected = generate(toy, features, spec)

    def step(tokens: Array, position: int, state: State) -> tuple[Array, State]:
        return np.full((*tokens.shape, 5), np.log(0.2), np.float32), state

    assert_same(decode(step, State({}, {}), 2, spec), expected)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1), st.integers(1, 8)
)
def test_the_top_k_with_ties_is_that_of_torch(rows, count) -> None:
    scores = np.array(rows, np.float32)
    scores[scores == -3] = -np.inf
    values, index = numpy_choice.stable_topk(scores, count)
    wanted = choice.stable_topk(torch.from_numpy(scores), count)
    assert np.array_equal(values, wanted[0].numpy())
    real_ones = values > -np.inf  # the others are no candidates
    assert np.array_equal(index[real_ones], wanted[1].numpy()[real_ones])


@pytest.mark.parametrize("how", [{}, {"sample": True, "num_return": 2}, {"beam_size": 3}])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_an_image_whose_logits_are_no_numbers_is_named(how, broken) -> None:
    def step(tokens: Array, position: int, state: State) -> tuple[Array, State]:
        logits = np.zeros((*tokens.shape, WORDS), np.float32)
        logits[state.image["number"] == 1, :, 5] = broken if position == 2 else 0
        logits[state.image["number"] == 0, :, END] = 9  # this image is done, and leaves
        return logits, state

    state = State({"number": np.arange(3)}, {})
    spec = GenerationSpec.from_ids(START, END, 6, **how)
    with pytest.raises(NotFiniteLogits, match="Image 2 of 3: the decoder gives NaN"):
        decode(step, state, 3, spec)


@pytest.mark.parametrize("how", [{}, {"sample": True, "num_return": 2}, {"beam_size": 3}])
def test_logits_after_the_end_of_a_caption_do_not_count(how) -> None:
    """Image 3 is done after two words, and stays in the batch; alone it reads no further."""
    how = {"early_stopping": True, **how}

    def step(tokens: Array, position: int, state: State) -> tuple[Array, State]:
        logits = np.zeros((*tokens.shape, WORDS), np.float32)
        logits[state.image["number"] == 3, :, END] = 40 if position < 2 else np.nan
        return logits, state

    spec = GenerationSpec.from_ids(START, END, 6, **how)
    together = decode(step, State({"number": np.arange(10)}, {}), 10, spec)
    keys = np.array([3], np.uint64)
    assert together[3] == decode(step, State({"number": np.array([3])}, {}), 1, spec, keys)[0]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**70), 2**70), st.integers(0, 50))
def test_random_numbers_are_those_of_torch(key, seed, position) -> None:
    keys = torch.tensor([key, 1])
    rows = choice.row_keys(keys, 3)
    mine = numpy_choice.row_keys(keys.numpy().astype(np.uint64), 3)
    assert np.array_equal(mine, rows.numpy().astype(np.uint64))
    drawn = numpy_choice.uniforms(mine, seed, position)
    assert np.array_equal(drawn, choice.uniforms(rows, seed, position).numpy())


def test_keys_of_images_are_those_of_torch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), np.uint8)
    wanted = choice.image_keys(each.tobytes() for each in pixels)
    assert np.array_equal(numpy_choice.image_keys(pixels), wanted.numpy().astype(np.uint64))
