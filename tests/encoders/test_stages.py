"""A trunk is its frozen stages followed by the others: to the last bit, with the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from capdistill.encoders.stages import find_cut
from capdistill.encoders.timm import TimmEncoder
from capdistill.encoders.torchvision import TorchvisionEncoder

TIMM = [
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "test_vit_relpos",
    "test_convnext",
    "test_byobnet",
    "test_maxvit",
    "test_mambaout",
]
TORCHVISION = ["resnet18", "densenet121", "shufflenet_v2_x0_5"]


def make(name: str, trainable: int, **options):
    torch.manual_seed(0)
    kind = TorchvisionEncoder if name in TORCHVISION else TimmEncoder
    side = None if name == "test_maxvit" else 64  # its windows fit its own size only
    encoder = kind(name, dim=8, weights=False, image_size=side, trainable=trainable, **options)
    with torch.no_grad():  # statistics and scales as after some training, so that all act
        for part in encoder.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
    return encoder


@pytest.mark.parametrize("trainable", [1, 2])
@pytest.mark.parametrize("name", TIMM + TORCHVISION)
def test_both_parts_give_the_trunks_tokens_bit_for_bit(name, trainable, pictures):
    encoder = make(name, trainable).eval()
    images = pictures(encoder.image_size, count=3)
    cached = encoder.frozen_stages(images)
    assert not cached.requires_grad
    assert torch.equal(encoder.remaining_stages(cached), encoder.trunk(images))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "resnet18"])
def test_trained_stages_learn_from_cached_values_what_they_learn_from_pixels(name, pictures):
    encoder = make(name, 1)
    images = pictures(64, count=4)
    plain, quick = copy.deepcopy(encoder).train(), copy.deepcopy(encoder).train()

    plain(images).square().sum().backward()
    quick.head(quick.remaining_stages(quick.frozen_stages(images))).square().sum().backward()

    for (key, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert one.requires_grad == (one.grad is not None), key
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), key
    for (key, one), other in zip(plain.named_buffers(), quick.buffers(), strict=True):
        assert torch.equal(one, other), key  # batch norm of the trained stages counted the batch


def test_the_frozen_stages_do_not_run_again(pictures):
    encoder = make("test_efficientnet", 1)
    cached = encoder.frozen_stages(pictures(64))
    calls = []
    for name, part in encoder.backbone.named_modules():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    encoder.remaining_stages(cached)
    assert "conv_head" in calls
    assert not [name for name in calls if name.startswith(("conv_stem", "bn1", "blocks.0"))]


def test_a_saved_half_precision_map_gives_nearly_the_same_tokens(pictures):
    encoder = make("test_resnet", 1).eval()
    images = pictures(64)
    stored = encoder.frozen_stages(images).half().contiguous().clone()  # as it lies on disk
    expected = encoder.trunk(images)
    torch.testing.assert_close(
        encoder.remaining_stages(stored.float()), expected, rtol=1e-2, atol=1e-2
    )


def test_the_cut_follows_what_is_trained(pictures):
    encoder = make("test_resnet", 1)
    widths = []
    for stage in ("layer4", "layer3", "layer2"):
        encoder.backbone.get_submodule(stage).requires_grad_(True)
        widths.append(encoder.frozen_stages(pictures(64)).shape)
    assert widths == [(2, 4, 4, 192), (2, 8, 8, 48), (2, 16, 16, 32)]


def test_a_trunk_that_is_all_frozen_or_all_trained_is_not_cut(pictures):
    images = pictures(64)
    frozen, trained = make("test_resnet", 0), make("test_resnet", "all")
    assert torch.equal(frozen.frozen_stages(images), frozen.trunk(images))
    assert frozen.fingerprint() is not None
    assert trained.fingerprint() is None
    assert trained.trunk_fingerprint() == frozen.trunk_fingerprint()  # for a teacher


class TwoPaths(nn.Module):
    """The second stage also reads what the first one read: one tensor does not tell it all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.second = nn.Conv2d(4, 4, 1)
        self.gate = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, pixels):
        stem = self.first(pixels)
        return self.second(stem) + self.gate * stem  # a gate of zero would hide a wrong cut


class Uncalled(nn.Module):
    """A trained weight that acts without its module being called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1).requires_grad_(False), nn.Conv2d(4, 4, 1))
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, pixels):
        return self.second(self.first[0](pixels) * self.first[1].weight.mean())


@pytest.mark.parametrize("kind", [TwoPaths, Uncalled])
def test_a_backbone_that_cannot_be_cut_is_not_cut(kind):
    model = kind()
    assert find_cut(model, lambda backbone, pixels: backbone(pixels), (3, 8, 8)) is None


def test_looking_for_the_cut_changes_nothing():
    encoder = make("test_efficientnet", 1, drop_path=0.2)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    flags = [part.training for part in encoder.modules()]
    state = torch.get_rng_state()
    assert encoder.fingerprint()
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in encoder.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in encoder.modules())
