"""Constraints on the next token: banned ids are set to -inf in every decoding method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capdistill.generation.config import GenerationSpec
from capdistill.generation.hypotheses import IMPOSSIBLE
from capdistill.generation.words import SubwordRules


class Constraints:
    """The constraints of a specification, on one device, for rows (R, V) of log-probabilities.

    If the constraints ban every token, the end token is allowed, so a row always has a
    continuation.

    Args:
        spec: The options, in token ids.
        vocabulary: V, the number of entries.
        device: The device of the rows.
    """

    def __init__(self, spec: GenerationSpec, vocabulary: int, device: torch.device) -> None:
        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.spec, config = spec, spec.config
        self.banned, self.not_last = ids(spec.banned), ids(spec.not_last)
        self.phrases = [ids(phrase) for phrase in spec.phrases]
        self.ngram, self.min_length = config.no_repeat_ngram, config.min_length
        self.cannot_end = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.cannot_end[self.not_last] = True
        self.dynamic = bool(self.ngram or self.min_length or spec.not_last or spec.phrases)
        if spec.subwords is not None:
            self.dynamic = True
            self.run_on = ids(spec.subwords.run_on)
            self.added, self.first = torch.zeros(2, vocabulary, dtype=torch.bool, device=device)
            self.added[ids(spec.subwords.added)] = True
            self.first[ids(spec.subwords.first)] = True

    def __call__(self, log_probs: Tensor, generated: Tensor, position: int) -> Tensor:
        """Set the banned tokens to -inf, in place.

        Args:
            log_probs: (R, V) log-probabilities of the next token.
            generated: (R, L) token ids; only the first `position` columns are read.
            position: Number of tokens generated so far.
        """
        log_probs.clamp_(min=IMPOSSIBLE)
        if position < len(self.spec.prefix):
            return self._force(log_probs, self.spec.prefix[position])
        end = log_probs[:, self.spec.end_id].clone()
        log_probs.index_fill_(1, self.banned, -torch.inf)
        if self.dynamic:
            self._ban(log_probs, generated[:, :position])
            all_banned = log_probs.amax(1) == -torch.inf  # (R,)
            constrained = log_probs[:, self.spec.end_id]
            log_probs[:, self.spec.end_id] = torch.where(all_banned, end, constrained)
        return log_probs

    def _force(self, log_probs: Tensor, token: int) -> Tensor:
        kept = log_probs[:, token].clone()
        log_probs.fill_(-torch.inf)[:, token] = kept
        return log_probs

    def _ban(self, log_probs: Tensor, generated: Tensor) -> None:
        position, end = generated.shape[1], self.spec.end_id
        if self.spec.subwords is not None:
            self._ban_by_words(log_probs, generated, self.spec.subwords)
        elif position < self.min_length:
            log_probs[:, end] = -torch.inf
        if self.ngram:
            ban_repeats(log_probs, generated, self.ngram)
        for phrase in self.phrases:
            ban_phrase(log_probs, generated, phrase)
        if self.spec.not_last:
            if position:
                log_probs[:, end].masked_fill_(self.cannot_end[generated[:, -1]], -torch.inf)
            if position + 1 == self.spec.max_length:
                log_probs.index_fill_(1, self.not_last, -torch.inf)

    def _ban_by_words(self, log_probs: Tensor, generated: Tensor, rules: SubwordRules) -> None:
        """What concerns words that consist of pieces."""
        position, end = generated.shape[1], self.spec.end_id
        if position and position == len(self.spec.prefix):
            log_probs.index_fill_(1, self.run_on, -torch.inf)
        if self.min_length:
            words = self.first[generated[:, :1]].sum(1) + self.added[generated[:, 1:]].sum(1)
            log_probs[:, end].masked_fill_(words < self.min_length, -torch.inf)
        for ids in rules.banned_first:
            if position + 1 == len(ids):
                log_probs[:, ids[-1]].masked_fill_(ends_with(generated, ids[:-1]), -torch.inf)
        if position:
            whole = [ids for ids in rules.not_whole if len(ids) == position]
            for ids in (*rules.not_last, *whole):
                log_probs[:, end].masked_fill_(ends_with(generated, ids), -torch.inf)
        if position + 1 == self.spec.max_length:
            whole = [ids for ids in rules.not_whole if len(ids) == position + 1]
            for ids in (*rules.not_last, *whole):
                log_probs[:, ids[-1]].masked_fill_(ends_with(generated, ids[:-1]), -torch.inf)


def ends_with(generated: Tensor, ids: Sequence[int]) -> Tensor:
    """(R,) whether the last tokens of each row are these ids.

    Example:
        >>> ends_with(torch.tensor([[1, 2, 3], [2, 3, 2]]), (2, 3)).tolist()
        [True, False]

    Args:
        generated: (R, T) token ids.
        ids: Token ids; every row ends with none.
    """
    n = len(ids)
    if n > generated.shape[1]:
        return torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    last = generated[:, generated.shape[1] - n :]  # (R, n)
    return (last == torch.tensor(ids, dtype=torch.int64, device=generated.device)).all(1)


def ban_repeats(log_probs: Tensor, generated: Tensor, n: int) -> None:
    """Ban, in place, every token that would complete a repeated n-gram.

    Example:
        >>> log_probs = torch.zeros(1, 4)
        >>> ban_repeats(log_probs, torch.tensor([[1, 2, 1]]), n=2)
        >>> log_probs.tolist()
        [[0.0, 0.0, -inf, 0.0]]

    Args:
        log_probs: (R, V) log-probabilities, changed in place.
        generated: (R, T) token ids.
        n: Length of the n-grams that must not occur twice.
    """
    length = generated.shape[1]
    if length < n:
        return
    windows = generated.unfold(1, n, 1)  # (R, T - n + 1, n)
    latest = generated[:, None, length - n + 1 :]  # (R, 1, n - 1)
    repeated = (windows[..., :-1] == latest).all(-1)
    counts = torch.zeros(log_probs.shape, dtype=torch.int32, device=log_probs.device)
    counts.scatter_add_(1, windows[..., -1], repeated.int())
    log_probs.masked_fill_(counts > 0, -torch.inf)


def ban_phrase(log_probs: Tensor, generated: Tensor, phrase: Tensor) -> None:
    """Ban, in place, the last token of a phrase in rows that have just generated the others.

    Args:
        log_probs: (R, V) log-probabilities, changed in place.
        generated: (R, T) token ids.
        phrase: (n,) token ids, n > 1.
    """
    before = len(phrase) - 1
    if generated.shape[1] < before:
        return
    matches = (generated[:, -before:] == phrase[:-1]).all(1)  # (R,)
    log_probs[:, phrase[-1]] = log_probs[:, phrase[-1]].masked_fill(matches, -torch.inf)
