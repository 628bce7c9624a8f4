"""What is frozen stays frozen in any encoder that a user writes, whatever `train()` is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capdistill.encoders.base import Encoder, hash_values
from capdistill.errors import ConfigError


class Flat(Encoder):
    """Convolution, batch norm and dropout are children of the encoder itself."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.dim, self.token_dim, self.tokens, self.grid, self.image_size = 4, 6, 4, (2, 2), 8
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.head_drop, self.project = nn.Dropout(0.5), nn.Linear(6, 4)
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(not frozen)

    def backbone_parameters(self):
        yield from self.conv.parameters()
        yield from self.norm.parameters()

    def trunk(self, images):
        maps = self.drop(self.norm(self.conv(self.normalise(images))))
        return F.dropout(maps, 0.5, self.training).flatten(2).transpose(1, 2)

    def head(self, tokens):
        return self.project(self.head_drop(tokens))


class Declared(Flat):
    def trunk_parameters(self):
        return self.backbone_parameters()


class Nested(Flat):
    """The same within one child, whose last convolution may be trained."""

    def __init__(self, frozen: bool = True, last: bool = False) -> None:
        super().__init__(frozen)
        self.body = nn.Sequential(
            self.conv, self.norm, self.drop, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5)
        )
        self.body[3:].requires_grad_(last)

    def trunk(self, images):
        return self.body(self.normalise(images)).flatten(2).transpose(1, 2)


KINDS = [Flat, Declared, Nested]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_gives_in_training_what_it_gives_in_evaluation(kind, pictures):
    encoder = kind()
    assert encoder.trunk_frozen
    buffers = {key: value.clone() for key, value in encoder.named_buffers()}
    images = pictures(8)
    expected = encoder.eval().trunk(images)
    encoder.train()
    assert torch.equal(encoder.trunk(images), expected)
    assert torch.equal(encoder.frozen_stages(images), expected)
    encoder(images).sum().backward()
    assert all(torch.equal(buffers[key], value) for key, value in encoder.named_buffers())


@pytest.mark.parametrize("wrap", [lambda e: nn.Sequential(e), lambda e: nn.ModuleDict({"e": e})])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_that_is_told_to_train_does_not_change_that(kind, wrap, pictures):
    encoder = kind()
    parent = wrap(encoder)
    expected = parent.eval() and encoder.trunk(pictures(8))
    parent.train()
    assert torch.equal(encoder.trunk(pictures(8)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_keeps_its_dropout_and_the_encoder_its_mode(kind, pictures):
    encoder = kind().train()
    images = pictures(8)
    assert encoder.training
    assert encoder.head_drop.training
    assert not torch.equal(encoder(images), encoder(images))
    assert encoder.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_trunk_is_in_training_mode(kind, pictures):
    encoder = kind(frozen=False).train()
    assert not encoder.trunk_frozen
    encoder.trunk(pictures(8))
    assert int(encoder.norm.num_batches_tracked) == 1
    assert encoder.norm.training


def test_trained_stages_keep_their_dropout_and_statistics_frozen_ones_do_not(pictures):
    encoder = Nested(last=True).train()
    assert not encoder.trunk_frozen
    assert [part.training for part in encoder.body] == [False, False, False, True, True, True]
    encoder.trunk(pictures(8))
    assert int(encoder.body[1].num_batches_tracked) == 0
    assert int(encoder.body[4].num_batches_tracked) == 1


def test_freezing_later_counts_from_the_next_call_on(pictures):
    encoder = Flat(frozen=False).train()
    encoder.requires_grad_(False)
    before = encoder.norm.running_mean.clone()
    assert encoder.trunk_frozen
    assert torch.equal(encoder.trunk(pictures(8)), encoder.trunk(pictures(8)))
    assert torch.equal(encoder.norm.running_mean, before)


def test_a_trained_parameter_that_nobody_declared_is_not_called_frozen():
    encoder = Flat()
    encoder.norm.bias.requires_grad_(True)
    assert not encoder.trunk_frozen
    encoder.norm.bias.requires_grad_(False)
    assert encoder.trunk_frozen


def test_trunk_parameters_that_leave_some_out_are_refused(pictures):
    class Forgetful(Flat):
        def trunk_parameters(self):
            return self.norm.parameters()

    encoder = Forgetful().train()
    encoder.conv.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"Forgetful\.trunk depends on .* leaves out"):
        encoder(pictures(8))
    assert encoder.training
    assert encoder.drop.training


def change(encoder: Declared, how: str) -> None:
    weight = encoder.conv.weight
    if how == "data":
        weight.data.mul_(2)
    elif how == "data of a buffer":
        encoder.norm.running_mean.data.add_(1)
    elif how == "copy_":
        with torch.no_grad():
            weight.copy_(weight * 2)
    elif how == "load_state_dict":
        encoder.load_state_dict({k: v + 1 for k, v in encoder.state_dict().items()})
    elif how == "numpy":
        weight.detach().numpy()[:] *= 2
    elif how == "swapped module":
        encoder.drop = nn.ReLU()
    elif how == "setting":
        encoder.norm.eps = 0.1


@pytest.mark.parametrize(
    "how",
    [
        "data",
        "data of a buffer",
        "copy_",
        "load_state_dict",
        "numpy",
        "swapped module",
        "setting",
    ],
)
def test_a_hash_is_of_the_values_and_settings(how):
    encoder = Declared()
    before = hash_values(encoder)
    assert hash_values(encoder.train()) == hash_values(encoder.eval()) == before
    change(encoder, how)
    assert hash_values(encoder) != before


@pytest.mark.parametrize("attribute", ["mean", "std", "image_size", "name"])
def test_a_fingerprint_follows_the_preprocessing(tiny_cnn, attribute):
    encoder = tiny_cnn(trainable=1)
    before = encoder.fingerprint(), encoder.trunk_fingerprint()
    new = {"image_size": 96, "name": "other"}.get(attribute, (0.1, 0.2, 0.3))
    setattr(encoder, attribute, new)
    assert encoder.fingerprint() != before[0]
    assert encoder.trunk_fingerprint() != before[1]


@pytest.mark.parametrize("trainable", ["none", 1])
def test_a_fingerprint_after_data_is_another_one(tiny_cnn, trainable):
    encoder = tiny_cnn(trainable=trainable)
    keys = {encoder.fingerprint()}
    encoder.backbone.conv_stem.weight.data.mul_(2)
    keys.add(encoder.fingerprint())
    encoder.backbone.bn1.running_var.data.mul_(2)
    keys.add(encoder.fingerprint())
    encoder.backbone.blocks[0].load_state_dict(
        {key: value + 1 for key, value in encoder.backbone.blocks[0].state_dict().items()}
    )
    keys.add(encoder.fingerprint())
    assert len(keys) == 4


def test_a_fingerprint_of_frozen_stages_ignores_what_is_trained(tiny_cnn):
    encoder = tiny_cnn(trainable=1)
    before = encoder.fingerprint()
    with torch.no_grad():
        encoder.backbone.conv_head.weight.add_(1)
        encoder.backbone.bn2.running_mean.add_(1)
    assert encoder.fingerprint() == before
    assert tiny_cnn(trainable=2).fingerprint() != tiny_cnn(trainable=1).fingerprint()
