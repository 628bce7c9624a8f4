"""What a search finds: captions with their probabilities. Nothing here loads torch."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from capdistill.errors import NotFiniteLogits
from capdistill.generation.config import GenerationConfig
from capdistill.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IMPOSSIBLE = -1e9  # floor for log-probabilities: below any real one, above a banned one (-inf)


Row: TypeAlias = tuple[list[int], list[float], int, bool, float]


def best_of(rows: Iterable[Row]) -> Hypothesis:
    """The first of an image's hypotheses, with all of them as its `n_best` if there can be several.

    Args:
        rows: Best first: tokens, their log-probabilities, number of tokens without the end, whether
            it ended, score (-inf where there is no hypothesis, NaN where logits were no numbers).
    """
    every = list(rows)
    found = [_hypothesis(*row) for row in every if row[-1] != -math.inf]
    return replace(found[0], n_best=tuple(found)) if len(every) > 1 else found[0]


def _hypothesis(
    tokens: list[int], log_probs: list[float], length: int, ended: bool, score: float
) -> Hypothesis:
    each = tuple(p if p > IMPOSSIBLE else -math.inf for p in log_probs[: length + ended])
    return Hypothesis(tuple(tokens[:length]), sum(each), ended, score=score, token_log_probs=each)


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
        image: (3, S, S) uint8, the image as the model saw it; an array of NumPy without torch.
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
        >>> import torch
        >>> thumbnail(torch.zeros(3, 8, 8, dtype=torch.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels)
    picture = Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
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


def require_numbers(hypotheses: Iterable[Hypothesis], images: Iterable[str]) -> None:
    """Check that the logits behind the best hypothesis of each image were numbers.

    Raises:
        NotFiniteLogits: they were NaN or infinite.
    """
    for hypothesis, image in zip(hypotheses, images, strict=True):
        if not math.isfinite(hypothesis.score):
            raise not_finite(image)


def not_finite(image: str) -> NotFiniteLogits:
    """The error of an image whose logits are NaN or infinite."""
    return NotFiniteLogits(
        f"{image}: the decoder gives NaN or infinite logits, from which no caption can be made. "
        "Its weights are damaged, or numbers overflow in half precision: use fp32, load or export "
        "the captioner again, or train it with a lower learning rate."
    )


def with_text(hypothesis: Hypothesis, tokenizer: Tokenizer) -> Hypothesis:
    """The hypothesis and its `n_best` with their texts."""
    others = tuple(with_text(each, tokenizer) for each in hypothesis.n_best)
    return replace(hypothesis, text=tokenizer.decode(hypothesis.tokens), n_best=others)


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
