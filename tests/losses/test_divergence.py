"""Law 2: divergences in float32 log-space, masked first. Oracles: float64, torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.losses.divergence import (
    cosine_distance,
    cross_entropy,
    kl_divergence,
    normalised_distance,
    squared_distance,
    valid_rows,
)

ONE = torch.ones(1, 1, dtype=torch.bool)
property_test = settings(deadline=None, max_examples=25)


def draw(seed, *shape, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def grad_of(function, value, *rest):
    value = value.detach().clone().requires_grad_()
    total = function(value, *rest)
    (gradient,) = torch.autograd.grad(total, value)
    return total.detach(), gradient


def kl_oracle(student, teacher, mask, temperature):
    student, teacher = student.double()[mask], teacher.double()[mask]
    target = F.softmax(teacher / temperature, -1)
    return F.kl_div(F.log_softmax(student / temperature, -1), target, reduction="sum")


@property_test
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    entries=st.integers(2, 8),
    temperature=st.floats(0.5, 10),
)
def test_kl_and_its_gradient_equal_torch_in_float64(seed, rows, length, entries, temperature):
    student, teacher = draw(seed, rows, length, entries), draw(seed + 1, rows, length, entries)
    mask = draw(seed + 2, rows, length) > 0
    found = grad_of(kl_divergence, student, teacher, mask, temperature)
    assert_close(found, grad_of(kl_oracle, student, teacher, mask, temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype):
    student, teacher = draw(0, 2, 3, 50, dtype=dtype), draw(1, 2, 3, 50, dtype=dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    value, gradient = grad_of(kl_divergence, student, teacher, mask, 2.0)
    oracle, slope = grad_of(kl_oracle, student, teacher, mask, 2.0)
    assert value.dtype == torch.float32
    assert_close(value.double(), oracle, rtol=1e-5, atol=1e-6)
    assert_close(gradient, slope.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@property_test
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 100.0, 1e4]))
def test_kl_of_equal_logits_is_zero_and_pulls_nowhere(seed, scale):
    logits = draw(seed, 1, 3, 20, scale=scale, dtype=torch.float32)
    value, gradient = grad_of(
        kl_divergence, logits, logits, torch.ones(1, 3, dtype=torch.bool), 1.0
    )
    assert value == 0
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite_and_right(dtype):
    student = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=dtype)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0]]], dtype=dtype)
    value, gradient = grad_of(kl_divergence, student, teacher, ONE, 1.0)
    assert_close(value.double(), kl_oracle(student, teacher, ONE, 1.0), rtol=1e-6, atol=0)
    assert_close(gradient, torch.tensor([[[1.0, -1.0, 0.0]]], dtype=dtype))
    loss, slope = grad_of(cross_entropy, student, torch.tensor([[1]]), ONE)
    assert_close(loss.double(), student[0, 0, 0].double() - student[0, 0, 1].double())
    assert_close(slope, torch.tensor([[[1.0, -1.0, 0.0]]], dtype=dtype))


def test_a_token_forbidden_in_both_is_as_if_it_were_not_there():
    student, teacher = draw(0, 1, 1, 5), draw(1, 1, 1, 5)
    shut = [t.index_fill(2, torch.tensor([1, 3]), -torch.inf) for t in (student, teacher)]
    kept = torch.tensor([0, 2, 4])
    value, gradient = grad_of(kl_divergence, *shut, ONE, 2.0)
    oracle, slope = grad_of(kl_oracle, student[..., kept], teacher[..., kept], ONE, 2.0)
    assert_close(value, oracle)
    assert_close(gradient[..., kept], slope)
    assert gradient[..., [1, 3]].eq(0).all()


def test_a_token_forbidden_by_the_teacher_alone_is_pushed_down():
    student, teacher = draw(0, 1, 1, 5), draw(1, 1, 1, 5)
    teacher[..., 2] = -torch.inf
    found = grad_of(kl_divergence, student, teacher, ONE, 1.0)
    assert_close(found, grad_of(kl_oracle, student, teacher, ONE, 1.0))
    assert found[1][..., 2] > 0


def test_a_token_forbidden_by_the_student_alone_is_infinitely_far():
    student, teacher = torch.tensor([[[-torch.inf, 0.0]]]), torch.zeros(1, 1, 2)
    assert kl_divergence(student, teacher, ONE) == torch.inf
    teacher[..., 0] = -1e4  # less than float32 can hold: no probability
    assert kl_divergence(student, teacher, ONE) == 0


@property_test
@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_cross_entropy_and_its_gradient_equal_torch(seed, smoothing):
    logits, targets = draw(seed, 3, 4, 7), torch.arange(12).view(3, 4) % 7
    mask = draw(seed + 1, 3, 4) > 0

    def oracle(logits):
        return F.cross_entropy(
            logits[mask], targets[mask], reduction="sum", label_smoothing=smoothing
        )

    assert_close(grad_of(cross_entropy, logits, targets, mask, smoothing), grad_of(oracle, logits))


def test_ids_outside_the_mask_are_never_read():
    logits, mask = draw(0, 1, 3, 4), torch.tensor([[True, True, False]])
    wild = torch.tensor([[1, 2, 10**9]])
    assert_close(
        cross_entropy(logits, wild, mask, 0.1),
        cross_entropy(logits, torch.tensor([[1, 2, 0]]), mask, 0.1),
    )


def test_padding_is_never_seen_even_where_it_is_nan():
    logits, teacher = draw(0, 1, 2, 4), draw(1, 1, 2, 4)
    logits[:, 1], teacher[:, 1] = torch.nan, torch.nan
    mask = torch.tensor([[True, False]])
    for function, rest in ((kl_divergence, teacher), (cross_entropy, torch.zeros(1, 2).long())):
        value, gradient = grad_of(function, logits, rest, mask)
        assert value.isfinite()
        assert gradient[:, 1].eq(0).all()
        assert gradient[:, 0].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_valid_token_gives_zero_and_zero_gradients(dtype):
    logits, nothing = draw(0, 2, 3, 4, dtype=dtype), torch.zeros(2, 3, dtype=torch.bool)
    for function, rest in ((kl_divergence, logits + 1), (cross_entropy, torch.zeros(2, 3).long())):
        value, gradient = grad_of(function, logits, rest, nothing)
        assert value == 0
        assert gradient.eq(0).all()


@property_test
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), width=st.integers(2, 9))
def test_distances_of_vectors_equal_torch(seed, rows, width):
    student, teacher = draw(seed, rows, width), draw(seed + 1, rows, width)

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


def test_the_teachers_logits_get_no_gradient():
    student, teacher = draw(0, 1, 1, 4).requires_grad_(), draw(1, 1, 1, 4).requires_grad_()
    kl_divergence(student, teacher, ONE).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"mask is \(2, 3\).*values are \(3, 2, 4\).*\(3, 2\)"):
        valid_rows(torch.zeros(3, 2, 4), torch.ones(2, 3, dtype=torch.bool))
