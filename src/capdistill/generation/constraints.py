"""What may be said next: banned ids are set to -inf, for greedy, beams and sampling alike."""

from __future__ import annotations

import torch
from torch import Tensor

from capdistill.generation.config import Plan

IMPOSSIBLE = -1e9  # probability 0: worse than any other word, better than a banned one


class Constraints:
    """The constraints of a plan, on one device, for rows (R, V) of log-probabilities.

    A caption that no word can continue may end, whatever other constraints say: no row is left
    without a word.

    Args:
        plan: What is wanted.
        vocabulary: V.
        device: Where the rows are.
    """

    def __init__(self, plan: Plan, vocabulary: int, device: torch.device) -> None:
        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.plan, config = plan, plan.config
        self.never, self.not_last = ids(plan.banned), ids(plan.not_last)
        self.phrases = [ids(phrase) for phrase in plan.phrases]
        self.ngram, self.min_length = config.no_repeat_ngram, config.min_length
        self.weak = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.weak[self.not_last] = True
        self.dynamic = bool(self.ngram or self.min_length or plan.not_last or plan.phrases)

    def __call__(self, log_probs: Tensor, said: Tensor, position: int) -> Tensor:
        """Ban in place.

        Args:
            log_probs: (R, V) of the next token.
            said: (R, L), of which the first `position` tokens count.
            position: Tokens said so far.
        """
        log_probs.clamp_(min=IMPOSSIBLE)
        if position < len(self.plan.prefix):
            return self._force(log_probs, self.plan.prefix[position])
        end = log_probs[:, self.plan.end_id].clone()
        log_probs.index_fill_(1, self.never, -torch.inf)
        if self.dynamic:
            self._ban(log_probs, said[:, :position])
            stuck = log_probs.amax(1) == -torch.inf
            ways_out = log_probs[:, self.plan.end_id]
            log_probs[:, self.plan.end_id] = torch.where(stuck, end, ways_out)
        return log_probs

    def _force(self, log_probs: Tensor, token: int) -> Tensor:
        kept = log_probs[:, token].clone()
        log_probs.fill_(-torch.inf)[:, token] = kept
        return log_probs

    def _ban(self, log_probs: Tensor, said: Tensor) -> None:
        position, end = said.shape[1], self.plan.end_id
        if position < self.min_length:
            log_probs[:, end] = -torch.inf
        if self.ngram:
            ban_repeats(log_probs, said, self.ngram)
        for phrase in self.phrases:
            ban_phrase(log_probs, said, phrase)
        if self.plan.not_last:
            if position:
                log_probs[:, end].masked_fill_(self.weak[said[:, -1]], -torch.inf)
            if position + 1 == self.plan.max_length:
                log_probs.index_fill_(1, self.not_last, -torch.inf)


def ban_repeats(log_probs: Tensor, said: Tensor, n: int) -> None:
    """Ban, in place, every token that would repeat n tokens in a row.

    Example:
        >>> log_probs = torch.zeros(1, 4)
        >>> ban_repeats(log_probs, torch.tensor([[1, 2, 1]]), n=2)
        >>> log_probs.tolist()
        [[0.0, 0.0, -inf, 0.0]]

    Args:
        log_probs: (R, V).
        said: (R, T).
        n: Length of what may not occur twice.
    """
    length = said.shape[1]
    if length < n:
        return
    windows = said.unfold(1, n, 1)  # (R, T - n + 1, n)
    latest = said[:, None, length - n + 1 :]  # (R, 1, n - 1)
    alike = (windows[..., :-1] == latest).all(-1)
    times = torch.zeros(log_probs.shape, dtype=torch.int32, device=log_probs.device)
    times.scatter_add_(1, windows[..., -1], alike.int())
    log_probs.masked_fill_(times > 0, -torch.inf)


def ban_phrase(log_probs: Tensor, said: Tensor, phrase: Tensor) -> None:
    """Ban, in place, the last token of a phrase where the others were just said.

    Args:
        log_probs: (R, V).
        said: (R, T).
        phrase: (n,) ids, n > 1.
    """
    before = len(phrase) - 1
    if said.shape[1] < before:
        return
    begun = (said[:, -before:] == phrase[:-1]).all(1)  # (R,)
    log_probs[:, phrase[-1]] = log_probs[:, phrase[-1]].masked_fill(begun, -torch.inf)
