"""What decoding gives for an image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """One generated caption.

    Args:
        tokens: Its ids, without start and end.
        log_prob: Sum of the decoder's log-probabilities (nats) of its tokens, the end token
            included where there is one.
        finished: Whether it ended by itself rather than at the length limit.
        text: The words.
        score: What hypotheses are ranked by: `log_prob`, less what diverse groups take off,
            divided as `length_normalisation` says.
        token_log_probs: One log-probability (nats) a token, the end token's last where there is
            one.
        n_best: The hypotheses of the image, best first, this one included, where more than one
            was asked for.
    """

    tokens: tuple[int, ...]
    log_prob: float
    finished: bool
    text: str = ""
    score: float = 0.0
    token_log_probs: tuple[float, ...] = ()
    n_best: tuple[Hypothesis, ...] = ()
