"""Hypotheses of several images as tensors, and as `Hypothesis` objects at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from capdistill.generation.constraints import IMPOSSIBLE
from capdistill.generation.hypothesis import Hypothesis

LEAVING_SHARE = 8  # images leave once an eighth of them is done: copying the others costs too
LOOK_EVERY = 4  # words between two looks at an accelerator, which must be waited for


@dataclass(frozen=True)
class Found:
    """K hypotheses of each of J images.

    Args:
        images: (J,) places in the batch.
        tokens: (J, K, L) ids; those from `lengths` on mean nothing.
        log_probs: (J, K, L) of the tokens, the end token's after the last.
        lengths: (J, K) tokens, without the end.
        ended: (J, K) bool, by an end token.
        scores: (J, K); -inf where there is no hypothesis.
    """

    images: Tensor
    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    ended: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, like: Tensor, count: int, length: int) -> Found:
        """No hypothesis yet, for as many images as `like` has rows and in its precision."""
        images, device = len(like), like.device
        shape = (images, count)
        return cls(
            images=torch.arange(images, device=device),
            tokens=torch.zeros(*shape, length, dtype=torch.int64, device=device),
            log_probs=torch.zeros(*shape, length, dtype=like.dtype, device=device),
            lengths=torch.zeros(shape, dtype=torch.int64, device=device),
            ended=torch.zeros(shape, dtype=torch.bool, device=device),
            scores=torch.full(shape, -torch.inf, dtype=like.dtype, device=device),
        )

    def take(self, index: Tensor) -> Found:
        """Some of the images."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """All images, in the order of the batch."""
        if len(parts) > 1:
            values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
            parts = [cls(**{name: torch.cat(each) for name, each in values.items()})]
        return parts[0].take(parts[0].images.argsort())

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best of each image, with its `count` best; equal scores stay in their order."""
        order = self.scores.sort(dim=1, descending=True, stable=True).indices[:, :count]  # (J, n)
        longest = int((self.lengths + self.ended.long()).max())
        deep = order[..., None].expand(-1, -1, longest)
        columns = (
            self.tokens[..., :longest].gather(1, deep),
            self.log_probs[..., :longest].gather(1, deep),
            *(each.gather(1, order) for each in (self.lengths, self.ended, self.scores)),
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [_best(list(zip(*row, strict=True))) for row in rows]


Row = tuple[list[int], list[float], int, bool, float]


def _best(rows: list[Row]) -> Hypothesis:
    found = [_hypothesis(*row) for row in rows if row[-1] > -torch.inf]
    return replace(found[0], n_best=tuple(found)) if len(rows) > 1 else found[0]


def _hypothesis(
    tokens: list[int], log_probs: list[float], length: int, ended: bool, score: float
) -> Hypothesis:
    each = tuple(p if p > IMPOSSIBLE else -torch.inf for p in log_probs[: length + ended])
    return Hypothesis(tuple(tokens[:length]), sum(each), ended, score=score, token_log_probs=each)


def staying(done: Tensor, position: int) -> Tensor | None:
    """Indices (J',) of the images that are not done; None where none, or too few, would leave.

    Example:
        >>> staying(torch.tensor([True, False]), position=0)
        tensor([1])
    """
    if done.device.type != "cpu" and position % LOOK_EVERY:
        return None
    count = int(done.sum())
    if count < len(done) and count * LEAVING_SHARE < len(done):
        return None
    return None if count == 0 else (~done).nonzero()[:, 0]


def exact(dtype: torch.dtype) -> torch.dtype:
    """Half precision is too coarse to add up log-probabilities in."""
    return torch.promote_types(dtype, torch.float32)
