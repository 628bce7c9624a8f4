"""Draws: their distribution, and that they depend on the seed and the image alone."""

from __future__ import annotations

import pytest
import torch

from capdistill.generation import GenerationConfig, GenerationSpec, generate
from capdistill.generation.choice import draw, image_keys, row_keys, uniforms
from tests.generation.decoding_cases import (
    END,
    LIMIT,
    PAD,
    START,
    A,
    decoder_b,
    pictures,
    real,
    run_toy,
)


def sampled(seed: int = 0, keys: torch.Tensor | None = None, images: int = 4, **options):
    config = GenerationConfig(sample=True, seed=seed, **options)
    spec = GenerationSpec(START, END, LIMIT, config, banned=(PAD, START))
    return generate(real("transformer", 2), pictures(images), spec, keys)


def test_the_same_seed_gives_the_same_captions_and_another_seed_others():
    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_an_image_is_known_by_its_key_not_by_its_place():
    keys = torch.tensor([5, 6, 7, 8])
    forward = sampled(keys=keys)
    config = GenerationConfig(sample=True)
    spec = GenerationSpec(START, END, LIMIT, config, banned=(PAD, START))
    backward = generate(real("transformer", 2), pictures(4).flip(0), spec, keys.flip(0))
    assert [h.tokens for h in forward] == [h.tokens for h in backward][::-1]


def test_captions_of_one_image_differ_and_come_best_first():
    (found, *_) = sampled(num_return=8, temperature=2.0)
    assert len({h.tokens for h in found.n_best}) > 1
    scores = [h.score for h in found.n_best]
    assert scores == sorted(scores, reverse=True)
    assert found.tokens == found.n_best[0].tokens


def test_the_first_captions_do_not_depend_on_how_many_are_drawn():
    few = {h.tokens for h in sampled(num_return=2)[0].n_best}
    many = {h.tokens for h in sampled(num_return=6)[0].n_best}
    assert few <= many


def test_a_low_temperature_one_word_and_a_small_share_are_greedy():
    decoder, images = real("transformer", 2), pictures(4)
    spec = GenerationSpec(START, END, LIMIT, banned=(PAD, START))
    greedy = [h.tokens for h in generate(decoder, images, spec)]
    for options in ({"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}):
        assert [h.tokens for h in sampled(**options)] == greedy


def test_words_are_drawn_as_often_as_they_are_probable():
    """20,000 draws: three standard deviations are 0.011."""
    probabilities = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4], dtype=torch.float64)
    uniform = uniforms(row_keys(torch.arange(20_000), 1).flatten(), seed=3, position=0)
    found = draw(probabilities.log().expand(20_000, 5), uniform).bincount(minlength=5) / 20_000
    torch.testing.assert_close(found.double(), probabilities, rtol=0, atol=0.011)
    assert found[2] == 0


def test_draws_are_even_and_not_alike_from_place_to_place():
    """Correlation of 10,000 pairs: three standard deviations are 0.03."""
    keys = torch.arange(10_000)
    columns = [uniforms(keys, seed, place) for seed in (0, 1) for place in (0, 1)]
    for column in columns:
        assert 0 <= float(column.min()) < 0.001 < 0.999 < float(column.max()) < 1
        assert float(column.mean()) == pytest.approx(0.5, abs=0.01)
    between = torch.corrcoef(torch.stack(columns))
    assert float((between - torch.eye(4)).abs().max()) < 0.04


def test_splitmix64_gives_its_published_numbers():
    """First outputs of the generator of Steele, Lea and Flood for seed 1234567."""
    from capdistill.generation.choice import _GAMMA, _mix

    seeds = 1234567 + torch.arange(1, 4) * _GAMMA
    found = [x % 2**64 for x in _mix(seeds).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_are_a_function_of_the_bytes():
    one, two, again, name = image_keys([b"a", b"b", b"a", "a"]).tolist()
    assert one == again == name != two


def test_a_file_name_that_is_not_utf_8_has_a_key():
    one, other = image_keys(["\udcff.jpg", "\udcfe.jpg"]).tolist()
    assert one != other


def test_the_last_number_below_one_draws_a_possible_word():
    almost = torch.tensor([1 - 2.0**-52, 0.0], dtype=torch.float64)
    log_probs = torch.tensor([[0.0, 0.7, 0.3, 0.0]], dtype=torch.float64).log().expand(2, 4)
    assert draw(log_probs, almost).tolist() == [2, 1]


def test_a_drawn_caption_keeps_the_models_probability_whatever_the_temperature():
    (found,) = run_toy(decoder_b, 8, sample=True, top_k=1, temperature=0.1, length_penalty=1)
    assert found.tokens == (A,) * 4
    assert found.log_prob == pytest.approx(-1.2315496, abs=1e-7)
    assert found.score == pytest.approx(-0.2463099, abs=1e-7)
