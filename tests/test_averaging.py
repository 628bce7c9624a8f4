"""The exponential moving average of weights, against its closed form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from capdistill.averaging import WeightAverage, average_weights
from capdistill.errors import CheckpointError, ConfigError


def values_of(layer: nn.Module) -> list[Tensor]:
    return [parameter.detach().double().clone() for parameter in layer.parameters()]


def move(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))


def closed_form(path: list[Tensor], decay: float) -> Tensor:
    """The weighted sum of all weights so far: path[0] before the first update, path[n + 1] after n.

    Weight n + 1 has the share (1 - d_n) times the product of all later decays.
    """
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(path) - 1)]
    shares = [1.0, *(1 - d for d in decays)]
    for n in range(len(path)):
        for later in decays[n:]:
            shares[n] *= later
    assert sum(shares) == pytest.approx(1.0)
    return torch.stack([share * value for share, value in zip(shares, path, strict=True)]).sum(0)


@settings(max_examples=20, deadline=None)
@given(decay=st.floats(0, 0.9999), steps=st.integers(0, 30), seed=st.integers(0, 999))
def test_the_average_equals_its_closed_form(decay: float, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(2, 3).double()
    average, paths = WeightAverage(layer, decay), [values_of(layer)]
    for _ in range(steps):
        move(layer)
        average.update()
        paths.append(values_of(layer))
    for found, path in zip(average.average, zip(*paths, strict=True), strict=True):
        assert_close(found, closed_form(list(path), decay), rtol=1e-10, atol=1e-12)


def test_a_constant_average_to_the_last_bit() -> None:
    layer = nn.Linear(5, 7)
    average = WeightAverage(layer, 0.999)
    for _ in range(50):
        average.update()
    assert all(torch.equal(a, w) for a, w in zip(average.average, average.weights, strict=True))


def test_the_block_gives_the_average_and_then_the_weights_back_also_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    average = WeightAverage(layer, 0.5)
    move(layer)
    average.update()
    own, mean = values_of(layer), [value.double() for value in average.average]
    assert not torch.equal(own[0], mean[0])

    def leave() -> None:
        with average.applied(), average.applied():  # again inside: no change
            assert all(torch.equal(v, m) for v, m in zip(values_of(layer), mean, strict=True))
            with pytest.raises(ConfigError, match=r"step was made inside averaged\(\)"):
                average.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert all(torch.equal(v, o) for v, o in zip(values_of(layer), own, strict=True))
    average.update()  # and training continues


def test_halves_are_averaged_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(layer.weight, 1.0)
    average = WeightAverage(layer, 0.999)
    average.updates = 10**6
    nn.init.constant_(layer.weight, 2.0)
    average.update()  # 1.001 is no bfloat16
    assert average.average[0].dtype == torch.float32
    assert float(average.average[0]) == pytest.approx(1.001)


def test_frozen_parts_are_not_stored_and_statistics_that_move_are() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).requires_grad_(False)
            self.head = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
            self.tied = self.head[0]

        def train(self, mode: bool = True) -> Model:
            super().train(mode)
            self.trunk.eval()
            return self

    model = Model().eval()
    average = WeightAverage(model, 0.9)
    statistics = ["head.1.running_mean", "head.1.running_var"]
    trained = ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    assert average.names == [*trained, *statistics]
    assert not model.head.training  # as it was

    model.train()
    model.train()
    model.head(1.0 + torch.randn(8, 2, 3, 3))
    mean = model.head[1].running_mean.clone()
    assert mean.abs().min() > 0
    average.update()
    assert_close(average.average[-2], 0.9 * mean)  # it began at 0, with decay 0.1
    with average.applied():
        assert_close(model.head[1].running_mean, 0.9 * mean)
    assert torch.equal(model.head[1].running_mean, mean)


def test_a_copy_that_holds_the_average_equals_one_that_is_held_here() -> None:
    layer = nn.Linear(2, 2)
    other = copy.deepcopy(layer)
    held, given_ = WeightAverage(layer, 0.9), WeightAverage(layer, 0.9, into=other)
    for _ in range(3):
        move(layer)
        held.update()
        given_.update()
    assert torch.equal(other.weight, held.average[0])
    assert torch.equal(other.bias, held.average[1])


def test_a_saved_average_continues_bit_for_bit() -> None:
    layer = nn.Linear(2, 2)
    average = WeightAverage(layer, 0.9)
    move(layer)
    average.update()
    state = copy.deepcopy(average.state_dict())
    other = WeightAverage(layer, 0.9)
    other.load_state_dict(state)
    move(layer)
    for each in (average, other):
        each.update()
    assert torch.equal(average.average[0], other.average[0])

    average.restart()
    assert average.updates == 0
    assert torch.equal(average.average[0], layer.weight)
    with pytest.raises(CheckpointError, match=r"of another model; they differ in weight, bias"):
        WeightAverage(nn.Linear(3, 3), 0.9).load_state_dict(state)


@pytest.mark.parametrize("decay", [1, -0.1, float("nan"), "0.9", None])
def test_a_decay_out_of_range_is_refused(decay: Any) -> None:
    with pytest.raises(ConfigError, match="WeightAverage: decay"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        WeightAverage(nn.Linear(1, 1).requires_grad_(False), 0.9)


def test_an_average_knows_whose_weights_it_follows() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    average = WeightAverage(model[0], 0.9)
    assert average.follows(model)
    assert average.follows(model[0])
    assert not average.follows(model[1])
    assert not average.follows(copy.deepcopy(model))


def test_a_copy_takes_over_buffers_that_do_not_move_when_a_state_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(nn.Module())
    model[2].register_buffer("scale", torch.ones(2))
    other = copy.deepcopy(model)
    average = WeightAverage(model, 0.9, into=other)
    state = copy.deepcopy(average.state_dict())
    model[2].scale.fill_(3.0)
    average.load_state_dict(state)
    assert torch.equal(other[2].scale, model[2].scale)


# -- the mean of several trainings ----------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.2, 0.3, 0.5]])
def test_the_mean_of_weights_is_that_of_float64(weights: list[float] | None) -> None:
    states = [nn.BatchNorm1d(3).state_dict() for _ in range(3)]
    for number, state in enumerate(states):
        generator = torch.Generator().manual_seed(number)
        for value in state.values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
        state["num_batches_tracked"] += number + 1
    found = average_weights(states, weights)
    shares = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    for name in ("weight", "bias", "running_mean", "running_var"):
        stacked = torch.stack([state[name].double() for state in states])
        expected = (shares / shares.sum()) @ stacked
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-7)
    assert int(found["num_batches_tracked"]) == 1


def test_the_mean_of_half_precision_is_rounded_once() -> None:
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125])
    found = average_weights([{"w": one}, {"w": other.to(torch.bfloat16)}], [1, 3])
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].item() == 1.0078125


def test_the_mean_is_a_copy_of_what_is_averaged() -> None:
    state = {"w": torch.ones(2), "n": torch.tensor(3)}
    found = average_weights([state])
    found["w"] += 1
    found["n"] += 1
    assert state["w"].tolist() == [1.0, 1.0]
    assert int(state["n"]) == 3


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], None, "no state dict was given"),
        (None, None, "NoneType was given; expected a list of state dicts"),
        ("runs/a", None, "str was given; expected a list"),
        ({"w": torch.ones(1)}, None, "dict was given; expected a list"),
        ([torch.nn.Linear(1, 1)], None, "Linear was given; expected a list"),
        ([{"w": torch.ones(1)}], [1.0, 2.0], "2 weights were given for 1 state dicts"),
        ([{"w": torch.ones(1)}], [0.0], "a weight"),
        ([{"w": torch.ones(1)}], ["1"], "a weight"),
        ([{"w": torch.ones(1)}, {"w": torch.ones(2)}], None, "they differ in w"),
        ([{"w": torch.ones(1)}, {"v": torch.ones(1)}], None, "they differ in w, v"),
    ],
)
def test_what_cannot_be_averaged_is_refused(states: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"average_weights: .*{message}"):
        average_weights(states, weights)
