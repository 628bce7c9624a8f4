"""Divergences between models of different vocabularies, at positions of the same meaning.

As in `divergence.py`, they are computed in float32 (float64 stays float64), chunk by chunk, and no
gradient flows into the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.losses.divergence import by_autograd, full, sum_over_rows

_NEVER = -1e30  # a log-probability; the gradient of -inf would be nan


class WordLogits(NamedTuple):
    """What one model says at n words, the tokens of its vocabulary, and the classes of these.

    Args:
        logits: (R, V) at every position.
        rows: (n,) the row that predicts the first token of each word.
        first: (n,) that token.
        moves: (n,) bool, whether the probability of the word itself is moved to its own class.
        chain: (m, 3) number of the word, row and token, of every further token of a word.
        ids: (U,) tokens that are a whole word.
        classes: (U,) their classes, 0 to K - 1; all other tokens are the rest, K.
    """

    logits: Tensor
    rows: Tensor
    first: Tensor
    moves: Tensor
    chain: Tensor
    ids: Tensor
    classes: Tensor


def word_divergence(
    student: WordLogits,
    teacher: WordLogits,
    own: Tensor,
    size: int,
    temperature: float = 1.0,
    rest: bool = True,
) -> Tensor:
    """Sum over words of KL(teacher || student) between distributions of the next word.

    The classes are the words that are one token for both models, the rest, and the word that stands
    in the caption if it has more tokens: its probability is the product of those of its tokens, and
    is taken from the class of its first token. They are disjoint, so the probabilities add up to 1.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
        >>> first, none = torch.tensor([0]), torch.zeros(0, 3, dtype=torch.int64)
        >>> side = WordLogits(logits, first, first, first > 0, none, first, first)
        >>> other = side._replace(logits=torch.zeros(2, 3))
        >>> round(float(word_divergence(side, other, first, size=1)), 4)  # 1/3 to 1/2, rest
        0.0566

    Args:
        student, teacher: The same n words.
        own: (n,) the class of the word itself: 0 to K - 1, or K + 1 for one of its own.
        size: K.
        temperature: T > 0; log-probabilities of the classes are divided by it.
        rest: Whether the rest is a class; otherwise the others are renormalised.

    Source:
        Minixhofer, Vulić, Ponti (2025), Approximate Likelihood Matching, section 3, for chunks of
        tokens that cover the same text, and the probability of a chunk; instead of the chunk and
        its complement, all words that both vocabularies have are compared.
    """
    chain = _chain_log_probs(student)
    with torch.no_grad():
        their_chain = _chain_log_probs(teacher)

    def value(rows: Tensor, order: Tensor) -> Tensor:
        at = own[order]
        mine = _class_log_probs(student, order, rows[:, :-1], rows[:, -1:], at, size)
        with torch.no_grad():
            given = full(teacher.logits[teacher.rows[order]])
            theirs = _class_log_probs(teacher, order, given, their_chain[order], at, size)
        if not rest:
            mine, theirs = (each.index_fill(-1, _one(size, own), _NEVER) for each in (mine, theirs))
        mine, theirs = (F.log_softmax(each / temperature, -1) for each in (mine, theirs))
        weight = theirs.exp()
        return (weight * (theirs - mine).masked_fill(weight == 0, 0)).sum()

    rows = torch.cat([student.logits[student.rows], chain], -1)[None]  # (1, n, V + 1)
    return _over_words(value, rows)


def _one(value: int, like: Tensor) -> Tensor:
    return torch.full((1,), value, dtype=torch.int64, device=like.device)


def _over_words(value: object, rows: Tensor) -> Tensor:
    """The sum over rows (1, n, W); `value` is given chunks of them and their numbers."""
    order = torch.arange(rows.shape[1], device=rows.device)[None]
    every = torch.ones_like(order, dtype=torch.bool)
    return sum_over_rows(by_autograd(value), every, rows, order)  # type: ignore[arg-type]


def _chain_log_probs(side: WordLogits) -> Tensor:
    """(n, 1) the log-probability of the tokens of each word behind its first one."""
    words, rows, tokens = side.chain.unbind(1)
    each = F.log_softmax(full(side.logits[rows]), -1).gather(-1, tokens[:, None])[:, 0]
    total = each.new_zeros(len(side.rows)).index_add(0, words, each)
    several = torch.zeros_like(side.moves).index_fill(0, words, True)
    below_one = total.clamp(max=-torch.finfo(total.dtype).eps)  # 0 is said of one token alone
    return torch.where(several, below_one, total)[:, None]


def _class_log_probs(
    side: WordLogits, order: Tensor, logits: Tensor, chain: Tensor, own: Tensor, size: int
) -> Tensor:
    """(n, K + 2) log-probabilities of the classes, the rest, and a class of the word's own."""
    log_probs = F.log_softmax(logits, -1)
    first, moves = side.first[order, None], side.moves[order, None]
    start = log_probs.gather(-1, first)
    left = torch.where(moves, start + _log_complement(chain), start)
    log_probs = log_probs.scatter(-1, first, left.clamp(min=_NEVER))
    rest = log_probs.index_fill(-1, side.ids, _NEVER).logsumexp(-1, keepdim=True)
    known = _grouped_logsumexp(log_probs.index_select(-1, side.ids), side.classes, size)
    whole = torch.cat([known, rest, torch.full_like(rest, _NEVER)], -1)
    moved = torch.where(moves, start + chain, torch.full_like(start, _NEVER))
    place = own[:, None]
    return whole.scatter(-1, place, torch.logaddexp(whole.gather(-1, place), moved))


def _log_complement(log_prob: Tensor) -> Tensor:
    """log(1 - p); for p = 1, of a word of one token, nothing is left."""
    bound = -torch.finfo(log_prob.dtype).eps
    left = (-torch.expm1(log_prob.clamp(max=bound))).log()
    return torch.where(log_prob == 0, torch.full_like(left, _NEVER), left)


def _grouped_logsumexp(values: Tensor, groups: Tensor, size: int) -> Tensor:
    """(n, U) values to the log-sum-exp of each of `size` groups; every group has a member."""
    index = groups.expand(values.shape)
    top = values.new_full((len(values), size), _NEVER)
    top = top.scatter_reduce(-1, index, values.detach(), "amax")
    shifted = (values - top.gather(-1, index)).exp()
    return torch.zeros_like(top).scatter_add(-1, index, shifted).log() + top


def sorted_distance(
    student_rows: Tensor, teacher_logits: Tensor, teacher_rows: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over positions of the distance between the sorted probabilities of two vocabularies.

    It is the Wasserstein-1 distance where the cost of moving probability between any two entries is
    equal. The shorter vector is filled up with zeros.

    Example:
        >>> student, teacher = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.1, 0.2, 0.7]])
        >>> student, teacher = student.log(), teacher.log()
        >>> round(float(sorted_distance(student, teacher, torch.tensor([0]))), 4)  # .1 + .2 + .1
        0.4

    Args:
        student_rows: (n, V) logits of the student.
        teacher_logits: (R, V') logits of the teacher.
        teacher_rows: (n,) the row of each position.
        temperature: T > 0; both logits are divided by it.

    Source:
        Boizard et al. (2024), Towards Cross-Tokenizer Distillation: the Universal Logit
        Distillation Loss for LLMs, the closed form for a uniform cost.
    """

    def value(rows: Tensor, order: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = _sorted(full(teacher_logits[teacher_rows[order]]), temperature)
        mine = _sorted(rows, temperature)
        width = max(mine.shape[-1], theirs.shape[-1])
        mine, theirs = (F.pad(each, (0, width - each.shape[-1])) for each in (mine, theirs))
        return (mine - theirs).abs().sum()

    return _over_words(value, student_rows[None])


def _sorted(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).softmax(-1).sort(-1, descending=True).values
