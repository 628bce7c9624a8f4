"""Greedy decoding and sampling: every caption goes its own way, one word a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.generation.config import GenerationConfig, Plan
from capdistill.generation.constraints import Constraints
from capdistill.generation.hypotheses import Found, best, bound, exact, penalty, staying


class Walk:
    """The captions that are under way: K an image, K > 1 only where they are drawn.

    Args:
        decoder: In evaluation mode.
        features: (I, N, D).
        plan: What is wanted.
        keys: (I,) int64 of the images, for sampling.
    """

    def __init__(self, decoder: Decoder, features: Tensor, plan: Plan, keys: Tensor) -> None:
        self.decoder, self.plan = decoder, plan
        self.count = plan.config.num_return if plan.config.sample else 1
        like = torch.empty(len(features), dtype=exact(features.dtype), device=features.device)
        self.found = Found.empty(like, self.count, plan.max_length)
        self.keys = row_keys(keys, self.count) if plan.config.sample else keys  # (I, K)
        self.state: State = decoder.start(features).expand(self.count)
        self.tokens = torch.full((self.found.lengths.numel(),), plan.start_id).to(features.device)
        self.gone: list[Found] = []

    def run(self) -> Found:
        """Say words until every caption has ended or is at the limit."""
        rules: Constraints | None = None
        for position in range(self.plan.max_length):
            logits, self.state = self.decoder.step(self.tokens, self.state)  # (R, V)
            rules = rules or Constraints(self.plan, logits.shape[1], logits.device)
            self._say(logits, rules, position)
            stay = staying(self.found.ended.all(1), position)
            if stay is not None:
                self._leave(stay)
            if not len(self.found.images):
                break
        return self._finish()

    def _say(self, logits: Tensor, rules: Constraints, position: int) -> None:
        """Add one word to each caption that has not ended."""
        found = self.found
        log_probs = logits.to(exact(logits.dtype)).log_softmax(-1)
        said = found.tokens.flatten(0, 1)  # (R, L)
        self.tokens = self._choose(rules(log_probs, said, position), position)
        chosen = log_probs.gather(1, self.tokens[:, None]).view_as(found.lengths)
        words = self.tokens.view_as(found.lengths)
        ends = words == self.plan.end_id
        found.tokens[..., position] = words
        found.log_probs[..., position] = chosen
        found.lengths.add_(~(found.ended | ends))
        found.ended.logical_or_(ends)

    def _choose(self, log_probs: Tensor, position: int) -> Tensor:
        config = self.plan.config
        if not config.sample:
            return log_probs.argmax(-1)  # (R,), the first of equals
        uniform = uniforms(self.keys.flatten(), config.seed, position)
        return draw(warp(log_probs, config), uniform)

    def _leave(self, stay: Tensor) -> None:
        gone = torch.ones_like(self.found.images, dtype=torch.bool)
        gone[stay] = False
        self.gone.append(self.found.take(gone))
        self.found, self.keys = self.found.take(stay), self.keys[stay]
        self.state = self.state.keep(stay)
        self.tokens = self.tokens.view(-1, self.count)[stay].flatten()

    def _finish(self) -> Found:
        found = Found.join([*self.gone, self.found])
        length = found.lengths + found.ended  # (I, K)
        places = torch.arange(self.plan.max_length, device=length.device)
        sums = found.log_probs.where(places < length[..., None], 0.0).sum(-1)
        divisors = [penalty(self.plan.config, max(n, 1)) for n in range(self.plan.max_length + 1)]
        divide = torch.tensor(divisors, dtype=sums.dtype, device=sums.device)
        return replace(found, scores=sums / divide[length])


_GAMMA, _MIX_1, _MIX_2 = (
    0x9E3779B97F4A7C15 - 2**64,
    0xBF58476D1CE4E5B9 - 2**64,
    0x94D049BB133111EB - 2**64,
)


def warp(log_probs: Tensor, config: GenerationConfig) -> Tensor:
    """Log-probabilities (R, V) to logits to draw from: temperature, then top-k, then top-p.

    Example:
        >>> warp(torch.tensor([[0.5, 0.3, 0.2]]).log(), GenerationConfig(top_k=2)).softmax(-1)
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    logits = log_probs / config.temperature
    if config.top_k:
        least = logits.topk(min(config.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        rising, order = logits.sort(dim=1, stable=True)
        drop = rising.softmax(-1).cumsum(-1) <= 1 - config.top_p
        drop[:, -1] = False  # the most probable word stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One id a row, (R,), by inverting the distribution (R, V) at `uniform` (R,), in [0, 1).

    Example:
        >>> draw(torch.tensor([[0.2, 0.3, 0.5]]).log().expand(3, 3), torch.tensor([0.1, 0.4, 0.9]))
        tensor([0, 1, 2])
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (R, V)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def uniforms(keys: Tensor, seed: int, position: int) -> Tensor:
    """Numbers in [0, 1), float64, that are a function of key, seed and position.

    No state is kept, so that neither the batch nor the device matters.

    Args:
        keys: int64, one for each number.
        seed: Of the run.
        position: Of the word in the caption.

    Source:
        The output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    place = torch.full_like(keys, position + 1) * _GAMMA
    mixed = _mix(keys + _mix(torch.full_like(keys, seed)) + place)
    return _shift(mixed, 12).double() * 2.0**-52


def row_keys(keys: Tensor, count: int) -> Tensor:
    """(J,) keys of images to (J, count) of the captions drawn for them."""
    return _mix(keys[:, None] + _GAMMA * torch.arange(1, count + 1, device=keys.device))


def image_keys(images: Iterable[bytes]) -> Tensor:
    """An int64 for each image, from what tells it from others: its id, or its pixels."""
    digests = (hashlib.blake2b(image, digest_size=8).digest() for image in images)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])


def _mix(x: Tensor) -> Tensor:
    """int64 arithmetic wraps, which is what SplitMix64 asks for."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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
