"""Every option of decoding is on the command line, under its own name."""

from __future__ import annotations

import argparse

import pytest

from capdistill.cli import make_parser
from capdistill.cli.common import _HELP, add_generation_options, generation_values
from capdistill.generation.config import GenerationConfig


def read(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    return generation_values(parser.parse_args(words))


def test_every_field_has_its_option_and_its_help():
    assert list(_HELP) == list(GenerationConfig.types())
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in GenerationConfig.types()} <= flags


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["--beam-size", "3", "--length-penalty", "0.5"], {"beam_size": 3, "length_penalty": 0.5}),
        (["--early-stopping", "true"], {"early_stopping": True}),
        (["--early-stopping", "never"], {"early_stopping": "never"}),
        (["--sample", "--no-allow-unknown"], {"sample": True, "allow_unknown": False}),
        (["--banned-words", "dog", "cat"], {"banned_words": ["dog", "cat"]}),
        (["--not-last", "function_words"], {"not_last": "function_words"}),
        (["--not-last", "of", "a"], {"not_last": ["of", "a"]}),
        (["--prefix", "a photo of", "--seed", "3"], {"prefix": "a photo of", "seed": 3}),
        (["--length-normalisation", "gnmt"], {"length_normalisation": "gnmt"}),
    ],
)
def test_options_become_the_fields_of_the_configuration(words, values):
    assert read(*words) == values
    GenerationConfig(**read(*words))


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "run/best", "--data", "sample", "--beam-size", "3"],
        ["compare", "a", "b", "--out", "c", "--data", "sample", "--beam-size", "3"],
        ["train", "--preset", "debug_student", "--data", "sample", "--beam-size", "3"],
        ["distill", "--teacher", "a", "--student", "b", "--data", "sample", "--beam-size", "3"],
    ],
)
def test_commands_that_caption_take_them(command):
    assert generation_values(make_parser().parse_args(command)) == {"beam_size": 3}


def test_a_run_file_holds_how_validation_captions():
    from capdistill.cli.train import make_run

    words = ["train", "--preset", "debug_student", "--data", "sample", "--out", "x", "--seed", "7"]
    options = make_parser().parse_args([*words, "--beam-size", "3", "--set", "train.epochs=1"])
    train = make_run(options).train
    assert train.generation == GenerationConfig(beam_size=3)
    assert train.seed == 7
    dotted = make_parser().parse_args([*words, "--set", "train.generation.beam_size=4"])
    assert make_run(dotted).train.generation == GenerationConfig(beam_size=4)
