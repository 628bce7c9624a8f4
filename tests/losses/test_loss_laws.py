"""Laws 1, 2 and 4 for each loss as the trainer sees it: sums, gradients, precision, projectors."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.errors import ConfigError
from capdistill.losses.across_vocabularies import UniversalKD, WordKD
from capdistill.losses.attention import AttentionKD
from capdistill.losses.contrastive import ContrastiveKD
from capdistill.losses.decoupled import DecoupledKD
from capdistill.losses.dist import DistKD
from capdistill.losses.feature import FeatureKD
from capdistill.losses.generalised import JensenShannonKD, ReverseKD
from capdistill.losses.hidden import HiddenKD
from capdistill.losses.token import TokenKD
from capdistill.losses.top_k import TopKD
from tests.losses.toy_pair import (
    STUDENT,
    TEACHER,
    cast,
    gradients,
    leaves,
    make_batch,
    make_output,
    pad,
    part,
)

LOSSES = {
    "token": (TokenKD, {"temperature": 4.0}),
    "feature-auto": (FeatureKD, {}),
    "feature-pooled": (FeatureKD, {"match": "pooled"}),
    "feature-attention": (FeatureKD, {"match": "attention"}),
    "feature-grid": (FeatureKD, {"match": "grid"}),
    "hidden-last": (HiddenKD, {}),
    "hidden-uniform": (HiddenKD, {"layers": "uniform"}),
    "hidden-mapping": (HiddenKD, {"layers": {"0": -1, "-1": 0}}),
    "hidden-last_k": (HiddenKD, {"layers": "last_k", "distance": "cosine"}),
    "reverse_kl": (ReverseKD, {"temperature": [4.0, 1.0]}),
    "jsd": (JensenShannonKD, {"beta": 0.2}),
    "decoupled": (DecoupledKD, {}),
    "top_k": (TopKD, {"k": 3}),
    "top_k-renormalise": (TopKD, {"k": 3, "rest": "renormalise"}),
    "dist": (DistKD, {}),
    "dist-inter": (DistKD, {"gamma": 0}),
    "attention": (AttentionKD, {}),
    "word": (WordKD, {"temperature": 2.0}),
    "universal": (UniversalKD, {}),
    "contrastive": (ContrastiveKD, {"dim": 5, "tau": 0.5}),
}
PROJECTING = [name for name in LOSSES if name.startswith(("feature", "hidden", "contrastive"))]
COUPLING = ("dist", "contrastive")  # splitting a batch changes them, as they say
each_loss = pytest.mark.parametrize("name", LOSSES)
each_projecting_loss = pytest.mark.parametrize("name", PROJECTING)
each_splitting_loss = pytest.mark.parametrize("name", [n for n in LOSSES if n not in COUPLING])
lengths = st.lists(st.integers(1, 5), min_size=4, max_size=4)
property_test = settings(deadline=None, max_examples=15)


def built(name, dtype=torch.float64):
    torch.manual_seed(7)
    kind, options = LOSSES[name]
    loss = kind(**json.loads(json.dumps(options)))  # a run's configuration is JSON
    loss.build(STUDENT, TEACHER)
    return loss.to(dtype)


def learn(loss, batch, student, teacher):
    """The sum, and every gradient it causes in the student and in the projectors."""
    parameters = list(loss.parameters())
    inputs = [leaf for leaf in [*leaves(student), *parameters] if leaf.requires_grad]
    total = loss(student, teacher, batch)
    return total.detach(), torch.autograd.grad(total, inputs, allow_unused=True)


@each_loss
@property_test
@given(lengths=lengths, columns=st.integers(1, 4))
def test_padding_changes_neither_loss_nor_gradients(name, lengths, columns):
    loss, batch = built(name), make_batch(lengths)
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    loss(student, teacher, batch).backward()
    expected, projectors = gradients(student), [p.grad.clone() for p in loss.parameters()]

    loss.zero_grad()
    again = make_output(batch, STUDENT, 1)
    longer, wide = pad(batch, again, columns)
    _, wide_teacher = pad(batch, teacher, columns)
    total = loss(wide, wide_teacher, longer)
    total.backward()

    assert loss.count(longer) == loss.count(batch)
    assert_close(total, loss(student, teacher, batch))
    assert_close(gradients(again), expected)
    assert_close([p.grad for p in loss.parameters()], projectors)


@each_loss
def test_a_loss_says_whether_it_couples_the_images_of_a_batch(name):
    assert built(name).couples_batch == (name in COUPLING)


@each_splitting_loss
@property_test
@given(lengths=lengths, captions=st.sampled_from([1, 2]))
def test_the_parts_of_a_batch_add_up(name, lengths, captions):
    loss, batch = built(name), make_batch(lengths, captions)
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    total, whole = learn(loss, batch, student, teacher)

    sums, count, split = 0.0, 0.0, [None] * len(whole)
    for images in (slice(0, 1), slice(1, batch.num_images)):
        piece, mine = part(batch, student, images)
        _, theirs = part(batch, teacher, images)
        value = loss(mine, theirs, piece)
        inputs = [*leaves(student), *loss.parameters()]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
        pairs = zip(split, found, strict=True)
        split = [b if a is None else a if b is None else a + b for a, b in pairs]
        sums, count = sums + value.detach(), count + loss.count(piece)

    assert count == loss.count(batch)
    assert_close(sums, total)
    assert_close(split, list(whole))


@each_loss
def test_gradients_are_those_of_finite_differences_in_float64(name):
    loss, batch = built(name), make_batch([2, 1, 1, 2])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    _, found = learn(loss, batch, student, teacher)
    inputs = [*leaves(student), *loss.parameters()]
    for leaf, gradient in zip(inputs, found, strict=True):
        if gradient is None:
            continue
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            leaf += 1e-5 * direction
            above = loss(student, teacher, batch)
            leaf -= 2e-5 * direction
            below = loss(student, teacher, batch)
            leaf += 1e-5 * direction
        assert_close((gradient * direction).sum(), (above - below) / 2e-5, rtol=1e-6, atol=1e-7)


@each_loss
def test_gradients_reach_student_and_projectors_and_never_the_teacher(name):
    loss, batch = built(name), make_batch([3, 1, 2, 3])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    loss(student, teacher, batch).backward()
    reached = [grad for grad in gradients(student) if grad is not None]
    assert reached
    assert all(grad.abs().sum() > 0 for grad in reached)
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert (student.attention.grad is None) == (name != "attention")
    assert all(leaf.grad is None for leaf in leaves(teacher))


@each_loss
def test_no_valid_token_still_runs_backward(name):
    loss, batch = built(name), make_batch([0, 0, 0, 0])
    batch, student = pad(batch, make_output(batch, STUDENT, 1), 2)
    _, teacher = pad(make_batch([0, 0, 0, 0]), make_output(make_batch([0] * 4), TEACHER, 2), 2)
    total, found = learn(loss, batch, student, teacher)
    blind = name in ("feature-auto", "feature-pooled", "feature-grid", "contrastive")  # per image
    assert total.isfinite()
    assert blind or total == 0
    used = [gradient for gradient in found if gradient is not None]
    assert used
    assert all(g.isfinite().all() if blind else g.eq(0).all() for g in used)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_compared_in_float32(name, dtype):
    loss, batch = built(name, torch.float32), make_batch([3, 1, 2, 3])
    half = [cast(make_output(batch, spec, 1), dtype) for spec in (STUDENT, TEACHER)]
    same = [cast(output, torch.float32) for output in half]
    for leaf in leaves(half[0]):
        leaf.requires_grad_()
    total = loss(*half, batch)
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == loss(*same, batch).item()
    assert all(g is None or g.isfinite().all() for g in gradients(half[0]))


@each_loss
def test_autocast_changes_nothing(name):
    loss, batch = built(name, torch.float32), make_batch([3, 1, 2, 3])
    outputs = [cast(make_output(batch, spec, 1), torch.float32) for spec in (STUDENT, TEACHER)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(*outputs, batch)
    assert mixed.item() == loss(*outputs, batch).item()


@each_projecting_loss
def test_projectors_are_made_once(name):
    loss = built(name)
    before = list(loss.parameters())
    loss.build(STUDENT, TEACHER)
    assert [a is b for a, b in zip(before, loss.parameters(), strict=True)] == [True] * len(before)
    with pytest.raises(ConfigError, match="Create a new loss"):
        loss.build(TEACHER, STUDENT)


@each_projecting_loss
def test_a_loss_is_saved_and_copied_with_its_projectors(name):
    loss, batch = built(name), make_batch([3, 1, 2, 3])
    outputs = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    torch.manual_seed(8)
    other = LOSSES[name][0](**LOSSES[name][1])
    other.build(STUDENT, TEACHER)
    other.double().load_state_dict(loss.state_dict())
    expected = loss(*outputs, batch).item()
    assert other(*outputs, batch).item() == expected
    assert copy.deepcopy(loss)(*outputs, batch).item() == expected


@each_projecting_loss
def test_a_loss_that_is_not_built_says_so(name):
    batch = make_batch([1, 1])
    outputs = make_output(batch, STUDENT), make_output(batch, TEACHER)
    with pytest.raises(ConfigError, match=r"before build.*loss\.build\(student\.spec"):
        LOSSES[name][0](**LOSSES[name][1])(*outputs, batch)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"per": "tokens"}, r"Wrong: per = 'tokens' is unknown. Did you mean 'token'"),
        ({"per": "images"}, "Did you mean 'image'"),
        ({"per": None}, "per = None is unknown"),
        ({"needs": {"hiden"}}, "no output 'hiden'. Did you mean 'hidden'"),
        ({"needs": "hidden"}, r"'hidden' is not a set of names. Write needs = frozenset"),
        ({"needs": frozenset({"logits", 3})}, "no output 3"),
        ({"needs": None}, "is not a set of names"),
        ({"couples_batch": "no"}, "expected True or False"),
    ],
)
def test_what_a_loss_declares_is_checked_when_the_class_is_made(attributes, message):
    with pytest.raises(ConfigError, match=message):
        type("Wrong", (TokenKD,), attributes)
    name, value = next(iter(attributes.items()))
    with pytest.raises(ConfigError, match=message.replace("Wrong", "TokenKD")):
        setattr(TokenKD(), name, value)


def test_a_list_of_needs_becomes_a_set_and_a_count_of_its_own_may_be_per_anything():
    attributes = {"needs": ["hidden"], "per": "caption", "count": lambda self, batch: 1.0}
    own = type("Own", (TokenKD,), attributes)
    assert own.needs == frozenset({"hidden"})
    assert own().per == "caption"
    assert type("Heir", (own,), {"per": "word"})().count(None) == 1.0
