"""Law 2: divergences in float32 log-space, masked first. Oracles: float64, torch.nn.functional."""

import weakref
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile
from torch.testing import assert_close

from capdistill.losses import divergence
from capdistill.losses.divergence import (
    by_autograd,
    cross_entropy,
    decoupled_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
    sum_over_rows,
    top_k_divergence,
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


def test_the_teachers_logits_get_no_gradient():
    student, teacher = draw(0, 1, 1, 4).requires_grad_(), draw(1, 1, 1, 4).requires_grad_()
    kl_divergence(student, teacher, ONE).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"mask is \(2, 3\).*values are \(3, 2, 4\).*\(3, 2\)"):
        valid_rows(torch.zeros(3, 2, 4), torch.ones(2, 3, dtype=torch.bool))


# -- chunks of rows ------------------------------------------------------------------------------


def log_probs(logits, mask, temperature=2.0):
    return F.log_softmax(logits[mask] / temperature, -1)


def kl(target, other):
    return (target.exp() * (target - other)).sum()


def reverse(student, teacher, mask):
    return kl(log_probs(student, mask), log_probs(teacher, mask))


def jensen_shannon(student, teacher, mask):
    mine, theirs = log_probs(student, mask), log_probs(teacher, mask)
    mixed = (0.3 * theirs.exp() + 0.7 * mine.exp()).log()
    return 0.3 * kl(theirs, mixed) + 0.7 * kl(mine, mixed)


def decoupled(student, teacher, mask):
    mine, theirs = log_probs(student, mask).exp(), log_probs(teacher, mask).exp()
    is_target = F.one_hot(TARGETS[mask], mine.shape[-1]).bool()
    p, q = (each[is_target] for each in (theirs, mine))
    tckd = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    others = [each[~is_target].view(len(p), -1) for each in (theirs, mine)]
    return tckd + 8 * kl(*((e / e.sum(1, keepdim=True)).log() for e in others))


def top_three(student, teacher, mask):
    mine, theirs = log_probs(student, mask).exp(), log_probs(teacher, mask).exp()
    index = theirs.topk(3).indices
    chosen = [each.gather(1, index) for each in (theirs, mine)]
    return kl(*(torch.cat([e, 1 - e.sum(1, keepdim=True)], 1).log() for e in chosen))


def weighted_cross_entropy(student, teacher, mask):
    each = F.cross_entropy(student.transpose(1, 2), TARGETS, reduction="none", label_smoothing=0.2)
    return (each * WEIGHTS[:, None])[mask].sum()


TARGETS, WEIGHTS = torch.arange(12).view(3, 4) % 7, torch.tensor([0.5, 0.0, 2.0])
CHUNKED = {
    "kl": (lambda s, t, m: kl_divergence(s, t, m, 2.0), lambda s, t, m: kl_oracle(s, t, m, 2.0)),
    "reverse": (lambda s, t, m: reverse_kl_divergence(s, t, m, 2.0), reverse),
    "jsd": (lambda s, t, m: jensen_shannon_divergence(s, t, m, 0.3, 2.0), jensen_shannon),
    "dkd": (lambda s, t, m: decoupled_divergence(s, t, TARGETS, m, 1.0, 8.0, 2.0), decoupled),
    "top_k": (lambda s, t, m: top_k_divergence(s, t, m, 3, 2.0), top_three),
    "ce": (lambda s, t, m: cross_entropy(s, TARGETS, m, 0.2, WEIGHTS), weighted_cross_entropy),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize(("rows", "factor"), [(1, 1.0), (2, 0.25), (100, 3.0)])
def test_chunks_of_rows_give_the_value_and_gradient_of_the_formula(name, rows, factor, monkeypatch):
    monkeypatch.setitem(divergence.CHUNK, "cpu", 7 * rows)
    monkeypatch.setattr(divergence, "CHUNKS", 12)
    student, teacher = draw(0, 3, 4, 7), draw(1, 3, 4, 7)
    mask = draw(2, 3, 4) > -1
    found, oracle = CHUNKED[name]
    mine = grad_of(lambda s: factor * found(s, teacher, mask), student)
    assert_close(mine, grad_of(lambda s: factor * oracle(s, teacher, mask), student))


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_beside_the_logits_only_their_gradient_is_kept(name, dtype, monkeypatch):
    monkeypatch.setitem(divergence.CHUNK, "cpu", 7)
    student, teacher = draw(0, 3, 4, 7, dtype=dtype).requires_grad_(), draw(1, 3, 4, 7, dtype=dtype)
    saved = []

    def pack(tensor):
        tensor = tensor.detach()  # an output that its own node holds would never be freed
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = CHUNKED[name][0](student, teacher, torch.ones(3, 4, dtype=torch.bool))
    kept = {each().data_ptr(): each() for each in saved if each() is not None}
    others = kept.keys() - {student.data_ptr(), teacher.data_ptr()}
    assert student.data_ptr() in kept
    assert sum(kept[each].numel() for each in others) <= 2 * TARGETS.numel()
    gradients = [f.gradient for f in nodes(total.grad_fn) if hasattr(f, "gradient")]
    assert [each is None for each in gradients] == [dtype == torch.float16]


def test_two_losses_take_the_memory_of_two_gradients(monkeypatch):
    monkeypatch.setitem(divergence.CHUNK, "cpu", 1)
    student, teacher = draw(0, 8, 10, 500).requires_grad_(), draw(1, 8, 10, 500)
    mask, targets = torch.ones(8, 10, dtype=torch.bool), torch.zeros(8, 10, dtype=torch.long)
    with profile(profile_memory=True) as profiled:
        both = kl_divergence(student, teacher, mask, 2.0) + cross_entropy(student, targets, mask)
        both.backward()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = list(accumulate(size for _, size in changes))
    assert held[-1] == pytest.approx(student.nbytes, rel=0.05)  # its gradient
    assert max(held) <= 2.2 * student.nbytes


def nodes(root):
    """The node of an autograd graph and all that it leads to."""
    return [root, *(n for child, _ in root.next_functions if child for n in nodes(child))]


def test_small_gradients_survive_loss_scaling_in_fp16():
    """Probabilities near 1e-9 are below what fp16 can hold, times 2**16 they are not."""
    logits = torch.zeros(1, 1, 3, dtype=torch.float16)
    logits[..., 0] = 20
    _, gradient = grad_of(lambda s: 2**16 * cross_entropy(s, torch.tensor([[0]]), ONE), logits)
    expected = 2**16 * logits[0, 0].double().softmax(-1)[1:]
    assert_close(gradient[0, 0, 1:].double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", CHUNKED)
def test_a_graph_that_is_kept_gives_the_gradient_again(name):
    student, teacher = draw(0, 3, 4, 7).requires_grad_(), draw(1, 3, 4, 7)
    total = CHUNKED[name][0](student, teacher, torch.ones(3, 4, dtype=torch.bool))
    first, again = (torch.autograd.grad(total, student, retain_graph=True) for _ in range(2))
    assert_close(first, again, rtol=0, atol=0)
    assert first[0].any()


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    student, weight = draw(0, 1, 2, 3).requires_grad_(), torch.ones(()).requires_grad_()
    square = by_autograd(lambda rows: rows.square().sum())
    total = weight * sum_over_rows(square, torch.ones(1, 2).bool(), student)
    (slope,) = torch.autograd.grad(total, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
