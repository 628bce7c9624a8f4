"""HiddenKD against torch.nn.functional, token by token; which layers are paired."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.hidden import HiddenKD, uniform_pairs
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output


def built(student=STUDENT, teacher=TEACHER, **options):
    torch.manual_seed(7)
    loss = HiddenKD(**options)
    loss.build(student, teacher)
    return loss.double()


def oracle(loss, pairs, student, teacher, batch):
    terms = []
    for (layer, target), projector in zip(pairs, loss.projectors, strict=True):
        for place in batch.target_mask.nonzero().tolist():
            mine = projector(student.hidden[layer][tuple(place)])
            theirs = teacher.hidden[target][tuple(place)]
            cosine = F.cosine_similarity(mine, theirs, dim=0)
            terms.append(F.mse_loss(mine, theirs) + 1 - cosine)
    return sum(terms) / len(pairs)


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("last", [(1, 2)]),
        ("uniform", [(0, 1), (1, 2)]),
        ({0: 0}, [(0, 0)]),
        ({0: -1, -1: 1}, [(0, 2), (1, 1)]),
        ({"0": -1, "-1": 1}, [(0, 2), (1, 1)]),  # as JSON has it
    ],
)
def test_a_term_is_mse_plus_one_minus_cosine_averaged_over_the_pairs(layers, pairs):
    loss, batch = built(layers=layers), make_batch([3, 1, 2, 3])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    assert loss.pairs == pairs
    assert_close(loss(student, teacher, batch), oracle(loss, pairs, student, teacher, batch))


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (2, 2, [(0, 0), (1, 1)]),
        (2, 4, [(0, 2), (1, 3)]),
        (3, 4, [(0, 1), (1, 2), (2, 3)]),
        (4, 7, [(0, 1), (1, 3), (2, 5), (3, 6)]),
        (4, 2, [(0, 0), (1, 0), (2, 0), (3, 1)]),
        (1, 3, [(0, 2)]),
        (3, 1, [(2, 0)]),
    ],
)
def test_uniform_pairs_layers_of_the_same_depth_and_the_last_with_the_last(student, teacher, pairs):
    assert uniform_pairs(student, teacher) == pairs


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((8, 8, 8), (5, 5, 5, 5, 6), [(0, 2), (1, 3), (2, 4)]),  # 2 layers of 4, then the last
        ((8, 8, 8), (5, 6), [(1, 0), (2, 1)]),
        ((8,), (5, 6), [(0, 1)]),
    ],
)
def test_the_last_k_layers_are_paired_in_order(student, teacher, pairs):
    small, large = replace(STUDENT, hidden_dims=student), replace(TEACHER, hidden_dims=teacher)
    assert built(small, large, layers="last_k").pairs == pairs


def test_the_two_distances_add_up_to_the_default():
    batch = make_batch([3, 1, 2, 3])
    outputs = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2), batch
    both, mse, cosine = (
        built(layers="uniform", distance=each)(*outputs) for each in ("mse+cosine", "mse", "cosine")
    )
    assert_close(mse + cosine, both)
    assert mse > 0
    assert cosine > 0


def test_twice_the_cosine_distance_is_patient_distillation():
    """Oracle: the squared difference of vectors of length 1, Sun et al. (2019)."""
    batch = make_batch([3, 1, 2, 3])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, STUDENT, 2)
    loss = built(teacher=STUDENT, project=False, distance="cosine")
    mine, theirs = (F.normalize(each.hidden[-1], dim=-1) for each in (student, teacher))
    patient = (mine - theirs).square().sum(-1)[batch.target_mask].sum()
    assert_close(2 * loss(student, teacher, batch), patient)


def test_an_unknown_distance_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"distance='mae' is unknown. Did you mean 'mse'"):
        HiddenKD(distance="mae")


def test_a_deeper_teacher_of_the_same_widths_is_paired_anew_with_the_same_projectors():
    student, shallow = (
        replace(STUDENT, hidden_dims=(8,) * 2),
        replace(TEACHER, hidden_dims=(8,) * 2),
    )
    loss = built(student, shallow, layers="uniform")
    before = list(loss.parameters())
    loss.build(student, replace(TEACHER, hidden_dims=(8,) * 5))
    assert loss.pairs == [(0, 3), (1, 4)]
    assert all(a is b for a, b in zip(before, loss.parameters(), strict=True))


def test_equal_widths_are_projected_too():
    same = replace(STUDENT, name="twin")
    assert sum(p.numel() for p in built(teacher=same).parameters()) == 8 * 8 + 8


def test_without_projection_equal_states_cost_nothing():
    loss, batch = built(teacher=STUDENT, project=False), make_batch([3, 1, 2, 3])
    student = make_output(batch, STUDENT, 1)
    assert list(loss.parameters()) == []
    assert_close(loss(student, student, batch).item(), 0.0, rtol=0, atol=1e-12)


def test_without_projection_widths_must_agree():
    with pytest.raises(IncompatibleModels, match=r"layer 1 of 'small' has width 8 but layer 2 of"):
        built(project=False)


@pytest.mark.parametrize("index", [2, -3])
def test_a_layer_that_does_not_exist_is_refused_with_those_there_are(index):
    with pytest.raises(IncompatibleModels, match=rf"'small' has no layer {index}; .* 0 to 1, or"):
        built(layers={index: 0})
    with pytest.raises(IncompatibleModels, match="'large' has no layer 9"):
        built(layers={0: 9})


@pytest.mark.parametrize("layers", ["first", {}, {"a": 0}, {0: None}, [0, 1], 3])
def test_layers_that_mean_nothing_are_refused(layers):
    with pytest.raises(ConfigError, match=r"layers=.* is invalid"):
        HiddenKD(layers=layers)


def test_a_teacher_without_hidden_states_is_refused_by_name():
    with pytest.raises(IncompatibleModels, match="the teacher 'large' returns no hidden states"):
        built(teacher=replace(TEACHER, hidden_dims=()))


def test_an_output_without_hidden_states_is_named():
    batch = make_batch([1, 1])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    with pytest.raises(IncompatibleModels, match="needs hidden from the student"):
        built()(replace(student, hidden=None), teacher, batch)
