"""AttentionKD against an oracle that goes token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.attention import AttentionKD
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output


def built(student=STUDENT, teacher=TEACHER):
    loss = AttentionKD()
    loss.build(student, teacher)
    return loss


def example(lengths=(3, 1, 2, 3), student=STUDENT, teacher=TEACHER):
    batch = make_batch(list(lengths))
    return make_output(batch, student, 1), make_output(batch, teacher, 2), batch


def cells(weights, spec, size):
    """The mass of each cell of a smaller grid, made to add up to 1 after 1e-4 is added."""
    grid = weights[spec.prefix_tokens :].view(1, 1, *spec.grid)
    area = spec.grid[0] * spec.grid[1] / (size[0] * size[1])
    mass = F.interpolate(grid, size, mode="area").flatten() * area + 1e-4
    return mass / mass.sum()


def oracle(student, teacher, batch, size=(2, 3), specs=(STUDENT, TEACHER)):
    total = 0.0
    for place in batch.target_mask.nonzero().tolist():
        q, p = (
            cells(output.attention[tuple(place)], spec, size)
            for output, spec in zip((student, teacher), specs, strict=True)
        )
        total = total + F.kl_div(q.log(), p.detach(), reduction="sum")
    return total


def test_it_is_the_kl_divergence_on_the_smaller_height_and_width():
    student, teacher, batch = example()
    loss = built()
    total, expected = loss(student, teacher, batch), oracle(student, teacher, batch)
    assert loss.size == (2, 3)
    assert_close(total, expected)
    (found,) = torch.autograd.grad(total, student.attention)
    (slope,) = torch.autograd.grad(expected, student.attention)
    assert_close(found, slope)
    assert found[batch.target_mask].ne(0).any()


def test_a_grid_of_whole_cells_keeps_the_attention_of_each():
    """A 4 x 4 grid that looks at one quarter, and a 2 x 2 grid that looks at the same cell."""
    fine = replace(TEACHER, tokens=17, prefix_tokens=1, grid=(4, 4))
    coarse = replace(STUDENT, tokens=4, prefix_tokens=0, grid=(2, 2))
    batch = make_batch([1], captions_per_image=1)
    look = torch.zeros(4, 4)
    look[:2, 2:] = 0.25 * 0.5  # half of the attention is on the prefix
    theirs = torch.cat([torch.tensor([0.5]), look.flatten()])
    outputs = [
        replace(make_output(batch, spec, dtype=torch.float32), attention=weights[None, None])
        for spec, weights in ((coarse, torch.tensor([0.0, 1.0, 0.0, 0.0])), (fine, theirs))
    ]
    assert built(coarse, fine)(*outputs, batch) < 1e-3
    elsewhere = replace(outputs[0], attention=torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    assert built(coarse, fine)(elsewhere, outputs[1], batch) > 5


def test_equal_attention_costs_nothing():
    student, _, batch = example()
    total = built(teacher=STUDENT)(student, student, batch)
    (gradient,) = torch.autograd.grad(total, student.attention)
    assert total.abs() < 1e-12
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_on_one_token_or_on_the_prefix_alone_is_finite(dtype):
    """Softmax underflows to 0 in low precision."""
    batch = make_batch([2, 2])
    student, teacher = make_output(batch, STUDENT, 1, dtype), make_output(batch, TEACHER, 2, dtype)
    mine, theirs = torch.zeros_like(student.attention), torch.zeros_like(teacher.attention)
    mine[0, :, 0] = mine[1, :, 3] = 1  # 0 is the prefix
    theirs[..., 5] = 1
    mine.requires_grad_()
    total = built()(replace(student, attention=mine), replace(teacher, attention=theirs), batch)
    total.backward()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert mine.grad.isfinite().all()
    assert mine.grad.abs().max() <= 1e4


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_attention_or_grid_is_refused_by_name(role):
    models = {"student": STUDENT, "teacher": TEACHER}
    blind = {**models, role: replace(models[role], has_attention=False)}
    with pytest.raises(IncompatibleModels, match=f"AttentionKD: the {role} .* no attention"):
        built(**blind)
    flat = {**models, role: replace(models[role], grid=None)}
    message = rf"AttentionKD: the {role} .* gives no grid .*\nUse an encoder with a grid, or remove"
    with pytest.raises(IncompatibleModels, match=message):
        built(**flat)


def test_an_output_without_attention_and_a_loss_that_is_not_built_say_so():
    student, teacher, batch = example()
    with pytest.raises(IncompatibleModels, match="needs attention from the teacher"):
        built()(student, replace(teacher, attention=None), batch)
    with pytest.raises(ConfigError, match="before build"):
        AttentionKD()(student, teacher, batch)
