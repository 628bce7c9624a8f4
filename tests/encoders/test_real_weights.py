"""Real weights load, and what they see is what timm sees."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from capdistill.encoders.timm import TimmEncoder
from capdistill.errors import CheckpointError

pytestmark = pytest.mark.shared

LITE0 = "tf_efficientnet_lite0.safetensors"
DINO = "vit_small_patch14_dinov2.fp16.safetensors"


@pytest.mark.parametrize(
    ("name", "file", "side", "grid"),
    [
        ("tf_efficientnet_lite0", LITE0, 224, (7, 7)),
        ("tf_efficientnet_lite1", "tf_efficientnet_lite1.fp16.safetensors", 240, (8, 8)),
        ("tf_efficientnet_lite2", "tf_efficientnet_lite2.fp16.safetensors", 260, (9, 9)),
    ],
)
def test_lite_weights_give_timms_own_tokens(shared_weights, pictures, name, file, side, grid):
    encoder = TimmEncoder(name, weights=shared_weights / file)
    images = pictures(side, count=1)

    tokens = encoder.trunk(images)

    model = timm.create_model(name, checkpoint_path=str(shared_weights / file)).eval()
    with torch.no_grad():
        expected = model.forward_features((images / 255 - 0.5) / 0.5).flatten(2).mT
    assert (encoder.image_size, encoder.grid) == (side, grid)
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)


def test_dinov2_positions_are_resampled_from_37_to_16(shared_weights, pictures):
    encoder = TimmEncoder("vit_small_patch14_dinov2", weights=shared_weights / DINO, image_size=224)
    images = pictures(224, count=1)

    tokens = encoder.trunk(images)

    assert (encoder.tokens, encoder.dim, encoder.grid) == (257, 384, (16, 16))
    state = {key: value.float() for key, value in load_file(shared_weights / DINO).items()}
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (16, 16), num_prefix_tokens=1
    )
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model.forward_features(encoder.normalise(images))
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixed_real_weights_have_the_fingerprint_of_the_originals(
    shared_weights, tmp_path, prefix
):
    state = load_file(shared_weights / LITE0)
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "w.safetensors")

    plain, prefixed = (
        TimmEncoder("tf_efficientnet_lite0", weights=path).fingerprint()
        for path in (shared_weights / LITE0, tmp_path / "w.safetensors")
    )

    assert plain == prefixed


def test_weights_of_another_size_list_missing_names_and_shapes(shared_weights):
    with pytest.raises(CheckpointError) as error:
        TimmEncoder("tf_efficientnet_lite2", weights=shared_weights / LITE0)

    message = str(error.value)
    assert "tf_efficientnet_lite2" in message
    assert LITE0 in message
    assert "missing: blocks." in message
