"""Options: what cannot be is refused, with the field and the fix."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

import capdistill as cd
from capdistill.errors import ConfigError, parse
from capdistill.generation.config import GenerationConfig, resolve
from capdistill.generation.hypotheses import best_divisor, length_divisor
from capdistill.training.config import TrainConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1 token, got 0"),
        ({"temperature": 0}, r"temperature must be greater than 0\S*, got 0"),
        ({"temperature": 1e-300}, "temperature must be at least 1e-06, got 1e-300"),
        ({"length_penalty": 1e3}, "length_penalty must be at most 5.0, got 1000.0"),
        ({"length_penalty": -6}, "length_penalty must be at least -5.0, got -6.0"),
        ({"beam_size": 2, "beam_groups": 2, "diversity_penalty": 1e38}, "at most 1000000.0"),
        ({"top_p": 1.5}, "top_p must be at most 1.0, got 1.5"),
        ({"beam_sizes": 3}, "no option 'beam_sizes' .*Did you mean 'beam_size'"),
        ({"length_normalisation": "mean"}, "length_normalisation.*'none', 'average' or 'gnmt'"),
        ({"length_penalty": float("nan")}, "length_penalty.*finite"),
        ({"num_return": 3}, "num_return=3 needs as many beams, but beam_size=1. Use beam_size=3"),
        ({"sample": True, "beam_size": 2}, "beam_size=2. Leave beam_size at 1"),
        ({"beam_size": 4, "beam_groups": 3}, "beam_groups=3. Use a multiple, such as beam_size=6"),
        ({"diversity_penalty": 0.5}, "but beam_groups=1. Use beam_groups=2 or more"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 words do not fit max_length=8"),
        ({"banned_words": "dog"}, r"banned_words='dog' is one string; give \['dog'\]"),
        ({"not_last": ["functionwords"]}, r"expected a list of words or 'function_words'"),
        ({"not_last": "dog"}, r"not_last='dog' is one string; give \['dog'\]"),
        ({"early_stopping": "always"}, "early_stopping"),
    ],
)
def test_options_that_cannot_be_are_refused_with_field_and_fix(options, message):
    with pytest.raises(ConfigError, match=f"(?s)^generation: .*{message}"):
        GenerationConfig(**options)


def test_it_is_public_frozen_and_survives_json():
    config = cd.GenerationConfig(beam_size=3, banned_words=["dog"], not_last="function_words")
    assert GenerationConfig(**config.model_dump(mode="json")) == config
    with pytest.raises(AttributeError, match="beam_size"):
        config.beam_size = 4  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) != hash(GenerationConfig())


def test_keywords_win_over_the_whole():
    whole = GenerationConfig(beam_size=3, min_length=2)
    assert resolve(whole, {"beam_size": 5}) == GenerationConfig(beam_size=5, min_length=2)
    assert resolve({"beam_size": 3}, {}) == GenerationConfig(beam_size=3)
    assert resolve(None, {}) == GenerationConfig()


IDLE = [
    ({"temperature": 0.5}, "temperature=0.5 does nothing, because sample is False. Give sample="),
    ({"top_k": 3, "beam_size": 2}, "top_k=3 does nothing, because sample is False"),
    ({"top_p": 0.9}, "top_p=0.9 does nothing"),
    ({"seed": 4}, "seed=4 does nothing"),
    ({"early_stopping": "never"}, "because beam_size is 1. Give beam_size=2 or more too, or leave"),
    ({"early_stopping": True, "sample": True}, "early_stopping=True does nothing"),
]


@pytest.mark.parametrize(("options", "message"), IDLE)
def test_an_option_whose_companion_was_forgotten_is_refused(options, message):
    for given in ((None, options), (options, {}), (GenerationConfig(), options)):
        with pytest.raises(ConfigError, match=message):
            resolve(*given)
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, {"generation": options}, "fit")


@pytest.mark.parametrize("beside", [{}, {"generation": GenerationConfig(min_length=2)}])
def test_among_the_options_of_training_it_is_refused_too(beside):
    with pytest.raises(ConfigError, match=r"fit: generation: temperature=4\.0 does nothing"):
        parse(TrainConfig, {**beside, "temperature": 4.0}, "fit")


def test_the_exponent_of_no_normalisation_is_refused():
    with pytest.raises(ConfigError, match=r"length_penalty=2\.0 does nothing.*'average'"):
        resolve(GenerationConfig(length_normalisation="none"), {"length_penalty": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"sample": True, "temperature": 0.5, "seed": 4},
        {"sample": False, "temperature": 0.5, "top_k": 3},
        {"beam_size": 1, "early_stopping": "never"},
        {"length_normalisation": "none", "length_penalty": 2.0},
        {"temperature": 1.0, "top_k": 0, "seed": 0, "early_stopping": False},
    ],
)
def test_an_option_may_stand_beside_what_switches_it_off_and_at_its_default(options):
    assert resolve(None, options) == resolve(options, {}) == GenerationConfig(**options)


@pytest.mark.parametrize(("options", "_"), IDLE)
def test_a_saved_configuration_with_options_that_do_nothing_loads(options, _):
    config = GenerationConfig(**options)
    saved = config.model_dump(mode="json")
    assert GenerationConfig(**saved) == resolve(saved, {}) == config
    assert parse(TrainConfig, {"generation": saved}, "fit").generation == config
    assert resolve(config, {"sample": True, "beam_size": 1}).temperature == config.temperature


def test_something_else_in_its_place_is_refused():
    with pytest.raises(ConfigError, match=r"12 was given; expected a GenerationConfig"):
        resolve(12, {})


@pytest.mark.parametrize(
    ("form", "alpha", "expected"),
    [("none", 2.0, 1.0), ("average", 2.0, 49.0), ("average", 0.5, 7**0.5), ("gnmt", 2.0, 4.0)],
)
def test_divisors_of_seven_tokens(form, alpha, expected):
    config = GenerationConfig(length_normalisation=form, length_penalty=alpha)
    assert length_divisor(config, 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 20.0), (-1.0, 1 / 8)])
def test_the_exact_bound_takes_the_most_favourable_length_still_to_come(alpha, expected):
    config = GenerationConfig(early_stopping="never", length_penalty=alpha)
    assert best_divisor(config, 7, longest=20) == pytest.approx(expected, abs=1e-12)


NUMBERS = [
    ("beam_size", True),
    ("beam_size", "3"),
    ("beam_size", 3.0),
    ("max_length", False),
    ("max_length", "12"),
    ("seed", "0"),
    ("length_penalty", True),
    ("length_penalty", "0.7"),
    ("temperature", math.inf),
    ("top_p", math.nan),
    ("diversity_penalty", -math.inf),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_a_bool_text_and_what_is_not_finite_are_no_numbers(name, value):
    with pytest.raises(ConfigError, match=rf"(?s)'?{name}'?.*(number|got)"):
        GenerationConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("sample", 1), ("sample", "yes"), ("sample", 0.0)])
def test_a_number_and_text_are_no_bool(name, value):
    with pytest.raises(ConfigError, match=f"'{name}'.*expected true or false"):
        GenerationConfig(**{name: value})


def test_scalars_of_numpy_and_whole_numbers_for_floats_are_accepted():
    config = GenerationConfig(
        beam_size=np.int64(3), length_penalty=1, early_stopping=np.bool_(True), seed=np.int32(7)
    )
    assert (config.beam_size, type(config.beam_size)) == (3, int)
    assert config.length_penalty == 1.0
    assert config.early_stopping is True
    assert GenerationConfig(early_stopping="never").early_stopping == "never"
    assert GenerationConfig(temperature=np.float32(0.5)).temperature == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", True),
        ("epochs", "3"),
        ("batch_size", 4.0),
        ("learning_rate", "1e-3"),
        ("learning_rate", math.nan),
        ("max_grad_norm", math.inf),
        ("patience", False),
        ("flip", 1),
        ("augment", "no"),
    ],
)
def test_options_of_training_are_as_strict(name, value):
    with pytest.raises(ConfigError, match=f"'{name}' was given"):
        parse(TrainConfig, {name: value}, "fit")


def test_a_list_of_the_name_of_a_set_of_words_is_that_set():
    assert cd.GenerationConfig(not_last=["function_words"]).not_last == "function_words"
    assert cd.GenerationConfig(not_last=["function"]).not_last == ("function",)
