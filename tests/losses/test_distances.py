"""Distances of vectors, in float32, without a gradient for the target. Oracle: torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.losses.distances import (
    SHORTEST,
    cosine_distance,
    normalised_distance,
    squared_distance,
)
from tests.losses.test_divergence import draw, grad_of, property_test


@property_test
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), width=st.integers(2, 9))
def test_distances_of_vectors_equal_torch(seed, rows, width):
    student, teacher = draw(seed, rows, width), draw(seed + 1, rows, width)
    assume(min(x.std(1, correction=0).min() for x in (student, teacher)) > SHORTEST)

    def mse(x, y):
        return F.mse_loss(x, y, reduction="none").mean(1).sum()

    def normalise(x):
        return F.layer_norm(x, [width], eps=0.0)

    oracles = {
        squared_distance: lambda x: mse(x, teacher),
        normalised_distance: lambda x: mse(normalise(x), normalise(teacher)),
        cosine_distance: lambda x: (1 - F.cosine_similarity(x, teacher)).sum(),
    }
    for function, oracle in oracles.items():
        assert function(student, teacher).shape == (rows,)
        found = grad_of(lambda x, f=function: f(x, teacher).sum(), student)
        assert_close(found, grad_of(oracle, student))


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_scale_and_offset_do_not_count_once_vectors_are_layer_normalised(scale, offset):
    x, y = draw(0, 4, 16), draw(1, 4, 16)
    expected = normalised_distance(x, y)
    assert_close(normalised_distance(scale * x + offset * scale, y), expected)
    assert_close(normalised_distance(x, scale * y), expected)
    assert_close(normalised_distance((scale * x).float(), x.float()), torch.zeros(4))


def test_a_spread_below_the_floor_counts_as_the_floor():
    x = draw(0, 1, 8)
    x = (x - x.mean()) / x.std(correction=0)
    assert_close(normalised_distance(1e-5 * x, x), torch.tensor([0.81], dtype=x.dtype))


@pytest.mark.parametrize("function", [squared_distance, normalised_distance, cosine_distance])
def test_a_vector_is_at_no_distance_from_itself(function):
    vector = draw(0, 5, 8, dtype=torch.float32)
    value, gradient = grad_of(lambda x: function(x, vector).sum(), vector)
    assert value.abs() < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("function", [squared_distance, normalised_distance, cosine_distance])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_vector_has_a_finite_distance_and_gradient(function, dtype):
    zero, target = torch.zeros(1, 4, dtype=dtype), torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    for mine, theirs in ((zero, target), (target, zero), (zero, zero)):
        value, gradient = grad_of(lambda x, y=theirs: function(x, y).sum(), mine)
        assert value.isfinite()
        assert gradient.abs().max() <= 1e4


@pytest.mark.parametrize("function", [squared_distance, normalised_distance, cosine_distance])
def test_the_targets_get_no_gradient(function):
    student, teacher = draw(0, 2, 4).requires_grad_(), draw(1, 2, 4).requires_grad_()
    function(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
