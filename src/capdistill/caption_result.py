"""What `Captioner.caption(..., details=True)` gives for one image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from capdistill.generation import Hypothesis


@dataclass(frozen=True)
class CaptionResult:
    """A caption with what the model thought of it and where it looked.

    Args:
        text: The words.
        tokens: The tokens of the caption as strings, without start and end.
        log_prob: Sum of the log-probabilities (nats) of its tokens, the end token included.
        token_log_probs: One log-probability (nats) a token, the end token's last where it ended.
        finished: Whether it ended by itself rather than at the length limit.
        n_best: All hypotheses found for the image, best first; the first is this caption.
        attention: (T, N) where each token looked: a share of attention for each visual token, each
            row summing to 1; None where the decoder can not show it.
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
