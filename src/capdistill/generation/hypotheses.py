"""Hypotheses of several images as tensors, and as `Hypothesis` objects at the end."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from capdistill.generation.config import GenerationConfig
from capdistill.generation.constraints import IMPOSSIBLE

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


@dataclass(frozen=True, repr=False)
class CaptionResult:
    """A caption with its probabilities, the other hypotheses and the attention of each token.

    Args:
        text: The words.
        tokens: The tokens of the caption as text, without start and end: words, or of subwords what
            each adds to the text (" dog", "gy").
        log_prob: Sum of the log-probabilities (nats) of its tokens, including the end token.
        token_log_probs: One log-probability (nats) per token, including an end token.
        finished: True if it reached its end token, False if it was cut at the length limit.
        n_best: All hypotheses found for the image, best first; the first is this caption.
        attention: (T, N) share of attention that each token pays to each visual token, rows sum to
            1; None if the decoder has no attention.
        grid: (h, w) of the visual tokens that form a map, or None.
        prefix_tokens: Visual tokens before the map (CLS, registers).
        image: (3, S, S) uint8, the image as the model saw it.
    """

    text: str
    tokens: tuple[str, ...]
    log_prob: float
    token_log_probs: tuple[float, ...]
    finished: bool
    n_best: tuple[Hypothesis, ...]
    attention: Tensor | None
    grid: tuple[int, int] | None
    prefix_tokens: int
    image: Tensor

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image.shape[-2:]))
        looked = "no attention" if self.attention is None else f"attention on {self.grid} map"
        ended = "" if self.finished else ", cut at the length limit"
        return (
            f"CaptionResult({self.text!r}: {len(self.tokens)} tokens, log_prob "
            f"{self.log_prob:.2f}{ended}, {len(self.n_best)} hypotheses, {looked}, image {size})"
        )

    def _repr_html_(self) -> str:
        text = html.escape(self.text) or "<em>(empty)</em>"
        return (
            f'<figure><img src="{thumbnail(self.image)}" alt="{html.escape(self.text)}">'
            f"<figcaption>{text}<br><small>log-probability {self.log_prob:.2f}</small>"
            "</figcaption></figure>"
        )


_THUMBNAIL = 192  # pixels


def thumbnail(pixels: Tensor) -> str:
    """An image, (3, H, W) uint8, as a small JPEG in a `data:` address.

    Example:
        >>> thumbnail(torch.zeros(3, 8, 8, dtype=torch.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    from PIL import Image

    picture = Image.fromarray(pixels.cpu().permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Hypothesis:
    """One generated caption.

    Args:
        tokens: Its ids, without start and end.
        log_prob: Sum of the decoder's log-probabilities (nats) of its tokens, the end token
            included where there is one.
        finished: True if it reached its end token, False if it was cut at the length limit.
        text: The words.
        score: The ranking value: `log_prob`, minus the penalty of diverse groups, divided according
            to `length_normalisation`.
        token_log_probs: One log-probability (nats) per token, including an end token.
        n_best: The hypotheses of the image, best first, including this one, if more than one was
            requested.
    """

    tokens: tuple[int, ...]
    log_prob: float
    finished: bool
    text: str = ""
    score: float = 0.0
    token_log_probs: tuple[float, ...] = ()
    n_best: tuple[Hypothesis, ...] = ()


def length_divisor(config: GenerationConfig, length: int) -> float:
    """Divisor of the sum of log-probabilities of `length` tokens (including the end token).

    Example:
        >>> length_divisor(GenerationConfig(length_normalisation="gnmt", length_penalty=2.0), 7)
        4.0
    """
    if config.length_normalisation == "none":
        return 1.0
    base = length if config.length_normalisation == "average" else (5 + length) / 6
    return float(base**config.length_penalty)


def best_divisor(config: GenerationConfig, length: int, longest: int) -> float:
    """The divisor with which an open beam of `length` tokens is compared to those kept.

    A sum only decreases, so no continuation scores better than the current sum divided by the
    largest future divisor.
    """
    if config.early_stopping != "never":
        return length_divisor(config, length)
    return max(length_divisor(config, min(length + 1, longest)), length_divisor(config, longest))


def stable_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first; of equal ones the smaller index.

    Example:
        >>> stable_topk(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), 3)
        (tensor([[2., 2., 1.]]), tensor([[1, 3, 0]]))

    Args:
        scores: (J, M), not NaN.
        count: Number of values; if M is smaller, the rest is -inf with index 0.

    Returns:
        (J, count) values and indices.
    """
    if scores.shape[1] <= count:
        missing = count - scores.shape[1]
        values, index = scores.sort(dim=1, descending=True, stable=True)
        filled = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        return filled, torch.nn.functional.pad(index, (0, missing))
    if scores.device.type == "cpu":
        return _topk_unless_tied(scores, count)
    return _by_value_and_place(scores, count)


def _by_value_and_place(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if scores.dtype == torch.float32:
        index = _keys(scores).topk(count).indices
        return scores.gather(1, index), index
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def _topk_unless_tied(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` breaks ties arbitrarily; if there are ties, the place decides."""
    values, index = scores.topk(count + 1)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    if bool(tied.any()):
        return _by_value_and_place(scores, count)
    return values[:, :count], index[:, :count]


def _keys(scores: Tensor) -> Tensor:
    """Distinct int64 in the order of float32 scores, then of falling index: nothing is tied."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - torch.arange(scores.shape[1], device=scores.device)
