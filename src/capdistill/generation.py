"""Captions word by word, over `Decoder.start` and `Decoder.step` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.errors import ConfigError


@dataclass(frozen=True)
class Hypothesis:
    """One generated caption.

    Args:
        tokens: Its ids, without start and end.
        log_prob: Sum of the decoder's log-probabilities (nats) of its tokens, the end token
            included where there is one.
        finished: Whether it ended by itself rather than at the length limit.
        text: The words.
    """

    tokens: tuple[int, ...]
    log_prob: float
    finished: bool
    text: str = ""


@dataclass
class _Greedy:
    """The images that still wait for their end token, and what has been said."""

    state: State
    tokens: Tensor  # (J,) the last word of each waiting image
    waiting: Tensor  # (J,) which images they are
    said: Tensor  # (I, L) words
    lengths: Tensor  # (I,)
    scores: Tensor  # (I,) float32, or float64 where the features are
    ended: Tensor  # (I,) bool


@torch.no_grad()
def greedy(
    decoder: Decoder,
    features: Tensor,
    *,
    start_id: int,
    end_id: int,
    max_length: int,
    banned: Sequence[int] = (),
) -> list[Hypothesis]:
    """The most probable next word, until the end token or the limit.

    Images that have ended leave the batch. Equal logits: the smaller id wins.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> features = torch.randn(2, 9, 8)
        >>> found = greedy(decoder, features, start_id=1, end_id=2, max_length=5, banned=[0, 1, 2])
        >>> [len(hypothesis.tokens) for hypothesis in found]
        [5, 5]

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D).
        start_id: Fed first.
        end_id: Ends a caption.
        max_length: Tokens at most, the end token among them.
        banned: Ids that are never said. The probability of the other words stays what it is.

    Raises:
        ConfigError: max_length < 1, or every id is banned.
    """
    if max_length < 1:
        raise ConfigError(f"max_length must be at least 1 token, got {max_length}.")
    words = decoder.vocabulary
    if words and set(banned).issuperset(range(words)):
        raise ConfigError(f"All {words} ids are banned; leave at least one to say.")
    if not len(features):
        return []
    run = _begin(decoder, features, start_id, max_length)
    never = torch.tensor([*banned], dtype=torch.int64, device=features.device)
    for position in range(max_length):
        logits, run.state = decoder.step(run.tokens, run.state)  # (J, V)
        _say(run, logits, never, position, end_id)
        if not len(run.waiting):
            break
    return _collect(run)


def _begin(decoder: Decoder, features: Tensor, start_id: int, max_length: int) -> _Greedy:
    images, device = len(features), features.device
    return _Greedy(
        state=decoder.start(features),
        tokens=torch.full((images,), start_id, device=device),
        waiting=torch.arange(images, device=device),
        said=torch.zeros(images, max_length, dtype=torch.int64, device=device),
        lengths=torch.zeros(images, dtype=torch.int64, device=device),
        scores=torch.zeros(images, dtype=_exact(features), device=device),
        ended=torch.zeros(images, dtype=torch.bool, device=device),
    )


def _say(run: _Greedy, logits: Tensor, never: Tensor, position: int, end_id: int) -> None:
    """Add one word to each waiting image; those that end leave."""
    logits = logits.to(_exact(logits))
    possible = logits.clamp(min=torch.finfo(logits.dtype).min)  # what is banned is worse still
    best = possible.index_fill(1, never, -torch.inf).argmax(-1)  # (J,), the first of equals
    log_probs = logits.log_softmax(-1).gather(1, best[:, None])[:, 0]
    run.scores[run.waiting] += log_probs.to(run.scores.dtype)
    ends = best == end_id
    run.ended[run.waiting[ends]] = True
    going = (~ends).nonzero()[:, 0]  # one synchronisation a word
    if len(going) < len(best):
        run.state = run.state.keep(going)
    run.waiting, run.tokens = run.waiting[going], best[going]
    run.said[run.waiting, position] = run.tokens
    run.lengths[run.waiting] += 1


def _exact(values: Tensor) -> torch.dtype:
    """Half precision is too coarse to add up log-probabilities in."""
    return torch.promote_types(values.dtype, torch.float32)


def _collect(run: _Greedy) -> list[Hypothesis]:
    columns = (run.said, run.lengths, run.scores, run.ended)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Hypothesis(tuple(said[:n]), score, ended) for said, n, score, ended in rows]
