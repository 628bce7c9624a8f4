"""Which tokens may come next: banned ids are set to -inf in greedy, beam search and sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from capdistill.generation.config import GenerationSpec

IMPOSSIBLE = -1e9  # probability 0: worse than any other word, better than a banned one


class Constraints:
    """The constraints of a specification, on one device, for rows (R, V) of log-probabilities.

    A caption that no word can continue may end, whatever other constraints say: no row is left
    without a word.

    Args:
        spec: The options, in token ids.
        vocabulary: V.
        device: Where the rows are.
    """

    def __init__(self, spec: GenerationSpec, vocabulary: int, device: torch.device) -> None:
        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.spec, config = spec, spec.config
        self.never, self.not_last = ids(spec.banned), ids(spec.not_last)
        self.phrases = [ids(phrase) for phrase in spec.phrases]
        self.ngram, self.min_length = config.no_repeat_ngram, config.min_length
        self.weak = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.weak[self.not_last] = True
        self.dynamic = bool(self.ngram or self.min_length or spec.not_last or spec.phrases)

    def __call__(self, log_probs: Tensor, generated: Tensor, position: int) -> Tensor:
        """Ban in place.

        Args:
            log_probs: (R, V) of the next token.
            generated: (R, L), of which the first `position` tokens count.
            position: Tokens generated so far.
        """
        log_probs.clamp_(min=IMPOSSIBLE)
        if position < len(self.spec.prefix):
            return self._force(log_probs, self.spec.prefix[position])
        end = log_probs[:, self.spec.end_id].clone()
        log_probs.index_fill_(1, self.never, -torch.inf)
        if self.dynamic:
            self._ban(log_probs, generated[:, :position])
            stuck = log_probs.amax(1) == -torch.inf
            ways_out = log_probs[:, self.spec.end_id]
            log_probs[:, self.spec.end_id] = torch.where(stuck, end, ways_out)
        return log_probs

    def _force(self, log_probs: Tensor, token: int) -> Tensor:
        kept = log_probs[:, token].clone()
        log_probs.fill_(-torch.inf)[:, token] = kept
        return log_probs

    def _ban(self, log_probs: Tensor, generated: Tensor) -> None:
        position, end = generated.shape[1], self.spec.end_id
        if position < self.min_length:
            log_probs[:, end] = -torch.inf
        if self.ngram:
            ban_repeats(log_probs, generated, self.ngram)
        for phrase in self.phrases:
            ban_phrase(log_probs, generated, phrase)
        if self.spec.not_last:
            if position:
                log_probs[:, end].masked_fill_(self.weak[generated[:, -1]], -torch.inf)
            if position + 1 == self.spec.max_length:
                log_probs.index_fill_(1, self.not_last, -torch.inf)


def ban_repeats(log_probs: Tensor, generated: Tensor, n: int) -> None:
    """Ban, in place, every token that would repeat n tokens in a row.

    Example:
        >>> log_probs = torch.zeros(1, 4)
        >>> ban_repeats(log_probs, torch.tensor([[1, 2, 1]]), n=2)
        >>> log_probs.tolist()
        [[0.0, 0.0, -inf, 0.0]]

    Args:
        log_probs: (R, V).
        generated: (R, T).
        n: Length of what may not occur twice.
    """
    length = generated.shape[1]
    if length < n:
        return
    windows = generated.unfold(1, n, 1)  # (R, T - n + 1, n)
    latest = generated[:, None, length - n + 1 :]  # (R, 1, n - 1)
    alike = (windows[..., :-1] == latest).all(-1)
    times = torch.zeros(log_probs.shape, dtype=torch.int32, device=log_probs.device)
    times.scatter_add_(1, windows[..., -1], alike.int())
    log_probs.masked_fill_(times > 0, -torch.inf)


def ban_phrase(log_probs: Tensor, generated: Tensor, phrase: Tensor) -> None:
    """Ban, in place, the last token of a phrase where the others were just generated.

    Args:
        log_probs: (R, V).
        generated: (R, T).
        phrase: (n,) ids, n > 1.
    """
    before = len(phrase) - 1
    if generated.shape[1] < before:
        return
    begun = (generated[:, -before:] == phrase[:-1]).all(1)  # (R,)
    log_probs[:, phrase[-1]] = log_probs[:, phrase[-1]].masked_fill(begun, -torch.inf)
