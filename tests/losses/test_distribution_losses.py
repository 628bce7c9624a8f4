"""Losses on the next-token distributions against their published formulas, written out plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import capdistill as cd
from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.divergence import kl_divergence
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output

property_test = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 10**6)
temperatures = st.floats(0.5, 8)
lengths = st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda x: len(x) % 2 == 0)


def make(name, **options):
    loss = cd.losses.create(name, **options)
    loss.build(STUDENT, TEACHER)
    return loss


def on_logits(function, *outputs):
    return [replace(each, logits=function(each.logits.detach())) for each in outputs]


def example(lengths=(3, 1, 2, 3), seed=0, dtype=torch.float64, scale=1.0):
    batch = make_batch(list(lengths))
    outputs = [make_output(batch, spec, seed + n) for n, spec in enumerate((STUDENT, TEACHER))]
    student, teacher = on_logits(lambda x: (x * scale).to(dtype), *outputs)
    student.logits.requires_grad_()
    return student, teacher, batch


def compare(loss, oracle, outputs, temperature):
    """The sum over tokens and its gradient, times T², against `oracle(p, q, target)` of a token."""
    student, teacher, batch = outputs
    total = loss(student, teacher, batch)
    (gradient,) = torch.autograd.grad(total, student.logits)
    expected = 0.0
    for place in batch.target_mask.nonzero().tolist():
        here = tuple(place)
        p = F.softmax(teacher.logits[here] / temperature, 0)
        q = F.softmax(student.logits[here] / temperature, 0)
        expected = expected + temperature**2 * oracle(p, q, int(batch.targets[here]))
    (slope,) = torch.autograd.grad(expected, student.logits)
    assert_close(total, expected)
    assert_close(gradient, slope)


def kl(p, q):
    return (p * (p / q).log()).sum()


@property_test
@given(lengths=lengths, seed=seeds, temperature=temperatures)
def test_reverse_kl_is_the_divergence_from_the_student(lengths, seed, temperature):
    loss = make("reverse_kl", temperature=temperature)
    compare(loss, lambda p, q, target: kl(q, p), example(lengths, seed), temperature)


@property_test
@given(lengths=lengths, seed=seeds, temperature=temperatures, beta=st.floats(0.01, 0.99))
def test_jensen_shannon_is_the_mean_divergence_from_the_mixture(lengths, seed, temperature, beta):
    def oracle(p, q, target):  # Agarwal et al. (2024), section 2
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)

    loss = make("jsd", beta=beta, temperature=temperature)
    compare(loss, oracle, example(lengths, seed), temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_shannon_with_equal_shares_is_symmetric_and_at_most_log_2(dtype):
    student, teacher, batch = example(dtype=dtype, scale=1e3)
    loss = make("jsd", temperature=1.0)
    total = loss(student, teacher, batch)
    assert_close(total, loss(teacher, student, batch))
    assert total <= 9 * torch.tensor(2.0).log() + 1e-4


def test_the_limits_of_beta_are_forward_and_reverse_kl():
    outputs = example()
    forward, reverse = make("token", temperature=2.0), make("reverse_kl", temperature=2.0)
    assert make("jsd", beta=0, temperature=2.0)(*outputs) == forward(*outputs)
    assert make("jsd", beta=1, temperature=2.0)(*outputs) == reverse(*outputs)
    small = 1e-5
    near = make("jsd", beta=small, temperature=2.0)(*outputs) / small
    assert_close(near, forward(*outputs), rtol=1e-3, atol=0)
    near = make("jsd", beta=1 - small, temperature=2.0)(*outputs) / small
    assert_close(near, reverse(*outputs), rtol=1e-3, atol=0)


@property_test
@given(
    lengths=lengths,
    seed=seeds,
    temperature=temperatures,
    alpha=st.floats(0, 3),
    beta=st.floats(0.1, 8),
)
def test_decoupled_is_the_published_sum(lengths, seed, temperature, alpha, beta):
    def oracle(p, q, target):  # Zhao et al. (2022), section 3
        others = torch.arange(len(p)) != target
        binary = (
            torch.stack([p[target], p[others].sum()]),
            torch.stack([q[target], q[others].sum()]),
        )
        among = p[others] / p[others].sum(), q[others] / q[others].sum()
        return alpha * kl(*binary) + beta * kl(*among)

    loss = make("decoupled", alpha=alpha, beta=beta, temperature=temperature)
    compare(loss, oracle, example(lengths, seed), temperature)


@property_test
@given(seed=seeds, scale=st.sampled_from([1.0, 10.0, 100.0]))
def test_both_decoupled_terms_make_up_the_kl_divergence(seed, scale):
    """KL = TCKD + (1 - p) NCKD, token by token; also where the teacher is certain."""
    student, teacher, batch = example((1, 1), seed, scale=scale)
    target = batch.targets[:, 0, None]
    others = teacher.logits[:, 0].scatter(1, target, -torch.inf).logsumexp(1)
    rest = (others - teacher.logits[:, 0].logsumexp(1)).exp()  # 1 - p
    for row in range(2):
        mask = torch.tensor([[True, row == 0], [True, row == 1]])
        outputs = student, teacher, replace(batch, mask=mask)
        target_term = make("decoupled", alpha=1, beta=0, temperature=1)(*outputs)
        other_term = make("decoupled", alpha=0, beta=1, temperature=1)(*outputs)
        whole = kl_divergence(student.logits, teacher.logits, mask[:, 1:])
        assert_close(target_term + rest[row] * other_term, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 8])
@property_test
@given(lengths=lengths, seed=seeds, temperature=temperatures)
def test_top_k_with_a_bucket_adds_up_the_other_words(k, lengths, seed, temperature):
    def oracle(p, q, target):
        top = p.argsort(descending=True)
        top, rest = top[:k], top[k:]
        return kl(*(torch.cat([each[top], each[rest].sum()[None]]) for each in (p, q)))

    loss = make("top_k", k=k, temperature=temperature)
    compare(loss, oracle, example(lengths, seed), temperature)


@pytest.mark.parametrize("k", [2, 5])
@property_test
@given(lengths=lengths, seed=seeds, temperature=temperatures)
def test_top_k_renormalised_leaves_the_other_words_out(k, lengths, seed, temperature):
    def oracle(p, q, target):
        top = p.argsort(descending=True)[:k]
        return kl(*(each[top] / each[top].sum() for each in (p, q)))

    loss = make("top_k", k=k, rest="renormalise", temperature=temperature)
    compare(loss, oracle, example(lengths, seed), temperature)


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [9, 10, 1000])
def test_all_words_are_the_token_loss_exactly(rest, k):
    outputs = example(dtype=torch.float32)
    loss = make("top_k", k=k, rest=rest, temperature=3.0)
    assert loss(*outputs) == make("token", temperature=3.0)(*outputs)


@pytest.mark.parametrize("k", [3, 9])
def test_at_a_high_temperature_top_k_matches_centred_logits(k):
    """Hinton et al. (2015), section 2.1: the squared difference over 2 k in the limit."""
    student, teacher, batch = example()
    index = teacher.logits.topk(k).indices
    mine, theirs = (each.logits.gather(-1, index)[batch.target_mask] for each in (student, teacher))
    centred = [each - each.mean(-1, keepdim=True) for each in (mine, theirs)]
    limit = (centred[0] - centred[1]).square().sum() / (2 * k)
    gaps = []
    for temperature in (1e2, 1e3):
        loss = make("top_k", k=k, rest="renormalise", temperature=temperature)
        gaps.append(abs((loss(student, teacher, batch) - limit).item()))
    assert gaps[1] < gaps[0] / 5  # the error falls with 1 / T
    assert gaps[1] < 1e-2 * limit


def test_at_a_high_temperature_the_bucket_is_one_mean_logit_that_weighs_as_many():
    """The same limit, with weights 1 / V for each of the k and (V - k) / V for the others."""
    student, teacher, batch = example()
    k, size = 3, 9
    index = teacher.logits.topk(k).indices
    gap = (teacher.logits - student.logits)[batch.target_mask]
    top = gap.gather(-1, index[batch.target_mask])
    rest = (gap.sum(-1, keepdim=True) - top.sum(-1, keepdim=True)) / (size - k)
    values = torch.cat([top, rest], -1)
    weights = torch.tensor([1 / size] * k + [(size - k) / size], dtype=torch.float64)
    mean = (weights * values).sum(-1, keepdim=True)
    limit = (weights * (values - mean).square()).sum() / 2
    total = make("top_k", k=k, temperature=1e4)(student, teacher, batch)
    assert_close(total, limit, rtol=1e-3, atol=0)


def dist_oracle(student, teacher, batch, beta, gamma, temperature):
    """Huang et al. (2022), DIST, by torch.corrcoef."""
    p, q = (
        F.softmax(each.logits[batch.target_mask] / temperature, -1) for each in (teacher, student)
    )

    def distance(x, y):
        return 1 - torch.corrcoef(torch.stack([x, y]))[0, 1]

    inter = sum(distance(q[n], p[n]) for n in range(len(p)))
    intra = sum(distance(q[:, v], p[:, v]) for v in range(p.shape[1])) / p.shape[1]
    return temperature**2 * (beta * inter + gamma * len(p) * intra)


@property_test
@given(
    lengths=lengths,
    seed=seeds,
    temperature=temperatures,
    beta=st.floats(0.1, 2),
    gamma=st.floats(0, 2),
)
def test_dist_is_the_published_sum_of_correlations(lengths, seed, temperature, beta, gamma):
    student, teacher, batch = example(lengths, seed)
    loss = make("dist", beta=beta, gamma=gamma, temperature=temperature)
    total = loss(student, teacher, batch)
    expected = dist_oracle(student, teacher, batch, beta, gamma, temperature)
    assert_close(total, expected)
    (found,) = torch.autograd.grad(total, student.logits)
    (slope,) = torch.autograd.grad(expected, student.logits)
    assert_close(found, slope)


def test_dist_does_not_ask_for_the_teachers_own_probabilities():
    """A student whose probabilities are an affine function of the teacher's is at no distance."""
    _, teacher, batch = example()
    [student] = on_logits(lambda x: (0.3 * F.softmax(x, -1) + 0.7 / 9).log(), teacher)
    assert abs(float(make("dist")(student, teacher, batch))) < 1e-9


@pytest.mark.parametrize("lengths", [(1, 0), (4, 4)])
def test_where_the_teacher_does_not_vary_dist_is_zero(lengths):
    student, teacher, batch = example(lengths)
    [uniform] = on_logits(torch.zeros_like, teacher)
    total = make("dist")(student, uniform, batch)
    (gradient,) = torch.autograd.grad(total, student.logits)
    assert total == 0
    assert gradient.eq(0).all()


def test_dist_is_exact_for_words_that_are_never_probable():
    """Their squares would underflow in float32."""
    student, teacher, batch = example(dtype=torch.float32)
    shift = torch.tensor([0.0] * 8 + [-60.0])
    rare = on_logits(lambda x: x + shift, student, teacher)
    exact = on_logits(torch.Tensor.double, *rare)
    expected = dist_oracle(*exact, batch, 1.0, 1.0, 1.0)
    assert_close(make("dist")(*rare, batch).double(), expected, rtol=1e-5, atol=0)


FORMS = {
    "token": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "decoupled": {},
    "top_k": {"k": 3},
    "top_k ": {"k": 3, "rest": "renormalise"},
    "dist": {},
}
each_form = pytest.mark.parametrize("name", FORMS)


@each_form
@property_test
@given(seed=seeds, scale=st.sampled_from([1e-2, 1.0, 30.0, 1e4]))
def test_equal_logits_cost_nothing_and_pull_nowhere(name, seed, scale):
    student, _, batch = example(seed=seed, dtype=torch.float32, scale=scale)
    loss = make(name.strip(), **FORMS[name], temperature=1.0)
    total = loss(student, student, batch)
    (gradient,) = torch.autograd.grad(total, student.logits)
    assert abs(float(total.detach())) < 1e-5
    assert gradient.abs().max() < 5e-5


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_and_low_precision_stay_finite_and_right(name, dtype, scale):
    student, teacher, batch = example(dtype=dtype, scale=scale)
    loss = make(name.strip(), **FORMS[name], temperature=1.0)
    total = loss(student, teacher, batch)
    (gradient,) = torch.autograd.grad(total, student.logits)
    assert total.dtype == torch.float32
    exact = on_logits(torch.Tensor.double, student, teacher)
    exact[0].logits.requires_grad_()
    expected = loss(*exact, batch)
    (slope,) = torch.autograd.grad(expected, exact[0].logits)
    assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(gradient, slope.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "dist"])
def test_a_word_that_both_models_forbid_is_as_if_it_were_not_there(name):
    """The last word, which is no target; `dist` is a mean over the words."""
    student, teacher, batch = example()
    batch = replace(batch, input_ids=batch.input_ids % 8)
    loss = make(name.strip(), **FORMS[name])
    fewer = on_logits(lambda x: x[..., :8].clone(), student, teacher)
    shut = on_logits(lambda x: F.pad(x[..., :8], (0, 1), value=-torch.inf), student, teacher)
    for each in (fewer[0], shut[0]):
        each.logits.requires_grad_()
    totals = loss(*fewer, batch), loss(*shut, batch)
    (slope,) = torch.autograd.grad(totals[0], fewer[0].logits)
    (gradient,) = torch.autograd.grad(totals[1], shut[0].logits)
    assert_close(totals[1], totals[0])
    assert_close(gradient, F.pad(slope, (0, 1)))


@pytest.mark.parametrize("name", ["jsd", "decoupled", "dist"])
def test_a_word_that_the_teacher_forbids_is_finite(name):
    student, teacher, batch = example()
    [teacher] = on_logits(lambda x: x.index_fill(-1, torch.tensor([0, 3]), -torch.inf), teacher)
    total = make(name)(student, teacher, batch)
    (gradient,) = torch.autograd.grad(total, student.logits)
    assert total.isfinite()
    assert gradient.isfinite().all()


def test_a_teacher_that_allows_one_word_alone_is_finite_for_decoupled():
    student, teacher, batch = example()
    only = F.one_hot(batch.targets, 9).bool()
    [teacher] = on_logits(lambda x: x.masked_fill(~only, -torch.inf), teacher)
    total = make("decoupled", temperature=1.0)(student, teacher, batch)
    expected = F.cross_entropy(
        student.logits[batch.target_mask], batch.targets[batch.target_mask], reduction="sum"
    )
    assert_close(total, expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsd", {"beta": 1.5}, "JensenShannonKD: beta=1.5 was given"),
        ("jsd", {"beta": "a"}, "JensenShannonKD: beta='a' was given"),
        ("decoupled", {"alpha": -1}, "DecoupledKD: alpha=-1 was given"),
        ("decoupled", {"beta": float("nan")}, "DecoupledKD: beta=nan was given"),
        ("top_k", {"k": 0}, "TopKD: k=0 was given; expected a whole number of at least 1"),
        ("top_k", {"k": 2.5}, "TopKD: k=2.5 was given"),
        ("top_k", {"k": 1, "rest": "renormalise"}, "of at least 2"),
        ("top_k", {"rest": "renormalize"}, "Did you mean 'renormalise'"),
        ("dist", {"gamma": -0.1}, "DistKD: gamma=-0.1 was given"),
        ("dist", {"beta": 0, "gamma": 0}, "DistKD: beta and gamma are 0"),
        ("decoupled", {"alpha": 0, "beta": 0}, "DecoupledKD: alpha and beta are 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        cd.losses.create(name, **options)


@pytest.mark.parametrize("name", sorted({name.strip() for name in FORMS}))
def test_vocabularies_are_compared_by_every_loss_on_words(name):
    kind = cd.losses.get(name).__name__
    with pytest.raises(IncompatibleModels, match=f"{kind}: the vocabularies differ at entry 5"):
        cd.losses.create(name).build(STUDENT, replace(TEACHER, vocabulary=tuple("abcde")))
