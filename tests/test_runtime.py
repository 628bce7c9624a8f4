"""Modes, devices and random state: what a block changes comes back after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capdistill.runtime import evaluating, inference, on_device


def model() -> nn.Module:
    built = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    built[2].eval()
    return built


@pytest.mark.parametrize(
    "block",
    [evaluating, inference, lambda module: on_device([module, "no module"], torch.device("cpu"))],
    ids=["evaluating", "inference", "on_device"],
)
def test_every_flag_comes_back_also_after_an_error(block):
    module = model()
    flags = [part.training for part in module.modules()]
    seen = []

    def fail():
        with block(module):
            seen.extend(part.training for part in module.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(seen)
    assert [part.training for part in module.modules()] == flags
    assert torch.is_grad_enabled()


def test_inference_has_no_gradients_and_restores_the_random_state_on_request():
    module, state = model(), torch.get_rng_state()
    with inference(module, fork_rng=True):
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with inference(module):
        torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), state)
