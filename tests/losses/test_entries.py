"""Divergence on given entries. Oracles: float64 autograd, and `top_k_divergence` of all logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.losses.divergence import top_k_divergence
from capdistill.losses.entries import entries_divergence
from capdistill.outputs import TopWords
from tests.losses.test_divergence import ONE, draw, grad_of, property_test


def words_of(teacher, k, temperature):
    """What a teacher with these logits keeps."""
    top, ids = teacher.topk(k)
    others = teacher.scatter(-1, ids, -torch.inf) - top[..., :1]
    return TopWords(ids, top - top[..., :1], {temperature: (others / temperature).logsumexp(-1)})


def oracle(student, ids, target, mask, temperature, bucket):
    """The definition, in float64 by autograd."""
    q = (student.double() / temperature).softmax(-1)
    chosen = q.gather(-1, ids)
    others = q.masked_fill(torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True), 0)
    whole = torch.cat([chosen, others.sum(-1, True)], -1) if bucket else chosen
    q = whole / whole.sum(-1, True)
    p = target.double().exp()
    return (p * (p.log() - q.log()))[mask].sum()


@property_test
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 4),
    temperature=st.floats(0.5, 8),
    bucket=st.booleans(),
)
def test_value_and_gradient_equal_float64_autograd(seed, k, temperature, bucket):
    student, teacher = draw(seed, 2, 3, 7), draw(seed + 1, 2, 3, 7)
    mask = draw(seed + 2, 2, 3) > 0
    ids, target = teacher.topk(k).indices, draw(seed + 3, 2, 3, k + bucket).log_softmax(-1)
    found = grad_of(entries_divergence, student, ids, target, mask, temperature)
    expected = grad_of(oracle, student, ids, target, mask, temperature, bucket)
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


@property_test
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), bucket=st.booleans())
def test_kept_words_give_what_all_logits_give(seed, k, bucket):
    student, teacher = (draw(seed + n, 2, 3, 7, dtype=torch.float32) for n in range(2))
    mask = draw(seed + 2, 2, 3) > 0
    words = words_of(teacher, 6, 2.0)  # more than are read
    target = words.log_probs(2.0, k, bucket)
    found = grad_of(entries_divergence, student, words.ids[..., :k], target, mask, 2.0)
    expected = grad_of(top_k_divergence, student, teacher, mask, k, 2.0, bucket)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@property_test
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 100.0, 1e4]))
def test_equal_models_pull_nowhere(seed, scale):
    logits = draw(seed, 1, 1, 20, scale=scale, dtype=torch.float32)
    words = words_of(logits, 5, 1.0)
    value, gradient = grad_of(entries_divergence, logits, words.ids, words.log_probs(1.0), ONE)
    assert abs(value) < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite_and_right(dtype):
    student = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=dtype)
    words = words_of(torch.tensor([[[-1e4, 1e4, 0.0]]]), 1, 1.0)
    value, gradient = grad_of(entries_divergence, student, words.ids, words.log_probs(1.0), ONE)
    assert_close(value, (student[0, 0, 0] - student[0, 0, 1]).float(), rtol=1e-3, atol=0)
    assert_close(gradient, torch.tensor([[[1.0, -1.0, 0.0]]], dtype=dtype))


def test_a_rest_that_neither_model_has_adds_nothing():
    student = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    target = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    ids = torch.tensor([[[0, 1]]])
    value, gradient = grad_of(entries_divergence, student, ids, target, ONE)
    assert_close(value, torch.tensor(0.1201), atol=1e-4, rtol=0)
    assert_close(gradient[0, 0], torch.tensor([0.2689 - 0.5, 0.7311 - 0.5, 0.0]), atol=1e-4, rtol=0)


def test_no_valid_token_gives_zero_and_runs_backward():
    student, target = draw(0, 1, 2, 5), torch.zeros(1, 2, 2)
    none = torch.zeros(1, 2, dtype=torch.bool)
    ids = torch.zeros(1, 2, 1, dtype=torch.long)
    value, gradient = grad_of(entries_divergence, student, ids, target, none)
    assert value == 0
    assert gradient.eq(0).all()
