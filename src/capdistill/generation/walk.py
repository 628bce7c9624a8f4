"""Greedy decoding and sampling: every caption goes its own way, one word a step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, State
from capdistill.generation.constraints import Constraints
from capdistill.generation.found import Found, exact, staying
from capdistill.generation.plan import Plan
from capdistill.generation.sampling import draw, row_keys, uniforms, warp
from capdistill.generation.score import penalty


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
