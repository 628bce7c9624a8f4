"""What is frozen stays as it was: weights, statistics, drop-out, and no graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capdistill.encoders.timm import TimmEncoder
from capdistill.encoders.torchvision import TorchvisionEncoder


def trained(encoder) -> set[str]:
    return {key for key, p in encoder.backbone.named_parameters() if p.requires_grad}


def step(encoder, images) -> None:
    encoder.train()
    loss = encoder(images).square().sum()
    loss.backward()
    torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1).step()


def test_none_trains_the_head_alone(tiny_cnn):
    encoder = tiny_cnn(dim=8, refine="post")

    assert encoder.trunk_frozen
    assert trained(encoder) == set()
    assert all(p.requires_grad for p in encoder.project.parameters())


def test_all_trains_everything(tiny_vit):
    encoder = tiny_vit(trainable="all")

    assert not encoder.trunk_frozen
    assert all(p.requires_grad for p in encoder.parameters())


def test_the_last_stage_of_a_cnn_takes_its_final_convolution_with_it(tiny_cnn):
    keys = trained(tiny_cnn(trainable=1))

    assert {key.split(".")[0] for key in keys} == {"blocks", "conv_head", "bn2"}
    assert {key.split(".")[1] for key in keys if key.startswith("blocks")} == {"4"}


def test_the_last_block_of_a_vit_takes_the_final_norm_with_it(tiny_vit):
    keys = trained(tiny_vit(trainable=2))

    assert {".".join(key.split(".")[:2]) for key in keys} == {
        "blocks.4",
        "blocks.5",
        "norm.weight",
        "norm.bias",
    }


def test_what_follows_the_last_stage_belongs_to_it():
    with torch.device("meta"):
        encoder = TimmEncoder("densenet121", weights=False, trainable=1)

    assert {".".join(key.split(".")[:2]) for key in trained(encoder)} == {
        "features.denseblock4",
        "features.norm5",
    }


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("densenet121", {"features.denseblock4", "features.norm5"}),
        ("swin_t", {"features.7", "norm"}),
        ("resnet18", {"layer4"}),
    ],
)
def test_a_final_norm_of_torchvision_belongs_to_the_last_stage(name, stages):
    with torch.device("meta"):
        encoder = TorchvisionEncoder(name, weights=False, trainable=1)

    keys = trained(encoder)
    assert {stage for stage in stages if any(key.startswith(stage) for key in keys)} == stages
    assert all(key.startswith(tuple(stages)) for key in keys)


@pytest.mark.parametrize("trainable", ["none", 1, 2])
def test_frozen_stages_do_not_change_in_training(tiny_cnn, pictures, trainable):
    encoder = tiny_cnn(dim=8, trainable=trainable, drop_path=0.5)
    keys = trained(encoder)
    modules = {key.rpartition(".")[0] for key in keys}
    before = {key: value.clone() for key, value in encoder.backbone.state_dict().items()}

    step(encoder, pictures(64, count=4))

    after = encoder.backbone.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed if trainable != "none" else not changed
    assert {key.rpartition(".")[0] for key in changed} <= modules


def test_trained_stages_keep_train_mode_statistics(tiny_cnn, pictures):
    encoder = tiny_cnn(trainable=1)

    step(encoder, pictures(64, count=4))

    assert int(encoder.backbone.bn2.num_batches_tracked) == 1
    assert int(encoder.backbone.bn1.num_batches_tracked) == 0


def test_frozen_parts_are_in_eval_mode_and_come_back_to_it(tiny_vit):
    encoder = tiny_vit(trainable=1, drop_path=0.2, dropout=0.1, dim=8)

    for _ in range(2):
        encoder.eval()
        assert not any(part.training for part in encoder.modules())
        encoder.train()
        blocks = encoder.backbone.blocks
        assert not any(part.training for part in blocks[4].modules())
        assert all(part.training for part in blocks[5].modules())
        assert all(part.training for part in encoder.project.modules())


def test_a_frozen_trunk_gives_the_same_tokens_in_training_and_in_evaluation(tiny_vit, pictures):
    encoder = tiny_vit(drop_path=0.9)
    images = pictures(64)

    torch.testing.assert_close(encoder.train().trunk(images), encoder.eval().trunk(images))


def test_frozen_stages_build_no_graph(tiny_cnn, pictures):
    encoder = tiny_cnn(trainable=1)
    graph = {}
    for key in ("bn1", "blocks.3", "blocks.4"):
        encoder.backbone.get_submodule(key).register_forward_hook(
            lambda _, __, output, key=key: graph.update({key: output.requires_grad})
        )

    encoder(pictures(64))

    assert graph == {"bn1": False, "blocks.3": False, "blocks.4": True}


def test_a_frozen_trunk_gives_tokens_without_a_graph(tiny_cnn, pictures):
    encoder = tiny_cnn(dim=8)

    assert not encoder.trunk(pictures(64)).requires_grad
    assert encoder(pictures(64)).requires_grad


def test_freezing_by_hand_counts_as_frozen(tiny_cnn):
    encoder = tiny_cnn(trainable="all")

    encoder.requires_grad_(False).train()

    assert encoder.trunk_frozen
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(part.training for part in norms)
