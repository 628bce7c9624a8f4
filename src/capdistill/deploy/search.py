"""Greedy decoding, sampling and beam search in NumPy, as `capdistill.generation` has them.

Arrays with one row per hypothesis are (I, K, ...), K of each of I images. Nothing here loads torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np

from capdistill.deploy.choice import (
    Array,
    draw,
    falling,
    log_softmax,
    row_keys,
    stable_topk,
    uniforms,
    warp,
)
from capdistill.deploy.constraints import Constraints
from capdistill.generation.config import GenerationSpec
from capdistill.generation.hypotheses import (
    Hypothesis,
    best_divisor,
    best_of,
    length_divisor,
    not_finite,
)

LEAVING_SHARE = 8  # images leave once an eighth of them is done: copying the others costs too


@dataclass(frozen=True)
class State:
    """What a decoder keeps between two words.

    Args:
        image: Arrays with one row per image, (I, ...).
        row: Arrays with one row per hypothesis, (I, K, ...).
    """

    image: dict[str, Array]
    row: dict[str, Array]

    def keep(self, images: Array) -> State:
        """The given images only."""
        parts = (self.image, self.row)
        return State(*({name: each[images] for name, each in part.items()} for part in parts))

    def reorder(self, parent: Array) -> State:
        """Hypothesis k of image i becomes the old one `parent[i, k]`, (I, K)."""
        images = np.arange(len(parent))[:, None]
        return State(self.image, {name: each[images, parent] for name, each in self.row.items()})


class Step(Protocol):
    """One word of every hypothesis: `tokens` (I, K) to logits (I, K, V) and the state after it."""

    def __call__(self, tokens: Array, position: int, state: State) -> tuple[Array, State]:
        """Read the words at `position`."""


@dataclass(frozen=True)
class Found:
    """K hypotheses of each of J images; see `capdistill.generation.search.HypothesisBatch`."""

    images: Array
    tokens: Array
    log_probs: Array
    lengths: Array
    ended: Array
    scores: Array

    @classmethod
    def empty(cls, images: int, count: int, length: int) -> Found:
        """No hypothesis yet."""
        shape = (images, count)
        return cls(
            images=np.arange(images),
            tokens=np.zeros((*shape, length), np.int64),
            log_probs=np.zeros((*shape, length), np.float32),
            lengths=np.zeros(shape, np.int64),
            ended=np.zeros(shape, bool),
            scores=np.full(shape, -np.inf, np.float32),
        )

    def take(self, index: Array) -> Found:
        """The hypotheses of some images."""
        return Found(*(getattr(self, each.name)[index] for each in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """The hypotheses of all images, in the order of the batch."""
        values = ([getattr(part, each.name) for part in parts] for each in fields(cls))
        whole = cls(*map(np.concatenate, values))
        return whole.take(np.argsort(whole.images))

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best of each image, with its `count` best; equal scores stay in their order."""
        order = falling(self.scores)[:, :count]  # (J, n)
        images = np.arange(len(order))[:, None]
        names = ("tokens", "log_probs", "lengths", "ended", "scores")
        columns = (getattr(self, name)[images, order].tolist() for name in names)
        rows = zip(*columns, strict=True)
        return [best_of(zip(*row, strict=True)) for row in rows]


def decode(
    step: Step, state: State, images: int, spec: GenerationSpec, keys: Array | None = None
) -> list[Hypothesis]:
    """The best hypothesis of each image, without its text.

    The result is that of `capdistill.generation.decode.generate` for the same logits: ties go to
    the smaller id, the earlier beam, the hypothesis kept first.

    Args:
        step: A decoder.
        state: Its first state, with one hypothesis per image.
        images: I.
        spec: The options, in token ids.
        keys: (I,) uint64 that identify the images, for sampling; their positions by default.
    """
    search: Search
    if spec.config.beam_size > 1:
        search = BeamSearch(step, state, images, spec)
    else:
        places = np.arange(images).astype(np.uint64)
        search = Sampling(step, state, images, spec, places if keys is None else keys)
    return search.run().hypotheses(spec.config.num_return)


class Search:
    """A search over a batch, one token per step; finished images leave the batch.

    Args:
        step, state, images, spec: As for `decode`.
        count: K, captions per image that are generated side by side from the start.
    """

    def __init__(
        self, step: Step, state: State, images: int, spec: GenerationSpec, count: int
    ) -> None:
        self.step, self.spec, self.images = step, spec, images
        self.generated = Found.empty(images, count, spec.max_length)
        self.finished: list[Found] = []
        self.state = state.reorder(np.zeros((images, count), np.int64))
        self.tokens = np.full((images, count), spec.start_id, np.int64)

    def run(self) -> Found:
        """Generate until every image is finished or the limit is reached."""
        constraints: Constraints | None = None
        done = np.zeros(self.images, bool)  # (J,)
        for position in range(self.spec.max_length):
            logits, self.state = self.step(self.tokens, position, self.state)  # (J, K, V)
            if constraints is None:
                constraints = Constraints(self.spec, logits.shape[2])
            log_probs = log_softmax(logits)
            self._require_numbers(log_probs, done)
            rows = self.generated.tokens.reshape(-1, self.spec.max_length)
            constraints(log_probs.reshape(len(rows), -1), rows, position)
            done = self.extend(log_probs, position)
            left = int(done.sum())
            if position + 1 == self.spec.max_length or left == len(done):
                break
            if left and left * LEAVING_SHARE >= len(done):
                self.leave(np.flatnonzero(~done), np.flatnonzero(done))
                done = done[~done]
        return self.result()

    def _require_numbers(self, log_probs: Array, done: Array) -> None:
        """Refuse NaN, except after the end of a caption: alone it would not read on."""
        lost = np.isnan(log_probs[..., 0])  # one NaN or infinite logit spreads over its row
        going_on = ~(self.generated.ended | done[:, None])
        broken = (lost & going_on).any(1)
        if broken.any():
            raise not_finite(f"Image {self.generated.images[broken][0] + 1} of {self.images}")
        log_probs[lost] = 0

    @abstractmethod
    def extend(self, log_probs: Array, position: int) -> Array:
        """Add the token at `position` from (J, K, V) log-probabilities; (J,) which are done."""

    @abstractmethod
    def result(self) -> Found:
        """All hypotheses, with their scores."""

    def leave(self, remaining: Array, done: Array) -> None:
        """Keep the images at the indices `remaining`, (J',); the others are finished."""
        self.generated = self.generated.take(remaining)
        self.state = self.state.keep(remaining)
        self.tokens = self.tokens[remaining]


class Sampling(Search):
    """Independent captions: take the most probable token (greedy) or sample one."""

    def __init__(
        self, step: Step, state: State, images: int, spec: GenerationSpec, keys: Array
    ) -> None:
        count = spec.config.num_return if spec.config.sample else 1
        super().__init__(step, state, images, spec, count)
        self.keys = row_keys(keys, count)  # (I, K)

    def extend(self, log_probs: Array, position: int) -> Array:
        """Add one token to each caption that has not ended."""
        generated, config = self.generated, self.spec.config
        if config.sample:
            drawn = draw(warp(log_probs, config), uniforms(self.keys, config.seed, position))
            self.tokens = drawn  # (J, K)
        else:
            self.tokens = log_probs.argmax(-1)  # the first of equals
        ends = self.tokens == self.spec.end_id
        generated.tokens[..., position] = self.tokens
        chosen = np.take_along_axis(log_probs, self.tokens[..., None], 2)[..., 0]
        generated.log_probs[..., position] = chosen
        generated.lengths[...] += ~(generated.ended | ends)
        generated.ended[...] |= ends
        return np.asarray(generated.ended.all(1))

    def leave(self, remaining: Array, done: Array) -> None:
        """As for every search; captions that leave are complete."""
        self.finished.append(self.generated.take(done))
        self.keys = self.keys[remaining]
        super().leave(remaining, done)

    def result(self) -> Found:
        """Scores are the sums of log-probabilities, divided as `length_normalisation` says."""
        every = Found.join([*self.finished, self.generated])
        length = every.lengths + every.ended  # (I, K)
        config, longest = self.spec.config, self.spec.max_length
        sums = np.where(np.arange(longest) < length[..., None], every.log_probs, 0).sum(-1)
        divisors = [length_divisor(config, max(n, 1)) for n in range(longest + 1)]
        return replace(every, scores=sums / np.array(divisors, np.float32)[length])


class BeamSearch(Search):
    """The open beams of the images that are not done, `generated`, and those `kept`.

    One beam per image reads the start; it becomes K when their first tokens are chosen.
    """

    def __init__(self, step: Step, state: State, images: int, spec: GenerationSpec) -> None:
        super().__init__(step, state, images, spec, count=1)
        config = spec.config
        self.groups, self.size = config.beam_groups, config.beam_size // config.beam_groups
        self.kept = Found.empty(images, config.beam_size, spec.max_length)
        self.generated.scores[...] = 0
        self.done = np.zeros((images, self.groups), bool)

    def extend(self, log_probs: Array, position: int) -> Array:
        """Add one token to every beam, group after group."""
        first_step, vocabulary = log_probs.shape[1] == 1, log_probs.shape[2]
        parts: list[tuple[Array, Array, Array]] = []
        used = np.zeros_like(log_probs[:, 0])  # (J, V) beams of earlier groups with the token
        for group in range(self.groups):
            mine = slice(None) if first_step else self._slots(group)
            first = 0 if first_step else group * self.size
            scores = self.generated.scores[:, mine, None] + log_probs[:, mine]  # (J, K/G, V)
            if group:
                scores = scores - np.float32(self.spec.config.diversity_penalty) * used[:, None]
            scores, flat = stable_topk(scores.reshape(len(scores), -1), 2 * self.size)
            word, parent = flat % vocabulary, flat // vocabulary + first
            self._keep(group, scores, parent, word, log_probs, position)
            was_done = self.done[:, group, None].copy()
            parts.append(self._continue(group, scores, parent, word, position))
            if group + 1 < self.groups:
                alive = (parts[-1][0] > -np.inf) & ~was_done
                np.add.at(used, (np.arange(len(used))[:, None], parts[-1][2]), alive)
        chosen = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
        self._advance(log_probs, position, *chosen)
        return np.asarray(self.done.all(1))

    def leave(self, remaining: Array, done: Array) -> None:
        """As for every search; the kept hypotheses of images that leave are final."""
        self.finished.append(self.kept.take(done))
        self.kept, self.done = self.kept.take(remaining), self.done[remaining]
        super().leave(remaining, done)

    def result(self) -> Found:
        """The hypotheses kept."""
        return Found.join([*self.finished, self.kept])

    def _slots(self, group: int) -> slice:
        return slice(group * self.size, (group + 1) * self.size)

    def _keep(
        self,
        group: int,
        scores: Array,
        parent: Array,
        word: Array,
        log_probs: Array,
        position: int,
    ) -> None:
        """Ends (at the limit, everything) among the best K candidates join what is kept."""
        scores, parent, word = (each[:, : self.size] for each in (scores, parent, word))
        ends = word == self.spec.end_id  # (J, K/G)
        joins = (scores > -np.inf) & ~self.done[:, group, None]
        if position + 1 < self.spec.max_length:
            joins = joins & ends
        if not joins.any():
            return
        divisor = np.float32(length_divisor(self.spec.config, position + 1))
        ranked = np.where(joins, scores / divisor, np.float32(-np.inf))
        new = self._extended(parent, word, log_probs, position)
        self._merge(
            self._slots(group), replace(new, scores=ranked, ended=ends, lengths=position + ~ends)
        )

    def _extended(self, parent: Array, word: Array, log_probs: Array, position: int) -> Found:
        """The open beams `parent` (J, k) with `word` after them."""
        images = np.arange(len(parent))[:, None]
        tokens = self.generated.tokens[images, parent]  # a copy
        past = self.generated.log_probs[images, parent]
        tokens[..., position] = word
        past[..., position] = log_probs[images, parent, word]
        return replace(self.generated, tokens=tokens, log_probs=past)

    def _merge(self, slots: slice, new: Found) -> None:
        """The best of the kept and the new hypotheses; ties go to those kept first."""
        names = ("scores", "tokens", "log_probs", "lengths", "ended")
        kept = [getattr(self.kept, name)[:, slots] for name in names]
        both = [
            np.concatenate([old, getattr(new, name)], 1)
            for old, name in zip(kept, names, strict=True)
        ]
        order = falling(both[0])[:, : self.size]
        images = np.arange(len(order))[:, None]
        for old, each in zip(kept, both, strict=True):
            old[...] = each[images, order]

    def _continue(
        self, group: int, scores: Array, parent: Array, word: Array, position: int
    ) -> tuple[Array, Array, Array]:
        """The best K candidates that have not ended; marks the group as done if it is."""
        config, longest = self.spec.config, self.spec.max_length
        ends = word == self.spec.end_id
        order = np.argsort(ends, axis=1, kind="stable")[:, : self.size]
        images = np.arange(len(order))[:, None]
        scores = np.where(ends, np.float32(-np.inf), scores)[images, order]
        worst = self.kept.scores[:, self._slots(group)].min(1)  # -inf until there are K
        if config.early_stopping is True:
            hopeless = worst > -np.inf
        else:
            divisor = np.float32(best_divisor(config, position + 1, longest))
            hopeless = scores[:, 0] / divisor <= worst
        self.done[:, group] |= hopeless | (scores[:, 0] == -np.inf)
        return scores, parent[images, order], word[images, order]

    def _advance(
        self, log_probs: Array, position: int, scores: Array, parent: Array, word: Array
    ) -> None:
        """The chosen beams (J, K) become the open ones, and the decoder's state follows."""
        extended = self._extended(parent, word, log_probs, position)
        self.generated = replace(extended, scores=scores)
        self.tokens = word
        if position + 1 < self.spec.max_length:
            self.state = self.state.reorder(parent)
