"""Beam search, batched over images, in one group or in several that avoid each other's words.

At every word the best 2K continuations of an image's K open beams are looked at, so that K stay
open whatever ends. An end among the best K of them is kept, ranked by its normalised score; what
is kept never changes, it can only be displaced by something better.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.generation.constraints import Constraints
from capdistill.generation.found import Found, exact, staying
from capdistill.generation.plan import Plan
from capdistill.generation.score import best, bound, penalty


class Beams:
    """The open beams of the images that are not done, and what is kept of them.

    Args:
        decoder: In evaluation mode.
        features: (I, N, D).
        plan: What is wanted.
    """

    def __init__(self, decoder: Decoder, features: Tensor, plan: Plan) -> None:
        self.decoder, self.plan = decoder, plan
        config, device = plan.config, features.device
        self.groups, self.size = config.beam_groups, config.beam_size // config.beam_groups
        like = torch.empty(len(features), dtype=exact(features.dtype), device=device)
        self.kept = Found.empty(like, config.beam_size, plan.max_length)
        # One beam an image reads the start; it becomes K when their first words are chosen.
        self.open = Found.empty(like, 1, plan.max_length)
        self.open.scores.zero_()
        self.state: State = decoder.start(features)
        self.tokens = torch.full((len(features),), plan.start_id, device=device)
        self.done = torch.zeros(len(features), self.groups, dtype=torch.bool, device=device)
        self.gone: list[Found] = []

    def run(self) -> Found:
        """Search until no image can find anything better, or the limit."""
        rules: Constraints | None = None
        for position in range(self.plan.max_length):
            logits, self.state = self.decoder.step(self.tokens, self.state)  # (R, V)
            rules = rules or Constraints(self.plan, logits.shape[1], logits.device)
            log_probs = logits.to(exact(logits.dtype)).log_softmax(-1)
            rules(log_probs, self.open.tokens.flatten(0, 1), position)
            self._grow(log_probs.view(*self.open.scores.shape, -1), position)
            if position + 1 == self.plan.max_length:
                break
            stay = staying(self.done.all(1), position)
            if stay is not None:
                self._leave(stay)
            if not len(self.kept.images):
                break
        return Found.join([*self.gone, self.kept])

    def _grow(self, log_probs: Tensor, position: int) -> None:
        """One word more for every beam, (J, K, V), group after group."""
        parts: list[tuple[Tensor, ...]] = []
        said = torch.zeros_like(log_probs[:, 0])  # (J, V) times an earlier group said the word here
        for group in range(self.groups):
            mine = slice(None) if log_probs.shape[1] == 1 else self._slots(group)
            first = 0 if log_probs.shape[1] == 1 else group * self.size
            scores = self.open.scores[:, mine, None] + log_probs[:, mine]  # (J, K/G, V)
            if group:
                scores = scores - self.plan.config.diversity_penalty * said[:, None]
            scores, flat = best(scores.flatten(1), 2 * self.size)
            word = flat % log_probs.shape[2]
            parent = flat // log_probs.shape[2] + first
            self._keep(group, scores, parent, word, log_probs, position)
            was_done = self.done[:, group, None].clone()
            chosen = self._go_on(group, scores, parent, word, position)
            parts.append(chosen)
            if group + 1 < self.groups:
                alive = (chosen[0] > -torch.inf) & ~was_done
                said.scatter_add_(1, chosen[2], alive.to(said.dtype))
        self._move(log_probs, position, *(torch.cat(each, 1) for each in zip(*parts, strict=True)))

    def _slots(self, group: int) -> slice:
        return slice(group * self.size, (group + 1) * self.size)

    def _keep(
        self,
        group: int,
        scores: Tensor,
        parent: Tensor,
        word: Tensor,
        log_probs: Tensor,
        position: int,
    ) -> None:
        """Ends (at the limit, everything) among the best K candidates join what is kept."""
        scores, parent, word = (each[:, : self.size] for each in (scores, parent, word))
        ends = word == self.plan.end_id  # (J, K/G)
        last = position + 1 == self.plan.max_length
        joins = (scores > -torch.inf) & ~self.done[:, group, None]
        joins = joins if last else joins & ends
        if joins.device.type == "cpu" and not bool(joins.any()):
            return
        ranked = torch.where(joins, scores / penalty(self.plan.config, position + 1), -torch.inf)
        new = self._extended(parent, word, log_probs, position)
        new = replace(new, scores=ranked, ended=ends, lengths=position + (~ends).long())
        self._merge(self._slots(group), new)

    def _extended(self, parent: Tensor, word: Tensor, log_probs: Tensor, position: int) -> Found:
        """The open beams `parent` (J, k) with `word` after them."""
        deep = parent[..., None].expand(-1, -1, self.plan.max_length)
        tokens, past = (each.gather(1, deep) for each in (self.open.tokens, self.open.log_probs))
        tokens[..., position] = word
        vocabulary = log_probs.shape[2]
        past[..., position] = log_probs.flatten(1).gather(1, parent * vocabulary + word)
        return replace(self.open, tokens=tokens, log_probs=past)

    def _merge(self, slots: slice, new: Found) -> None:
        """The best of what is kept and what is new; of equals, what was kept first."""
        names = ("scores", "tokens", "log_probs", "lengths", "ended")
        kept = {name: getattr(self.kept, name)[:, slots] for name in names}
        both = {name: torch.cat([kept[name], getattr(new, name)], 1) for name in names}
        order = both["scores"].sort(dim=1, descending=True, stable=True).indices[:, : self.size]
        deep = order[..., None].expand(-1, -1, self.plan.max_length)
        for name in names:
            kept[name].copy_(both[name].gather(1, deep if both[name].ndim == 3 else order))

    def _go_on(
        self, group: int, scores: Tensor, parent: Tensor, word: Tensor, position: int
    ) -> tuple[Tensor, ...]:
        """The best K candidates that have not ended; whether the group is done."""
        config, longest = self.plan.config, self.plan.max_length
        ends = word == self.plan.end_id
        order = ends.long().sort(dim=1, stable=True).indices[:, : self.size]
        scores = scores.masked_fill(ends, -torch.inf).gather(1, order)
        worst = self.kept.scores[:, self._slots(group)].amin(1)  # -inf until there are K
        if config.early_stopping is True:
            hopeless = worst > -torch.inf
        else:
            hopeless = scores[:, 0] / bound(config, position + 1, longest) <= worst
        self.done[:, group] |= hopeless | (scores[:, 0] == -torch.inf)
        return scores, parent.gather(1, order), word.gather(1, order)

    def _move(
        self, log_probs: Tensor, position: int, scores: Tensor, parent: Tensor, word: Tensor
    ) -> None:
        """The chosen beams (J, K) become the open ones, and the state follows."""
        old = self.open.scores.shape[1]
        extended = self._extended(parent, word, log_probs, position)
        self.open = replace(extended, scores=scores)
        self.tokens = word.flatten()
        if position + 1 == self.plan.max_length:
            return
        if old == 1:
            self.state = self.state.expand(scores.shape[1])
            return
        images = torch.arange(len(parent), device=parent.device)
        self.state = self.state.reorder((images[:, None] * old + parent).flatten())

    def _leave(self, stay: Tensor) -> None:
        gone = torch.ones_like(self.kept.images, dtype=torch.bool)
        gone[stay] = False
        self.gone.append(self.kept.take(gone))
        self.kept, self.open = self.kept.take(stay), self.open.take(stay)
        self.done = self.done[stay]
        self.state = self.state.keep(stay)
        self.tokens = self.tokens.view(len(gone), -1)[stay].flatten()
