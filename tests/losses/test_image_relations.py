"""Losses that relate the images of a batch, against oracles that go pair by pair."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.contrastive import ContrastiveKD
from capdistill.losses.relational import RelationalKD
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output

property_test = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 10**6)


def example(images, seed=0, dtype=torch.float64):
    batch = make_batch([2, 1] * images)
    return (
        make_output(batch, STUDENT, seed, dtype),
        make_output(batch, TEACHER, seed + 1, dtype),
        batch,
    )


def built(kind, student=STUDENT, teacher=TEACHER, **options):
    torch.manual_seed(7)
    loss = kind(**options)
    loss.build(student, teacher)
    return loss.double()


def with_features(output, features):
    return replace(output, features=features)


def relational_oracle(student, teacher, distance, angle):
    """Park et al. (2019), section 3.2."""

    def relations(vectors):
        images = range(len(vectors))
        pairs = list(itertools.permutations(images, 2))
        lengths = [(vectors[i] - vectors[j]).norm() for i, j in pairs]
        mean = sum(lengths) / len(lengths)
        cosines = [
            F.cosine_similarity(vectors[i] - vectors[j], vectors[k] - vectors[j], 0)
            for i, j, k in itertools.permutations(images, 3)
        ]
        return torch.stack(lengths) / mean, torch.stack(cosines or [torch.zeros(()).double()])

    mine, theirs = (relations(each.features.mean(1)) for each in (student, teacher))
    terms = [F.huber_loss(x, y.detach()) for x, y in zip(mine, theirs, strict=True)]
    return len(student.features) * (distance * terms[0] + angle * terms[1])


@property_test
@given(images=st.integers(2, 5), seed=seeds, distance=st.floats(0.1, 2), angle=st.floats(0, 2))
def test_relational_is_the_published_mean_over_pairs_and_triples(images, seed, distance, angle):
    student, teacher, batch = example(images, seed)
    loss = built(RelationalKD, distance=distance, angle=angle)
    total = loss(student, teacher, batch)
    expected = relational_oracle(student, teacher, distance, angle)
    assert_close(total, expected)
    (found,) = torch.autograd.grad(total, student.features)
    (slope,) = torch.autograd.grad(expected, student.features)
    assert_close(found, slope)
    assert loss.count(batch) == images


def test_images_that_the_student_cannot_tell_apart_have_no_angle():
    """Pairs and triples of different images alone count, also where their vectors are equal."""
    student, teacher, batch = example(4)
    flat = with_features(student, torch.ones_like(student.features))
    total = built(RelationalKD, distance=0)(flat, teacher, batch)
    x = teacher.features.mean(1)
    angles = [
        F.cosine_similarity(x[i] - x[j], x[k] - x[j], 0)
        for i, j, k in itertools.permutations(range(4), 3)
    ]
    expected = 4 * 2.0 * sum(angle.square() / 2 for angle in angles) / len(angles)
    assert_close(total, expected)


@property_test
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_scale_position_and_rotation_of_the_features_are_free(seed, scale):
    _, teacher, batch = example(4, seed)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    moved = (scale * teacher.features @ turn + 3.0).detach().requires_grad_()
    total = built(RelationalKD, student=TEACHER)(with_features(teacher, moved), teacher, batch)
    (gradient,) = torch.autograd.grad(total, moved)
    assert total.abs() < 1e-12
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("images", [1, 2])
def test_fewer_than_three_images_have_no_relation_to_learn(images):
    student, teacher, batch = example(images)
    total = built(RelationalKD)(student, teacher, batch)
    total.backward()
    assert total.abs() < 1e-12
    assert student.features.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [RelationalKD, ContrastiveKD])
def test_the_same_image_twice_and_large_features_stay_finite(kind, dtype):
    batch = make_batch([1] * 4, captions_per_image=1)
    student, teacher = (make_output(batch, spec, 3, dtype) for spec in (STUDENT, TEACHER))
    features = (student.features.detach() * 300)[[0, 0, 1, 2]].requires_grad_()
    same = with_features(teacher, torch.zeros_like(teacher.features))
    loss = built(kind).float()
    for theirs in (teacher, same):
        total = loss(with_features(student, features), theirs, batch)
        (gradient,) = torch.autograd.grad(total, features)
        assert total.dtype == torch.float32
        assert total.isfinite()
        assert gradient.isfinite().all()


def test_a_student_learns_the_relations_of_the_teacher():
    torch.manual_seed(0)
    _, teacher, batch = example(6)
    mine = torch.randn(6, 1, 4, dtype=torch.float64, requires_grad=True)
    loss, optimizer = built(RelationalKD, student=TEACHER), torch.optim.Adam([mine], 0.05)
    values = []
    for _ in range(300):
        total = loss(with_features(teacher, mine), teacher, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.05 * values[0]


def contrastive_oracle(loss, student, teacher):
    """-log of the softmax of the cosines, at the own image."""
    mine = loss.student_projector(student.features.mean(1))
    theirs = loss.teacher_projector(teacher.features.mean(1).detach())
    total = 0.0
    for i in range(len(mine)):
        cosines = torch.stack([F.cosine_similarity(mine[i], each, 0) for each in theirs])
        total = total - (cosines / loss.tau).log_softmax(0)[i]
    return total


def test_a_repeated_image_is_no_negative_of_itself():
    student, teacher, batch = example(4)
    batch = replace(batch, image_ids=("a", "b", "a", "c"))
    loss = built(ContrastiveKD, dim=5, tau=0.5)
    mine = F.normalize(loss.student_projector(student.features.mean(1)), dim=-1)
    theirs = F.normalize(loss.teacher_projector(teacher.features.mean(1)), dim=-1)
    cosines = (mine @ theirs.T / 0.5).tolist()
    others = {0: (0, 1, 3), 1: (0, 1, 2, 3), 2: (1, 2, 3), 3: (0, 1, 2, 3)}
    expected = sum(
        math.log(sum(math.exp(cosines[i][j]) for j in seen)) - cosines[i][i]
        for i, seen in others.items()
    )
    assert loss(student, teacher, batch).item() == pytest.approx(expected)


@property_test
@given(images=st.integers(2, 5), seed=seeds, tau=st.floats(0.05, 2), dim=st.integers(2, 9))
def test_contrastive_is_the_cross_entropy_of_the_own_image(images, seed, tau, dim):
    student, teacher, batch = example(images, seed)
    loss = built(ContrastiveKD, tau=tau, dim=dim)
    total, expected = loss(student, teacher, batch), contrastive_oracle(loss, student, teacher)
    inputs = [student.features, *loss.parameters()]
    assert_close(total, expected)
    found, slopes = torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs)
    assert_close(found, slopes)
    assert loss.count(batch) == images


def test_one_image_adds_nothing_and_says_so_once(caplog):
    student, teacher, batch = example(1)
    loss = built(ContrastiveKD)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            total = loss(student, teacher, batch)
    total.backward()
    said = [r.getMessage() for r in caplog.records if r.name.startswith("capdistill")]
    assert len(said) == 1
    assert "one image" in said[0]
    assert total == 0
    assert student.features.grad.eq(0).all()
    assert all(p.grad.eq(0).all() for p in loss.parameters())


def test_a_student_learns_to_tell_the_images_apart():
    torch.manual_seed(0)
    student, teacher, batch = example(6)
    loss = built(ContrastiveKD, dim=8)
    mine = student.features.detach().requires_grad_()
    optimizer = torch.optim.Adam([mine, *loss.parameters()], 0.02)
    before = loss(student, teacher, batch).item()
    for _ in range(60):
        total = loss(with_features(student, mine), teacher, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.item() < 0.1 * before


@pytest.mark.parametrize("kind", [RelationalKD, ContrastiveKD])
def test_autocast_changes_nothing(kind):
    outputs = example(4, dtype=torch.float32)
    loss = built(kind).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(*outputs)
    assert mixed.item() == loss(*outputs).item()


@pytest.mark.parametrize("kind", [RelationalKD, ContrastiveKD])
def test_the_teacher_gets_no_gradient(kind):
    student, teacher, batch = example(4)
    built(kind)(student, teacher, batch).backward()
    assert student.features.grad.abs().sum() > 0
    assert teacher.features.grad is None


@pytest.mark.parametrize("kind", [RelationalKD, ContrastiveKD])
def test_a_model_without_features_is_refused_by_name(kind):
    message = f"{kind.__name__}: the teacher 'large' returns no features"
    with pytest.raises(IncompatibleModels, match=message):
        built(kind, teacher=replace(TEACHER, feature_dim=None))
    student, teacher, batch = example(3)
    with pytest.raises(IncompatibleModels, match="needs features from the student"):
        built(kind)(replace(student, features=None), teacher, batch)


def test_contrastive_projections_are_made_once_for_a_pair():
    loss = built(ContrastiveKD)
    before = list(loss.parameters())
    loss.build(STUDENT, TEACHER)
    assert all(a is b for a, b in zip(before, loss.parameters(), strict=True))
    with pytest.raises(ConfigError, match="Create a new loss"):
        loss.build(TEACHER, STUDENT)
    with pytest.raises(ConfigError, match="before build"):
        ContrastiveKD()(*example(2))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RelationalKD, {"distance": -1}, "RelationalKD: distance=-1 was given"),
        (RelationalKD, {"angle": "2"}, "RelationalKD: angle='2' was given"),
        (RelationalKD, {"distance": 0, "angle": 0}, "distance and angle are 0"),
        (ContrastiveKD, {"tau": 0}, "ContrastiveKD: tau=0 was given; expected a number above 0"),
        (ContrastiveKD, {"dim": 0}, "ContrastiveKD: dim=0 was given"),
    ],
)
def test_options_that_mean_nothing_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("images", [1, 2])
def test_fewer_than_three_images_have_no_relations_and_it_is_said_once(caplog, images):
    student, teacher, batch = example(images)
    loss = built(RelationalKD)
    with caplog.at_level(logging.WARNING):
        totals = [loss(student, teacher, batch) for _ in range(2)]
        built(RelationalKD).eval()(student, teacher, batch)  # as in validation
    assert totals == [0, 0]
    said = [r.getMessage() for r in caplog.records if r.name.startswith("capdistill")]
    assert len(said) == 1
    assert "fewer than three images" in said[0]
