"""Presets: true sizes, pretrained or random by choice, and what a name stands for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import capdistill as cd
from capdistill import Captioner, presets
from capdistill.errors import CheckpointError, ConfigError, UnknownName

# At 3,000 words. The decoder's share follows decoders/lstm.py and decoders/transformer.py.
PARAMETERS = {
    "vit_transformer": 35_684_224,
    "vit_transformer_small": 27_538_304,
    "resnet50_lstm": 33_505_784,
    "resnet50_lstm_small": 26_201_336,
    "resnet50_lstm_large": 47_608_056,
    "lite0_lstm": 7_296_696,
    "debug_teacher": 889_408,
    "debug_student": 443_636,
}


@pytest.fixture(scope="module")
def sizes():
    return {row.name: row for row in presets.table(vocabulary=3000)}


@pytest.fixture
def tokenizer():
    return cd.WordTokenizer(["a", "brown", "dog", "runs"])


def test_the_table_tells_true_parameter_counts(sizes):
    assert {name: row.parameters for name, row in sizes.items()} == PARAMETERS
    assert list(sizes) == presets.names()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [50, 3000, 30_000])
@pytest.mark.parametrize("name", presets.names())
def test_stored_counts_are_those_of_the_model_itself(name, vocabulary):
    preset = presets.describe(name)
    cd.encoders.get(preset.encoder)  # imported off the meta device
    with torch.device("meta"):
        encoder, decoder = presets.parts(name, weights=False)
        decoder.build(vocabulary)
    parameters = [*encoder.parameters(), *decoder.parameters()]

    assert {row.name: row for row in presets.table(vocabulary)}[name] == presets.Size(
        name=name,
        description=preset.description,
        parameters=sum(p.numel() for p in parameters),
        encoder=sum(p.numel() for p in encoder.parameters()),
        decoder=sum(p.numel() for p in decoder.parameters()),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        tokens=encoder.tokens,
        dim=encoder.dim,
        image_size=encoder.image_size,
    )


@pytest.mark.parametrize("vocabulary", [5, 50, 3000, 30_000, 300_000])
def test_the_debug_student_is_smaller_than_its_teacher(vocabulary):
    sizes = {row.name: row for row in presets.table(vocabulary)}
    student, teacher = sizes["debug_student"], sizes["debug_teacher"]

    assert student.parameters < teacher.parameters
    assert student.encoder < teacher.encoder
    assert student.decoder < teacher.decoder


def test_the_table_needs_neither_torch_nor_a_model():
    program = (
        "import sys; from capdistill import presets; presets.table(); presets.names();"
        "print([name for name in ('torch', 'timm', 'torchvision') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert run.stdout.strip() == "[]", run.stderr


def test_presets_are_of_the_promised_size(sizes):
    millions = {name: row.parameters / 1e6 for name, row in sizes.items()}

    assert millions["vit_transformer"] == pytest.approx(36, abs=1)
    assert millions["vit_transformer_small"] == pytest.approx(28, abs=1)
    assert millions["resnet50_lstm"] == pytest.approx(33, abs=1)
    assert millions["lite0_lstm"] <= 8
    assert millions["debug_teacher"] < 1
    assert millions["debug_student"] < 1
    assert millions["vit_transformer"] > 3 * millions["lite0_lstm"]


def test_presets_look_at_the_promised_tokens(sizes):
    looks = {name: (row.tokens, row.dim) for name, row in sizes.items()}

    assert looks["vit_transformer"] == looks["vit_transformer_small"] == (197, 384)
    assert looks["resnet50_lstm"] == looks["lite0_lstm"] == (49, 256)
    assert looks["resnet50_lstm_small"] == (49, 128)
    assert looks["resnet50_lstm_large"] == (49, 384)


@pytest.mark.parametrize("name", ["debug_teacher", "debug_student"])
def test_a_preset_has_the_parameters_of_its_row(name, tokenizer):
    captioner = Captioner.create(name, tokenizer=tokenizer)

    row = {row.name: row for row in presets.table(len(tokenizer.vocabulary))}[name]
    assert captioner.num_parameters() == row.parameters
    assert captioner.num_parameters(trainable=True) == row.trainable


@pytest.mark.parametrize("name", ["debug_teacher", "debug_student"])
def test_debug_presets_are_random_and_need_no_hub(name, tokenizer, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("capdistill.encoders.timm.reachable", lambda url: asked.append(url))

    captioner = cd.Captioner.create(name, tokenizer=tokenizer)

    assert not asked
    assert captioner.name == name


def test_overrides_replace_arguments_and_the_decoder_follows_the_width(tokenizer):
    student = Captioner.create(
        "debug_student",
        tokenizer=tokenizer,
        encoder={"dim": 16, "trainable": 1},
        decoder={"layers": 2},
    )

    assert student.encoder.dim == student.decoder.dim == 16
    assert not student.encoder.trunk_frozen
    assert len(student.decoder.hidden_dims) == 3


def test_a_preset_with_missing_weights_is_an_error_not_a_random_model(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="No weights file"):
        Captioner.create("lite0_lstm", tokenizer=tokenizer, weights=tmp_path / "nosuch.safetensors")


def test_an_unknown_preset_is_named_with_the_nearest(tokenizer):
    with pytest.raises(UnknownName, match=r"'lite_lstm'. Did you mean 'lite0_lstm'"):
        Captioner.create("lite_lstm", tokenizer=tokenizer)
    with pytest.raises(UnknownName, match="There is no preset 3"):
        presets.describe(3)


def test_an_argument_that_no_part_has_is_named(tokenizer):
    with pytest.raises(ConfigError, match="depth"):
        Captioner.create("debug_student", tokenizer=tokenizer, decoder={"depth": 2})


def test_the_table_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)

    torch.manual_seed(0)
    presets.table(100)

    assert torch.rand(1) == expected


def test_an_encoder_of_a_preset_gives_what_its_row_says(sizes):
    preset = presets.describe("vit_transformer")
    encoder = cd.encoders.create(preset.encoder, **preset.encoder_kwargs, weights=False)

    tokens = encoder(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))

    row = sizes["vit_transformer"]
    assert tokens.shape == (1, row.tokens, row.dim) == (1, 197, 384)


def test_a_preset_takes_changes_to_its_parts_through_the_captioner_too(tokenizer):
    changes = {"encoder": {"dim": 16}, "decoder": {"hidden": 24}}
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer, **changes)
    assert (student.encoder.dim, student.decoder.hidden_dims[0]) == (16, 24)
