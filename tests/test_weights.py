"""Case 13: weights are loaded exactly, whatever wrapped them, or refused by name."""

from __future__ import annotations

import json
import struct

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from capdistill import weights
from capdistill.encoders.timm import TimmEncoder
from capdistill.errors import CheckpointError
from capdistill.weights import load_exactly, read_state_dict, strip_prefixes


@pytest.fixture
def full_state():
    """A classifier's state as its users have it: 1,000 classes included."""
    return timm.create_model("test_efficientnet").state_dict()


@pytest.fixture
def load(tmp_path):
    def read(state, model="test_efficientnet", **options):
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
        return TimmEncoder(model, weights=tmp_path / "w.safetensors", **options)

    return read


def assert_loaded(encoder, state):
    for key, value in encoder.backbone.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.model."]
)
def test_wrapper_prefixes_load_bit_for_bit(load, full_state, prefix):
    encoder = load({prefix + key: value for key, value in full_state.items()})

    assert_loaded(encoder, full_state)


def test_a_wrapper_within_a_name_is_removed_too(load, full_state):
    inside = {k.replace("blocks.2.", "blocks.2._orig_mod."): v for k, v in full_state.items()}

    assert_loaded(load(inside), full_state)


def test_weights_held_twice_are_refused(load, full_state):
    twice = {**full_state, "module.conv_stem.weight": full_state["conv_stem.weight"] + 1}

    with pytest.raises(CheckpointError, match=r"'conv_stem.weight' and 'module.conv_stem.weight'"):
        load(twice)


def test_a_renamed_key_is_shown_with_its_old_and_new_name(load, full_state):
    full_state["conv_steam.weight"] = full_state.pop("conv_stem.weight")

    with pytest.raises(CheckpointError) as error:
        load(full_state)

    assert "1 missing: conv_stem.weight (" in str(error.value)
    assert "1 unexpected: conv_steam.weight (" in str(error.value)


@pytest.mark.parametrize("key", ["bn2.weight", "bn1.running_mean", "bn1.num_batches_tracked"])
def test_a_removed_key_is_refused_by_name(load, full_state, key):
    del full_state[key]

    with pytest.raises(CheckpointError, match=f"1 missing: {key}"):
        load(full_state)


def test_a_wrong_shape_is_refused_with_both_shapes(load, full_state):
    full_state["bn2.weight"] = torch.ones(7)

    with pytest.raises(CheckpointError, match=r"bn2.weight: the file has \(7,\), the model \(256,"):
        load(full_state)


def test_a_refused_file_changes_nothing():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()

    with pytest.raises(CheckpointError, match="missing: bias"):
        load_exactly(layer, {"weight": torch.zeros(2, 2)}, "the file")

    assert torch.equal(layer.weight, before)


def test_integers_do_not_become_weights():
    with pytest.raises(CheckpointError, match=r"weight: the file has torch.int64"):
        load_exactly(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1).long()}, "the file")


def test_weights_of_another_model_are_refused(load, full_state):
    with pytest.raises(CheckpointError, match="missing: cls_token"):
        load(full_state, model="test_vit")


def test_halves_are_converted(load, full_state):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in full_state.items()}

    encoder = load(halves)

    assert next(encoder.trunk_parameters()).dtype == torch.float32
    assert torch.equal(encoder.backbone.bn2.weight, halves["bn2.weight"].float())


def test_a_file_without_any_batch_counter_is_complete(load, full_state):
    kept = {k: v for k, v in full_state.items() if not k.endswith("num_batches_tracked")}

    assert_loaded(load(kept), full_state)


def test_position_embeddings_are_resampled_to_the_grid(load):
    state = timm.create_model("test_vit").state_dict()  # 10 x 10 places and CLS

    encoder = load(state, model="test_vit", image_size=64)

    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(encoder.backbone.pos_embed.data, expected)
    assert encoder.grid == (4, 4)


def test_patches_of_another_size_are_not_resampled_in_silence(load):
    state = timm.create_model("test_vit").state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(64, 3, 8, 8)

    with pytest.raises(CheckpointError, match=r"proj.weight: the file has \(64, 3, 8, 8\)"):
        load(state, model="test_vit")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_read_alone_or_as_training_scripts_wrap_it(tmp_path, wrap):
    state = {"weight": torch.ones(2)}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "any.name")

    assert torch.equal(read_state_dict(tmp_path / "any.name")["weight"], torch.ones(2))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")

    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04", b"\x80\x04", "half"])
def test_a_truncated_or_foreign_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)

    with pytest.raises(CheckpointError, match=r"w.safetensors.*bytes\) cannot be read"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")

    with pytest.raises(CheckpointError, match=r"holds .*(not names with tensors|than tensors)"):
        read_state_dict(tmp_path / "w.pt")


def test_an_absent_file_is_named_with_the_ways_out(tmp_path):
    with pytest.raises(CheckpointError, match=r"No weights file at .*nosuch.*weights=False"):
        TimmEncoder("test_vit", weights=tmp_path / "nosuch")


def test_names_that_are_expected_keep_their_prefix():
    state = {"module.weight": torch.ones(1), "model.model.bias": torch.ones(1)}

    assert list(strip_prefixes(state, ["module.weight", "model.bias"])) == [
        "module.weight",
        "model.bias",
    ]


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_a_safetensors_file_is_known_whatever_its_length_begins_with(first, tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    length = next(n for n in range(len(header), 1000) if n % 256 == first)
    size = struct.pack("<Q", length)
    path = tmp_path / "w.safetensors"
    path.write_bytes(size + header.ljust(length) + struct.pack("<f", 2.0))
    assert read_state_dict(path) == {"w": torch.tensor([2.0])}
    assert not weights._is_torch(path)


@pytest.mark.parametrize(
    "name",
    [
        "model.module.encoder.model.weight",
        "module.model.module._orig_mod.encoder.model.weight",
        "encoder._orig_mod.model.weight",
        "module.encoder._orig_mod.module.model.weight",
        "encoder.model._orig_mod.weight",
        "encoder.model.module.weight",
    ],
)
def test_wrappers_are_taken_out_at_any_depth_and_a_part_of_that_name_stays(name):
    expected = ["encoder.model.weight", "encoder.model.bias"]
    assert list(strip_prefixes({name: torch.ones(1)}, expected)) == ["encoder.model.weight"]


def test_a_name_that_fits_nothing_without_its_wrappers_is_left_for_the_report():
    state = {"module.encoder.weights": torch.ones(1)}
    assert strip_prefixes(state, ["encoder.weight"]) == state


def test_a_path_below_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert list(read_state_dict("~/w.pt")) == ["w"]


def test_the_name_of_a_file_does_not_decide_how_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.ones(2)}, path)
    assert read_state_dict(path)["weight"].tolist() == [1, 1]
