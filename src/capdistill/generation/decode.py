"""Features to hypotheses: the entry to greedy decoding, beam search and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder
from capdistill.errors import ConfigError
from capdistill.generation.config import GenerationConfig, Plan
from capdistill.generation.hypotheses import Hypothesis
from capdistill.generation.search import Beams, Walk, image_keys
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    decoder: Decoder, features: Tensor, plan: Plan, keys: Tensor | None = None
) -> list[Hypothesis]:
    """The best hypothesis of each image, without its text.

    Images that are done leave the batch; what else is in it changes nothing. Ties: the smaller
    id, the earlier beam, what was kept first.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> plan = Plan(1, 2, max_length=5, config=GenerationConfig(beam_size=3, num_return=2))
        >>> found = generate(decoder, torch.randn(4, 9, 8), plan)
        >>> len(found), [len(hypothesis.n_best) for hypothesis in found]
        (4, [2, 2, 2, 2])

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D).
        plan: What is wanted.
        keys: (I,) int64 that tell the images apart, for sampling; their places unless given.

    Raises:
        ConfigError: every id is banned.
    """
    words = decoder.vocabulary
    if words and set(plan.banned).issuperset(range(words)):
        raise ConfigError(f"All {words} ids are banned; leave at least one to say.")
    if not len(features):
        return []
    if plan.config.beam_size > 1:
        found = Beams(decoder, features, plan).run()
    else:
        keys = torch.arange(len(features)) if keys is None else keys
        found = Walk(decoder, features, plan, keys.to(features.device)).run()
    return found.hypotheses(plan.config.num_return)


def greedy(
    decoder: Decoder,
    features: Tensor,
    *,
    start_id: int,
    end_id: int,
    max_length: int,
    banned: Sequence[int] = (),
) -> list[Hypothesis]:
    """The most probable next word, until the end token or the limit.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> features = torch.randn(2, 9, 8)
        >>> found = greedy(decoder, features, start_id=1, end_id=2, max_length=5, banned=[0, 1, 2])
        >>> [len(hypothesis.tokens) for hypothesis in found]
        [5, 5]

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D).
        start_id: Fed first.
        end_id: Ends a caption.
        max_length: Tokens at most, the end token among them.
        banned: Ids that are never said. The probability of the other words stays what it is.

    Raises:
        ConfigError: max_length < 1, or every id is banned.
    """
    return generate(decoder, features, Plan(start_id, end_id, max_length, banned=tuple(banned)))


def beam_search(
    decoder: Decoder,
    features: Tensor,
    *,
    start_id: int,
    end_id: int,
    max_length: int,
    beam_size: int,
    banned: Sequence[int] = (),
    **options: Any,
) -> list[Hypothesis]:
    """The best of `beam_size` hypotheses an image.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> ids = {"start_id": 1, "end_id": 2, "banned": [0, 1]}
        >>> found = beam_search(decoder, torch.randn(2, 9, 8), max_length=5, beam_size=3, **ids)
        >>> len(found)
        2

    Args:
        decoder, features, start_id, end_id, max_length, banned: As for `greedy`.
        beam_size: Hypotheses kept an image.
        options: Of `GenerationConfig`, those about words excepted.

    Raises:
        ConfigError: options that cannot be, or every id is banned.
    """
    config = GenerationConfig(beam_size=beam_size, **options)
    return generate(
        decoder, features, Plan(start_id, end_id, max_length, config, banned=tuple(banned))
    )


def captions(
    decoder: Decoder,
    features: Tensor,
    tokenizer: Tokenizer,
    plan: Plan,
    images: Batch | Tensor,
) -> list[Hypothesis]:
    """One hypothesis an image, with its text.

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D), or whatever its `start` reads.
        tokenizer: Words to ids and back.
        plan: How, in the tokenizer's ids.
        images: What the features come from: chance depends on the image, not on its place.

    Raises:
        ConfigError: every id is banned.
    """
    keys = image_keys(_identities(images)) if plan.config.sample else None
    found = generate(decoder, features, plan, keys)
    return [_with_text(hypothesis, tokenizer) for hypothesis in found]


def _with_text(found: Hypothesis, tokenizer: Tokenizer) -> Hypothesis:
    others = tuple(_with_text(each, tokenizer) for each in found.n_best)
    return replace(found, text=tokenizer.decode(found.tokens), n_best=others)


def _identities(images: Batch | Tensor) -> Iterator[bytes]:
    """What tells images apart wherever they stand: their ids, or their pixels."""
    if isinstance(images, Batch):
        return (image.encode() for image in images.image_ids)
    return (image.cpu().numpy().tobytes() for image in images)
