"""Greedy decoding, sampling and beam search: one loop over `Decoder.step`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, DecoderState
from capdistill.generation.choice import draw, row_keys, stable_topk, uniforms, warp
from capdistill.generation.config import GenerationSpec
from capdistill.generation.constraints import Constraints
from capdistill.generation.hypotheses import Hypothesis, best_divisor, best_of, length_divisor

LEAVING_SHARE = 8  # images leave once an eighth of them is done: copying the others costs too
LOOK_EVERY = 4  # words between two synchronisations with an accelerator


@dataclass(frozen=True)
class HypothesisBatch:
    """K hypotheses of each of J images.

    Args:
        images: (J,) places in the batch.
        tokens: (J, K, L) ids; those from `lengths` on are undefined.
        log_probs: (J, K, L) of the tokens, the end token's after the last.
        lengths: (J, K) tokens, without the end.
        ended: (J, K) bool, True after an end token.
        scores: (J, K); -inf where there is no hypothesis.
    """

    images: Tensor
    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    ended: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, like: Tensor, count: int, length: int) -> HypothesisBatch:
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

    def take(self, index: Tensor) -> HypothesisBatch:
        """The hypotheses of some images."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[HypothesisBatch]) -> HypothesisBatch:
        """The hypotheses of all images, in the order of the batch."""
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
        return [best_of(zip(*row, strict=True)) for row in rows]


def unfinished_images(done: Tensor, position: int) -> Tensor | None:
    """Indices (J',) of the images that are not done; None if none, or too few, would leave.

    Example:
        >>> unfinished_images(torch.tensor([True, False]), position=0)
        tensor([1])
    """
    if done.device.type != "cpu" and position % LOOK_EVERY:
        return None
    count = int(done.sum())
    if count < len(done) and count * LEAVING_SHARE < len(done):
        return None
    return None if count == 0 else (~done).nonzero()[:, 0]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is too coarse to add up log-probabilities in."""
    return torch.promote_types(dtype, torch.float32)


class Search:
    """A search over a batch, one token per step; finished images leave the batch.

    Args:
        decoder: In evaluation mode.
        features: (I, N, D).
        spec: The options, in token ids.
        count: K, captions per image that are generated side by side from the start.
    """

    def __init__(
        self, decoder: Decoder, features: Tensor, spec: GenerationSpec, count: int
    ) -> None:
        self.decoder, self.spec = decoder, spec
        like = torch.empty(
            len(features), dtype=accumulation_dtype(features.dtype), device=features.device
        )
        self.generated = HypothesisBatch.empty(like, count, spec.max_length)
        self.finished: list[HypothesisBatch] = []
        self.state: DecoderState = decoder.start(features).expand(count)
        self.tokens = torch.full((len(features) * count,), spec.start_id, device=features.device)

    def run(self) -> HypothesisBatch:
        """Generate until every image is finished or the limit is reached."""
        constraints: Constraints | None = None
        for position in range(self.spec.max_length):
            logits, self.state = self.decoder.step(self.tokens, self.state)  # (R, V)
            if constraints is None:
                constraints = Constraints(self.spec, logits.shape[1], logits.device)
            log_probs = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
            constraints(log_probs, self.generated.tokens.flatten(0, 1), position)
            done = self.extend(log_probs, position)  # (J,)
            if position + 1 == self.spec.max_length:
                break
            remaining = unfinished_images(done, position)
            if remaining is not None:
                self.leave(remaining)
            if not len(self.generated.images):
                break
        return self.result()

    @abstractmethod
    def extend(self, log_probs: Tensor, position: int) -> Tensor:
        """Add the token at `position` from (R, V) log-probabilities; (J,) which images are done."""

    @abstractmethod
    def result(self) -> HypothesisBatch:
        """All hypotheses, with their scores."""

    def leave(self, remaining: Tensor) -> None:
        """Keep the images at the indices `remaining`, (J',); the others are finished."""
        images = len(self.generated.images)
        self.generated = self.generated.take(remaining)
        self.state = self.state.keep(remaining)
        self.tokens = self.tokens.view(images, -1)[remaining].flatten()


class Sampling(Search):
    """Independent captions: take the most probable token (greedy) or sample one.

    Args:
        decoder: In evaluation mode.
        features: (I, N, D).
        spec: The options; `num_return` captions per image are drawn, one is greedy.
        keys: (I,) int64 that identify the images, for sampling.
    """

    def __init__(
        self, decoder: Decoder, features: Tensor, spec: GenerationSpec, keys: Tensor
    ) -> None:
        count = spec.config.num_return if spec.config.sample else 1
        super().__init__(decoder, features, spec, count)
        self.keys = row_keys(keys, count) if spec.config.sample else keys  # (I, K)

    def extend(self, log_probs: Tensor, position: int) -> Tensor:
        """Add one token to each caption that has not ended."""
        generated = self.generated
        self.tokens = self._choose(log_probs, position)  # (R,)
        chosen = log_probs.gather(1, self.tokens[:, None]).view_as(generated.lengths)  # (J, K)
        words = self.tokens.view_as(generated.lengths)
        ends = words == self.spec.end_id
        generated.tokens[..., position] = words
        generated.log_probs[..., position] = chosen
        generated.lengths.add_(~(generated.ended | ends))
        generated.ended.logical_or_(ends)
        return generated.ended.all(1)

    def leave(self, remaining: Tensor) -> None:
        """As for every search; captions that leave are complete."""
        left = torch.ones_like(self.generated.images, dtype=torch.bool)
        left[remaining] = False
        self.finished.append(self.generated.take(left))
        self.keys = self.keys[remaining]
        super().leave(remaining)

    def result(self) -> HypothesisBatch:
        """Scores are the sums of log-probabilities, divided as `length_normalisation` says."""
        every = HypothesisBatch.join([*self.finished, self.generated])
        length = every.lengths + every.ended  # (I, K)
        places = torch.arange(self.spec.max_length, device=length.device)
        sums = every.log_probs.where(places < length[..., None], 0.0).sum(-1)
        config, longest = self.spec.config, self.spec.max_length
        divisors = [length_divisor(config, max(n, 1)) for n in range(longest + 1)]
        divide = torch.tensor(divisors, dtype=sums.dtype, device=sums.device)
        return replace(every, scores=sums / divide[length])

    def _choose(self, log_probs: Tensor, position: int) -> Tensor:
        config = self.spec.config
        if not config.sample:
            return log_probs.argmax(-1)  # (R,), the first of equals
        uniform = uniforms(self.keys.flatten(), config.seed, position)
        return draw(warp(log_probs, config), uniform)


class BeamSearch(Search):
    """The open beams of the images that are not done, `generated`, and those `kept`.

    One beam per image reads the start; it becomes K when their first tokens are chosen.

    Args:
        decoder: In evaluation mode.
        features: (I, N, D).
        spec: The options.
    """

    def __init__(self, decoder: Decoder, features: Tensor, spec: GenerationSpec) -> None:
        super().__init__(decoder, features, spec, count=1)
        config = spec.config
        self.groups, self.size = config.beam_groups, config.beam_size // config.beam_groups
        self.kept = HypothesisBatch.empty(
            self.generated.scores[:, 0], config.beam_size, spec.max_length
        )
        self.generated.scores.zero_()
        self.done = torch.zeros(
            len(features), self.groups, dtype=torch.bool, device=features.device
        )

    def extend(self, log_probs: Tensor, position: int) -> Tensor:
        """Add one token to every beam, group after group."""
        log_probs = log_probs.view(*self.generated.scores.shape, -1)  # (J, K, V)
        first_step = log_probs.shape[1] == 1
        parts: list[tuple[Tensor, ...]] = []
        used = torch.zeros_like(log_probs[:, 0])  # (J, V) beams of earlier groups with the token
        for group in range(self.groups):
            mine = slice(None) if first_step else self._slots(group)
            first = 0 if first_step else group * self.size
            scores = self.generated.scores[:, mine, None] + log_probs[:, mine]  # (J, K/G, V)
            if group:
                scores = scores - self.spec.config.diversity_penalty * used[:, None]
            scores, flat = stable_topk(scores.flatten(1), 2 * self.size)
            word = flat % log_probs.shape[2]
            parent = flat // log_probs.shape[2] + first
            self._keep(group, scores, parent, word, log_probs, position)
            was_done = self.done[:, group, None].clone()
            chosen = self._continue(group, scores, parent, word, position)
            parts.append(chosen)
            if group + 1 < self.groups:
                alive = (chosen[0] > -torch.inf) & ~was_done
                used.scatter_add_(1, chosen[2], alive.to(used.dtype))
        self._advance(
            log_probs, position, *(torch.cat(each, 1) for each in zip(*parts, strict=True))
        )
        return self.done.all(1)

    def leave(self, remaining: Tensor) -> None:
        """As for every search; the kept hypotheses of images that leave are final."""
        left = torch.ones_like(self.kept.images, dtype=torch.bool)
        left[remaining] = False
        self.finished.append(self.kept.take(left))
        self.kept, self.done = self.kept.take(remaining), self.done[remaining]
        super().leave(remaining)

    def result(self) -> HypothesisBatch:
        """The hypotheses kept; the scores of an image are NaN if those of its beams became NaN."""
        lost = self.generated.scores.isnan().any(1) & ~self.done.all(1)  # (J,)
        self.kept.scores.masked_fill_(lost[:, None], torch.nan)
        return HypothesisBatch.join([*self.finished, self.kept])

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
        ends = word == self.spec.end_id  # (J, K/G)
        last = position + 1 == self.spec.max_length
        joins = (scores > -torch.inf) & ~self.done[:, group, None]
        joins = joins if last else joins & ends
        if joins.device.type == "cpu" and not bool(joins.any()):
            return
        divisor = length_divisor(self.spec.config, position + 1)
        ranked = torch.where(joins, scores / divisor, -torch.inf)
        new = self._extended(parent, word, log_probs, position)
        new = replace(new, scores=ranked, ended=ends, lengths=position + (~ends).long())
        self._merge(self._slots(group), new)

    def _extended(
        self, parent: Tensor, word: Tensor, log_probs: Tensor, position: int
    ) -> HypothesisBatch:
        """The open beams `parent` (J, k) with `word` after them."""
        generated = self.generated
        deep = parent[..., None].expand(-1, -1, self.spec.max_length)
        tokens, past = (each.gather(1, deep) for each in (generated.tokens, generated.log_probs))
        tokens[..., position] = word
        vocabulary = log_probs.shape[2]
        past[..., position] = log_probs.flatten(1).gather(1, parent * vocabulary + word)
        return replace(generated, tokens=tokens, log_probs=past)

    def _merge(self, slots: slice, new: HypothesisBatch) -> None:
        """The best of the kept and the new hypotheses; ties go to those kept first."""
        names = ("scores", "tokens", "log_probs", "lengths", "ended")
        kept = {name: getattr(self.kept, name)[:, slots] for name in names}
        both = {name: torch.cat([kept[name], getattr(new, name)], 1) for name in names}
        order = both["scores"].sort(dim=1, descending=True, stable=True).indices[:, : self.size]
        deep = order[..., None].expand(-1, -1, self.spec.max_length)
        for name in names:
            kept[name].copy_(both[name].gather(1, deep if both[name].ndim == 3 else order))

    def _continue(
        self, group: int, scores: Tensor, parent: Tensor, word: Tensor, position: int
    ) -> tuple[Tensor, ...]:
        """The best K candidates that have not ended; marks the group as done if it is."""
        config, longest = self.spec.config, self.spec.max_length
        ends = word == self.spec.end_id
        order = ends.long().sort(dim=1, stable=True).indices[:, : self.size]
        scores = scores.masked_fill(ends, -torch.inf).gather(1, order)
        worst = self.kept.scores[:, self._slots(group)].amin(1)  # -inf until there are K
        if config.early_stopping is True:
            hopeless = worst > -torch.inf
        else:
            hopeless = scores[:, 0] / best_divisor(config, position + 1, longest) <= worst
        self.done[:, group] |= hopeless | (scores[:, 0] == -torch.inf)
        return scores, parent.gather(1, order), word.gather(1, order)

    def _advance(
        self, log_probs: Tensor, position: int, scores: Tensor, parent: Tensor, word: Tensor
    ) -> None:
        """The chosen beams (J, K) become the open ones, and the decoder's state follows."""
        old = self.generated.scores.shape[1]
        extended = self._extended(parent, word, log_probs, position)
        self.generated = replace(extended, scores=scores)
        self.tokens = word.flatten()
        if position + 1 == self.spec.max_length:
            return
        if old == 1:
            self.state = self.state.expand(scores.shape[1])
            return
        images = torch.arange(len(parent), device=parent.device)
        self.state = self.state.reorder((images[:, None] * old + parent).flatten())
