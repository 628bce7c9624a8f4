"""TokenKD: T², vocabularies by content, and the end token that many masks lose."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capdistill.errors import IncompatibleModels
from capdistill.losses.divergence import kl_divergence
from capdistill.losses.token import TokenKD
from capdistill.outputs import Batch, CaptionerOutput
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output, pad


def padding_is_the_end_token():
    """Case 7: start = end = padding = 0; the models differ only where a caption ends."""
    ids = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 4, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = Batch(images, ids, mask, ("a dog runs", "a cat"), ("1", "2"))
    student, teacher = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)
    teacher[0, 3, 0] = teacher[1, 2, 0] = 2.0
    student.requires_grad_()
    outputs = (CaptionerOutput(x, (), x.new_zeros(2, 1, 1), x, mask) for x in (student, teacher))
    return batch, *outputs


def test_end_tokens_count_where_padding_has_their_id():
    batch, student, teacher = padding_is_the_end_token()
    loss = TokenKD(temperature=1.0)
    total = loss(student, teacher, batch)
    total.backward()
    assert loss.count(batch) == 7
    assert_close(total.item(), 0.9487123, rtol=0, atol=1e-6)
    assert_close(total.item() / loss.count(batch), 0.1355303, rtol=0, atol=1e-6)
    assert student.logits.grad[0, 3].ne(0).all()
    assert student.logits.grad[1, 2].ne(0).all()


def test_ten_more_padding_columns_change_nothing():
    batch, student, teacher = padding_is_the_end_token()
    longer, wide = pad(batch, student, 10)
    _, wide_teacher = pad(batch, teacher, 10)
    total = TokenKD(temperature=1.0)(wide, wide_teacher, longer)
    assert_close(total.item(), 0.9487123, rtol=0, atol=1e-6)


def test_the_sum_is_scaled_by_the_squared_temperature():
    batch = make_batch([3, 1, 2, 3])
    student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
    softened = kl_divergence(student.logits, teacher.logits, batch.target_mask, 3.0)
    assert_close(TokenKD(temperature=3.0)(student, teacher, batch), 9 * softened)


def test_the_gradient_keeps_its_size_when_the_temperature_grows():
    batch = make_batch([3, 3])
    sizes = []
    for temperature in (50.0, 500.0):  # in the limit the gradient does not depend on it
        student, teacher = make_output(batch, STUDENT, 1), make_output(batch, TEACHER, 2)
        TokenKD(temperature)(student, teacher, batch).backward()
        sizes.append(student.logits.grad.norm())
    assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


def test_equal_vocabularies_of_another_type_are_accepted():
    TokenKD().build(STUDENT, replace(TEACHER, vocabulary=list(TEACHER.vocabulary)))


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("abXdefghi", r"entry 2: 'small' has 'c' \(9 entries\), 'large' has 'X' \(9 entries\)"),
        ("abcde", r"entry 5: 'small' has 'f' \(9 entries\), 'large' has no entry \(5 entries\)"),
        ("abcdefghij", r"entry 9: 'small' has no entry \(9 entries\), 'large' has 'j' \(10 ent"),
    ],
)
def test_vocabularies_that_differ_are_refused_with_the_first_difference(vocabulary, message):
    with pytest.raises(IncompatibleModels, match=message):
        TokenKD().build(STUDENT, replace(TEACHER, vocabulary=tuple(vocabulary)))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="give a finite number > 0"):
        TokenKD(temperature)
