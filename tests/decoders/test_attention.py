"""Folded cross-attention against attention written plainly, a caption at a time, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from capdistill.decoders.base import CrossAttention, attend
from tests.decoders.decoder_cases import DIM, TOKENS

WIDTH, INNER = 6, 12


def naive(attention, x, features, k):
    """Features repeated for every caption; loops over rows, heads and words."""
    size = INNER // attention.heads
    key_value = attention.key_value(features.repeat_interleave(k, 0))
    keys, values = key_value[..., :INNER], key_value[..., INNER:]
    query = attention.query(x)
    rows, weights = [], []
    for b in range(len(x)):
        heads = [slice(h * size, (h + 1) * size) for h in range(attention.heads)]
        scores = [query[b][:, h] @ keys[b][:, h].T / math.sqrt(size) for h in heads]
        seen = [s.exp() / s.exp().sum(1, keepdim=True) for s in scores]
        rows.append(torch.cat([w @ values[b][:, h] for w, h in zip(seen, heads, strict=True)], 1))
        weights.append(sum(seen) / len(seen))
    return torch.stack(rows), torch.stack(weights)


def leaves(attention, images, k, length):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(images * k, length, WIDTH, generator=generator, dtype=torch.float64)
    features = torch.randn(images, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), features.requires_grad_(), *attention.parameters()


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("images", "k", "length"), [(1, 1, 1), (2, 1, 4), (1, 5, 3), (3, 2, 4)])
def test_folding_equals_repeating_the_features(images, k, length, heads, need):
    torch.manual_seed(0)
    attention = CrossAttention(WIDTH, DIM, heads, inner=INNER).double()
    x, features, *weights = leaves(attention, images, k, length)
    context, seen = attention(x, *attention.project(features), need=need)
    expected, looked = naive(attention, x, features, k)
    assert_close(context, expected, rtol=0, atol=1e-13)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [x, features, *weights]
    mine = torch.autograd.grad((context * gradient).sum(), inputs)
    theirs = torch.autograd.grad((expected * gradient).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)
    assert (seen is not None) == need
    if need:
        assert_close(seen, looked, rtol=0, atol=1e-14)


def test_dropout_acts_on_the_weights_in_training_alone_and_is_not_shown():
    torch.manual_seed(0)
    attention = CrossAttention(WIDTH, DIM, 2, inner=INNER, dropout=0.5).double()
    x, features, *_ = leaves(attention, 2, 2, 3)
    memory = attention.project(features)
    dropped, seen = attention(x, *memory, need=True)
    attention.eval()
    exact, shown = attention(x, *memory, need=True)
    assert not torch.allclose(dropped, exact)
    assert_close(seen, shown, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_softened_in_float32(dtype):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 1, n, 4).to(dtype) for n in (3, 200, 200))
    context, weights = attend(query, keys, values, need=True)
    scores = query.double() @ keys.double().transpose(-1, -2) / 2
    assert (weights.dtype, context.dtype) == (torch.float32, dtype)
    assert_close(weights.double(), scores.softmax(-1)[:, 0], rtol=1e-5, atol=1e-6)
