"""Every option of decoding is on the command line, under its own name."""

from __future__ import annotations

import argparse
import json

import pytest

from capdistill.cli import main, make_parser
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


def test_a_run_file_holds_how_validation_captions(tmp_path):
    from capdistill.cli.train import make_run

    words = ["train", "--preset", "debug_student", "--data", "sample", "--out", "x", "--seed", "7"]
    options = make_parser().parse_args([*words, "--beam-size", "3", "--set", "train.epochs=1"])
    train = make_run(options).train
    assert train.generation == GenerationConfig(beam_size=3)
    assert train.seed == 7
    file = tmp_path / "run.json"
    saved = GenerationConfig(min_length=2, beam_size=5).model_dump(mode="json")
    file.write_text(json.dumps({"train": {"generation": saved}}))
    options = make_parser().parse_args([*words, "--beam-size", "3", "--config", str(file)])
    assert make_run(options).train.generation == GenerationConfig(min_length=2, beam_size=3)
    dotted = make_parser().parse_args([*words, "--set", "train.generation.beam_size=4"])
    assert make_run(dotted).train.generation == GenerationConfig(beam_size=4)


TRAIN = ["train", "--preset", "debug_student", "--data", "sample", "--out", "x"]
TUNE = ["tune", "--data", "sample", "--out", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--temperature", "0.5"], "temperature=0.5 does nothing"),
        ([*TRAIN, "--set", "train.generation.top_k=3"], "top_k=3 does nothing"),
        ([*TRAIN, "--config", "{}/plain.json", "--top-p", "0.5"], "top_p=0.5 does nothing"),
        ([*TRAIN, "--accept-changes"], "--accept-changes belongs to --resume"),
        ([*TUNE, "--accept-changes"], "--accept-changes belongs to --resume"),
        (
            ["distill", "--recipe", "flickr8k_small", "--accept-changes", "--overwrite"],
            "--accept-changes belongs to --resume",
        ),
        ([*TRAIN, "--role", "student"], "--role belongs to --recipe"),
        ([*TRAIN, "--recipe", "flickr8k_small", "--role", "student"], "--preset another one"),
        (["train", "--recipe", "kd_2024", "--role", "teacher"], "'kd_2024' has no models"),
        (["train", "--recipe", "kd_2025", "--role", "teacher"], "Did you mean 'kd_2024'"),
        (["cache", *TRAIN[1:5], "--targets", "t"], "--targets are those of a teacher"),
        (["export", "run", "--out", "x", "--format", "coco"], "--format belongs to --calibration"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, message, tmp_path, capsys):
    plain = {"train": {"generation": GenerationConfig().model_dump(mode="json")}}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    assert main([word.replace("{}", str(tmp_path)) for word in words]) == 1
    assert message in capsys.readouterr().err


def test_options_of_sampling_act_where_the_run_file_samples(tmp_path):
    from capdistill.cli.train import make_run

    file = tmp_path / "run.json"
    file.write_text(json.dumps({"train": {"generation": {"sample": True, "top_k": 3}}}))
    options = make_parser().parse_args([*TRAIN, "--config", str(file), "--temperature", "0.5"])
    expected = GenerationConfig(sample=True, top_k=3, temperature=0.5)
    assert make_run(options).train.generation == expected
