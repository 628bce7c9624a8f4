"""Captions of images in any form and number, in their order, a batch in memory at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capdistill.caption_result import CaptionResult
from capdistill.data.report import Policy, Report
from capdistill.errors import ConfigError, DataError
from capdistill.generation import Hypothesis

if TYPE_CHECKING:
    from capdistill.captioner import Captioner

Found = str | CaptionResult | None


def caption_stream(
    captioner: Captioner,
    images: Iterable[Any],
    *,
    batch_size: int = 32,
    errors: Policy = "raise",
    details: bool = False,
    generation: Mapping[str, Any],
) -> Iterator[Found]:
    """What `Captioner.caption` and `caption_stream` give, image by image.

    Args:
        captioner: Whose captions.
        images: Anything that `read_image` takes, any number of them; read as they are needed.
        batch_size: Images that are in memory, and in the model, at once.
        errors: "raise" stops at an image that can not be read; "skip" warns and gives None for it.
        details: Give `CaptionResult` instead of text.
        generation: Arguments of `Captioner.generate`.

    Raises:
        DataError: an image that can not be read, by name, unless it is skipped.
        ConfigError: batch_size < 1.
    """
    if batch_size < 1:
        raise ConfigError(f"caption: batch_size must be at least 1, got {batch_size}.")
    policy = Report(errors).errors
    place = 0
    for chunk in chunks(images, batch_size):
        pixels = [_read(captioner, image, place + i, policy) for i, image in enumerate(chunk)]
        place += len(chunk)
        readable = [square for square in pixels if square is not None]
        found = iter(_caption(captioner, readable, details, generation))
        yield from (None if square is None else next(found) for square in pixels)


def _read(captioner: Captioner, image: Any, place: int, errors: Policy) -> Tensor | None:
    from capdistill.data.images import read_image
    from capdistill.data.transforms import centre_square

    try:
        return centre_square(read_image(image), captioner.encoder.image_size)
    except DataError as error:
        if errors == "raise":
            raise
        warnings.warn(f"caption: image {place} was left out: {error}", stacklevel=5)
        return None


def _caption(
    captioner: Captioner, squares: list[Tensor], details: bool, generation: Mapping[str, Any]
) -> Sequence[Found]:
    """Images (3, S, S) uint8 to texts, or to results with all that is known."""
    if not squares:
        return []
    pixels = torch.stack(squares)  # (I, 3, S, S)
    hypotheses = captioner.generate(pixels.to(captioner.device), **generation)
    if not details:
        return [hypothesis.text for hypothesis in hypotheses]
    looked = attention_of(captioner, pixels, hypotheses)
    return [
        _result(captioner, hypothesis, weights, square)
        for hypothesis, weights, square in zip(hypotheses, looked, pixels, strict=True)
    ]


def _result(
    captioner: Captioner, hypothesis: Hypothesis, attention: Tensor | None, pixels: Tensor
) -> CaptionResult:
    vocabulary = captioner.tokenizer.vocabulary
    return CaptionResult(
        text=hypothesis.text,
        tokens=tuple(vocabulary[token] for token in hypothesis.tokens),
        log_prob=hypothesis.log_prob,
        token_log_probs=hypothesis.token_log_probs,
        finished=hypothesis.finished,
        n_best=hypothesis.n_best or (hypothesis,),
        attention=attention,
        grid=captioner.encoder.grid,
        prefix_tokens=captioner.encoder.prefix_tokens,
        image=pixels,
    )


def attention_of(
    captioner: Captioner, pixels: Tensor, hypotheses: Sequence[Hypothesis]
) -> list[Tensor | None]:
    """Where each word of each caption looked, (T, N) an image; None where that is not shown.

    The captions are read once more by the decoder's `forward`, which gives the logits of `step`.
    """
    from capdistill.captioner import evaluating
    from capdistill.tokenizer import pad_batch

    if not captioner.decoder.has_attention:
        return [None] * len(hypotheses)
    tokenizer = captioner.tokenizer
    rows = [[tokenizer.start_id, *hypothesis.tokens] for hypothesis in hypotheses]
    ids = pad_batch(rows, tokenizer.pad_id)[0].to(captioner.device)  # (I, T + 1)
    with evaluating(captioner), torch.no_grad():
        features = captioner.encoder(pixels.to(captioner.device))
        weights = captioner.decoder(ids, features, frozenset({"attention"})).attention
    if weights is None:
        return [None] * len(hypotheses)
    pairs = zip(weights.float().cpu(), hypotheses, strict=True)
    return [each[: len(hypothesis.tokens)] for each, hypothesis in pairs]  # (T, N)


def is_many(images: Any) -> bool:
    """Whether this is an iterable of images rather than one image.

    Example:
        >>> is_many("dog.jpg"), is_many(["dog.jpg"]), is_many(torch.zeros(2, 3, 8, 8))
        (False, True, True)
    """
    if isinstance(images, Tensor):
        return images.ndim == 4
    if hasattr(images, "__array__"):
        return getattr(images, "ndim", 3) == 4
    single = isinstance(images, (str, bytes, bytearray, os.PathLike)) or hasattr(images, "read")
    return not single and isinstance(images, Iterable)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter, each read when it is asked for.

    Example:
        >>> list(chunks("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
