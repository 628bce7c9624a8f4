"""What the timm encoder promises of tokens, grids, preprocessing, determinism and options."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from capdistill.encoders.timm import TimmEncoder
from capdistill.errors import ConfigError, DataError, UnknownName


@pytest.mark.parametrize(
    ("name", "tokens", "width", "prefix", "grid"),
    [
        ("test_vit", 101, 64, 1, (10, 10)),
        ("test_vit2", 101, 64, 1, (10, 10)),
        ("test_vit3", 101, 96, 1, (10, 10)),
        ("test_efficientnet", 25, 256, 0, (5, 5)),
        ("test_convnext", 25, 64, 0, (5, 5)),
        ("vit_small_patch16_224", 197, 384, 1, (14, 14)),
        ("vit_small_patch14_reg4_dinov2", 1374, 384, 5, (37, 37)),
        ("deit_tiny_distilled_patch16_224", 198, 192, 2, (14, 14)),
        ("swin_tiny_patch4_window7_224", 49, 768, 0, (7, 7)),
        ("mvitv2_tiny", 49, 768, 0, (7, 7)),
        ("resnet50", 49, 2048, 0, (7, 7)),
        ("mobilenetv3_small_100", 49, 576, 0, (7, 7)),
        ("tf_efficientnet_lite0", 49, 1280, 0, (7, 7)),
    ],
)
def test_every_family_tells_its_tokens_and_grid(name, tokens, width, prefix, grid):
    with torch.device("meta"):
        encoder = TimmEncoder(name, weights=False)

    told = (encoder.tokens, encoder.token_dim, encoder.prefix_tokens, encoder.grid, encoder.dim)
    assert told == (tokens, width, prefix, grid, width)
    side = encoder.image_size
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device="meta")
    if name.startswith("test_"):
        assert encoder(images).shape == (1, tokens, width)


def test_places_of_a_map_are_tokens_row_by_row(tiny_cnn, pictures):
    encoder = tiny_cnn()
    images = pictures(64)

    tokens = encoder.trunk(images)

    expected = encoder.backbone.forward_features(encoder.normalise(images))  # (I, D0, 2, 2)
    torch.testing.assert_close(tokens[:, 1], expected[:, :, 0, 1])
    torch.testing.assert_close(tokens[:, 2], expected[:, :, 1, 0])


def test_channels_last_families_are_read_as_they_are(pictures):
    encoder = TimmEncoder("swin_tiny_patch4_window7_224", weights=False)
    images = pictures(224, count=1)

    tokens = encoder.trunk(images)

    with torch.no_grad():
        expected = encoder.backbone.forward_features(encoder.normalise(images))  # (1, 7, 7, 768)
    torch.testing.assert_close(tokens[0, 8], expected[0, 1, 1])


def test_preprocessing_is_that_of_the_pretrained_model():
    encoder = TimmEncoder("tf_efficientnet_lite0", weights=False)
    expected = timm.data.resolve_data_config({}, model=timm.create_model("tf_efficientnet_lite0"))

    assert encoder.mean == tuple(expected["mean"]) == (0.5, 0.5, 0.5)
    assert encoder.std == tuple(expected["std"]) == (0.5, 0.5, 0.5)
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 224, 224)
    assert encoder.normalise(images).amax((1, 2, 3)).tolist() == [-1.0, 1.0]


def test_larger_images_are_brought_to_the_models_size(tiny_cnn, pictures):
    encoder = tiny_cnn(image_size=96)

    assert encoder.grid == (3, 3)
    assert encoder(pictures(130)).shape == (2, 9, 256)


def test_making_an_encoder_draws_no_more_chance_than_its_weights(tiny_cnn):
    torch.manual_seed(3)
    timm.create_model("test_efficientnet", num_classes=0)
    expected = torch.rand(1)

    torch.manual_seed(3)
    tiny_cnn()

    assert torch.rand(1) == expected


def test_making_an_encoder_leaves_statistics_alone(tiny_cnn):
    state = tiny_cnn(trainable="all").backbone.state_dict()

    assert all(int(v) == 0 for k, v in state.items() if k.endswith("num_batches_tracked"))
    assert all((v == 0).all() for k, v in state.items() if k.endswith("running_mean"))


def test_parts_that_make_no_tokens_are_not_counted():
    with torch.device("meta"):
        encoder = TimmEncoder("mobilenetv3_small_100", weights=False, trainable="all")

    assert not [key for key, _ in encoder.named_parameters() if "conv_head" in key]


@pytest.mark.parametrize("make", ["tiny_cnn", "tiny_vit"])
def test_every_trained_parameter_gets_a_gradient(make, request, pictures):
    encoder = request.getfixturevalue(make)(trainable="all", refine="pre", dim=16)

    encoder(pictures(64)).square().sum().backward()

    assert not [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None]


def test_a_fingerprint_is_the_same_in_a_new_process(tiny_cnn):
    torch.manual_seed(5)
    here = tiny_cnn(dim=8).fingerprint()
    program = (
        "import torch; from capdistill.encoders.timm import TimmEncoder; torch.manual_seed(5);"
        "print(TimmEncoder('test_efficientnet', weights=False, image_size=64).fingerprint())"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert run.stdout.strip() == here, run.stderr


def test_a_fingerprint_follows_weights_and_preprocessing_only(tiny_cnn):
    torch.manual_seed(0)
    encoder = tiny_cnn(dim=8)
    before = encoder.fingerprint()
    torch.manual_seed(0)
    assert tiny_cnn(image_size=96).fingerprint() != before

    torch.nn.init.zeros_(encoder.project[1].weight)
    assert encoder.fingerprint() == before
    with torch.no_grad():
        next(iter(encoder.trunk_parameters())).flatten()[0] += 1e-3
    assert encoder.fingerprint() != before


def test_the_same_arguments_without_weights_rebuild_the_encoder(tiny_vit, pictures):
    options = {"dim": 16, "trainable": 2, "refine": "post", "dropout": 0.1}
    first, again = tiny_vit(**options).eval(), tiny_vit(**options, weights=False).eval()

    again.load_state_dict(first.state_dict())

    torch.testing.assert_close(again(pictures(64)), first(pictures(64)), rtol=0, atol=0)


def test_half_precision_autocast_gives_nearly_the_same_tokens(tiny_cnn, pictures):
    encoder = tiny_cnn().eval()
    exact = encoder(pictures(64))

    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(pictures(64))

    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


def test_an_unknown_model_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match=r"'resnet5O'.*'resnet50'"):
        TimmEncoder("resnet5O", weights=False)
    with pytest.raises(UnknownName, match=r"'resnet18.nosuch'.*Did you mean"):
        TimmEncoder("resnet18.nosuch", weights=False)
    for name in (3, None, ""):
        with pytest.raises(ConfigError, match=f"timm: name={name!r} was given"):
            TimmEncoder(name, weights=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2.5}, "dim is 2.5"),
        ({"refine": "both"}, "'none', 'pre' or 'post'"),
        ({"dropout": 1.0}, r"dropout=1\.0 was given; expected a number of at least 0 and below 1"),
        ({"dropout": "0.1"}, "dropout='0.1' was given"),
        ({"drop_path": 2}, "drop_path=2 was given"),
        ({"image_size": 0}, "image_size is 0"),
        ({"trainable": "some"}, "trainable is 'some'"),
        ({"trainable": True}, "trainable is True"),
        ({"trainable": -1}, "has 6 stages"),
        ({"trainable": 7}, "Give 0 to 6, or 'all'"),
    ],
)
def test_an_option_that_cannot_work_is_named(tiny_cnn, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_cnn(**options)


def test_a_model_without_one_map_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'coat_tiny' gives list, not tokens"):
        TimmEncoder("coat_tiny", weights=False)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 64, 64),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 1, 64, 64, dtype=torch.uint8),
    ],
)
def test_what_is_no_batch_of_uint8_images_is_refused(tiny_cnn, images):
    with pytest.raises(DataError, match=r"uint8 of \(I, 3, H, W\) is expected"):
        tiny_cnn()(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_encoder_in_another_precision_reads_the_same_uint8_images(dtype, tiny_cnn, pictures):
    encoder, images = tiny_cnn(dim=8).eval(), pictures(64)
    expected = encoder(images)
    found = encoder.to(dtype)(images)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
