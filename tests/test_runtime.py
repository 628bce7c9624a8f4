"""Modes, devices and random state: what a block changes comes back after it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from capdistill.data.workers import max_workers
from capdistill.errors import ConfigError
from capdistill.runtime import evaluating, inference, isolated, on_device, pick_device


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


def test_each_process_of_a_launcher_takes_its_own_cuda_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda")  # without a launcher
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2, but torch finds 2 CUDA devices"):
        pick_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process is shown one
    assert pick_device("auto") == torch.device("cuda")


def test_processes_of_one_computer_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = max_workers("fork")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert max_workers("fork") == max(cores // 2, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert max_workers("fork") == 1


def test_what_the_caller_set_for_all_of_torch_stays_outside() -> None:
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with isolated():
            torch.manual_seed(1)
            random.seed(1)
            np.random.seed(1)
            value = torch.ones(2, 2, requires_grad=True)
            product = value @ value
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta
    assert product.requires_grad
    assert product.dtype == torch.float32
    assert product.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_a_model_captions_on_the_cpu_whatever_the_default_device_is() -> None:
    with inference(nn.Identity()), torch.device("cpu"):
        assert torch.empty(1).device.type == "cpu"
    with torch.device("meta"), inference(nn.Identity()):
        assert torch.empty(1).device.type == "cpu"
