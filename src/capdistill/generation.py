"""Captions word by word, over `Decoder.start` and `Decoder.step` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.errors import ConfigError


@dataclass(frozen=True)
class Hypothesis:
    """One generated caption.

    Args:
        tokens: Its ids, without start and end.
        log_prob: Sum of the log-probabilities (nats) of its tokens, the end token included.
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
    scores: Tensor  # (I,) float32
    ended: Tensor = field(init=False)  # (I,) bool

    def __post_init__(self) -> None:
        self.ended = torch.zeros_like(self.lengths, dtype=torch.bool)


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

    Args:
        decoder: A built decoder.
        features: (I, N, D).
        start_id: Fed first.
        end_id: Ends a caption.
        max_length: Tokens at most, the end token among them.
        banned: Ids that are never said.

    Raises:
        ConfigError: max_length < 1.
    """
    if max_length < 1:
        raise ConfigError(f"max_length must be at least 1 token, got {max_length}.")
    run = _begin(decoder, features, start_id, max_length)
    for position in range(max_length):
        logits, run.state = decoder.step(run.tokens, run.state)  # (J, V)
        logits = logits.float().index_fill(1, torch.tensor([*banned], device=logits.device), -1e30)
        _say(run, logits, position, end_id)
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
        scores=torch.zeros(images, device=device),
    )


def _say(run: _Greedy, logits: Tensor, position: int, end_id: int) -> None:
    """Add one word to each waiting image; those that end leave."""
    log_probs = logits.log_softmax(-1)
    best = log_probs.argmax(-1)  # (J,)
    run.scores[run.waiting] += log_probs.gather(1, best[:, None])[:, 0]
    ends = best == end_id
    run.ended[run.waiting[ends]] = True
    going = (~ends).nonzero()[:, 0]  # one synchronisation a word
    if len(going) < len(best):
        run.state = run.state.keep(going)
    run.waiting, run.tokens = run.waiting[going], best[going]
    run.said[run.waiting, position] = run.tokens
    run.lengths[run.waiting] += 1


def _collect(run: _Greedy) -> list[Hypothesis]:
    rows = zip(
        run.said.tolist(),
        run.lengths.tolist(),
        run.scores.tolist(),
        run.ended.tolist(),
        strict=True,
    )
    return [Hypothesis(tuple(said[:n]), score, ended) for said, n, score, ended in rows]
