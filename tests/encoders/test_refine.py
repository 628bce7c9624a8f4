"""Refinement and projection: widths, cost, and that tokens see each other."""

from __future__ import annotations

import pytest
import torch

from capdistill.encoders.backbone import TokenAttention, make_head


@pytest.mark.parametrize("refine", ["none", "pre", "post"])
@pytest.mark.parametrize("dim", [None, 16])
def test_the_head_gives_the_promised_width(refine, dim):
    head = make_head(32, dim, refine, dropout=0.1)

    assert head(torch.randn(2, 9, 32)).shape == (2, 9, dim or 32)


def test_no_projection_and_no_refinement_changes_nothing():
    tokens = torch.randn(2, 9, 32)

    assert torch.equal(make_head(32, None, "none", 0.5)(tokens), tokens)


def test_refinement_before_the_projection_is_bottlenecked():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TokenAttention(2048, 256).parameters())

    down, attention, up, norm = 2048 * 256 + 256, 3 * 256 * 257, 256 * 2048 + 2048, 2 * 2048
    assert parameters == down + attention + up + norm < 1_300_000


@pytest.mark.parametrize(("refine", "sees"), [("none", False), ("pre", True), ("post", True)])
def test_refined_tokens_see_each_other(refine, sees):
    head = make_head(32, 16, refine, dropout=0.0)
    tokens = torch.randn(1, 9, 32)
    other = tokens.clone()
    other[:, 5] = 0.0

    moved = (head(tokens)[:, 0] - head(other)[:, 0]).abs().max()

    assert (moved > 1e-5) == sees


def test_attention_is_that_of_torch():
    ours = TokenAttention(32, 16).double()
    theirs = torch.nn.MultiheadAttention(16, 8, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    torch.nn.init.eye_(theirs.out_proj.weight)
    torch.nn.init.zeros_(theirs.out_proj.bias)
    tokens = torch.randn(2, 9, 32, dtype=torch.float64)

    inner = ours.down(ours.norm(tokens))
    expected = tokens + ours.up(theirs(inner, inner, inner)[0])

    torch.testing.assert_close(ours(tokens), expected)


def test_dropout_acts_in_training_alone():
    head = make_head(32, 16, "post", dropout=0.5)
    tokens = torch.randn(1, 9, 32)

    assert not torch.equal(head.train()(tokens), head(tokens))
    assert torch.equal(head.eval()(tokens), head(tokens))
