"""From features to hypotheses: the entry to greedy decoding, beam search and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder
from capdistill.errors import ConfigError
from capdistill.generation.config import GenerationSpec
from capdistill.generation.hypotheses import Hypothesis
from capdistill.generation.search import BeamSearch, Sampling, Search, image_keys
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    decoder: Decoder, features: Tensor, spec: GenerationSpec, keys: Tensor | None = None
) -> list[Hypothesis]:
    """The best hypothesis of each image, without its text.

    Images that are done leave the batch; the other images do not affect the result. Ties go to the
    smaller id, the earlier beam, the hypothesis kept first.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> spec = GenerationSpec.from_ids(1, 2, 5, beam_size=3, num_return=2)
        >>> hypotheses = generate(decoder, torch.randn(4, 9, 8), spec)
        >>> len(hypotheses), [len(hypothesis.n_best) for hypothesis in hypotheses]
        (4, [2, 2, 2, 2])

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D).
        spec: The options, in token ids.
        keys: (I,) int64 that identify the images, for sampling; their positions by default.

    Raises:
        ConfigError: every id is banned.
    """
    words = decoder.vocabulary
    if words and set(spec.banned).issuperset(range(words)):
        raise ConfigError(f"All {words} ids are banned; leave at least one that can be generated.")
    if not len(features):
        return []
    search: Search
    if spec.config.beam_size > 1:
        search = BeamSearch(decoder, features, spec)
    else:
        keys = torch.arange(len(features)) if keys is None else keys
        search = Sampling(decoder, features, spec, keys.to(features.device))
    return search.run().hypotheses(spec.config.num_return)


def greedy(decoder: Decoder, features: Tensor, **options: Any) -> list[Hypothesis]:
    """The most probable next token, until the end token or the limit.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> ids = {"start_id": 1, "end_id": 2, "banned": [0, 1, 2]}
        >>> found = greedy(decoder, torch.randn(2, 9, 8), max_length=5, **ids)
        >>> [len(hypothesis.tokens) for hypothesis in found]
        [5, 5]

    Args:
        decoder, features: As for `generate`.
        options: As for `GenerationSpec.from_ids`.

    Raises:
        ConfigError: invalid options, or every id is banned.
    """
    return generate(decoder, features, GenerationSpec.from_ids(beam_size=1, **options))


def beam_search(
    decoder: Decoder, features: Tensor, *, beam_size: int, **options: Any
) -> list[Hypothesis]:
    """The best of `beam_size` hypotheses per image.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> ids = {"start_id": 1, "end_id": 2, "banned": [0, 1]}
        >>> found = beam_search(decoder, torch.randn(2, 9, 8), max_length=5, beam_size=3, **ids)
        >>> len(found)
        2

    Args:
        decoder, features: As for `generate`.
        beam_size: Hypotheses kept per image.
        options: As for `GenerationSpec.from_ids`.

    Raises:
        ConfigError: invalid options, or every id is banned.
    """
    return generate(decoder, features, GenerationSpec.from_ids(beam_size=beam_size, **options))


def generate_text(
    decoder: Decoder,
    features: Tensor,
    tokenizer: Tokenizer,
    spec: GenerationSpec,
    images: Batch | Tensor,
) -> list[Hypothesis]:
    """One hypothesis per image, with its text.

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D), or another input of `start`.
        tokenizer: Words to ids and back.
        spec: The options, in the tokenizer's ids.
        images: The images behind the features: sampling depends on the image, not its position.

    Raises:
        ConfigError: every id is banned.
    """
    keys = image_keys(_identities(images)) if spec.config.sample else None
    return [_with_text(each, tokenizer) for each in generate(decoder, features, spec, keys)]


def _with_text(hypothesis: Hypothesis, tokenizer: Tokenizer) -> Hypothesis:
    others = tuple(_with_text(each, tokenizer) for each in hypothesis.n_best)
    return replace(hypothesis, text=tokenizer.decode(hypothesis.tokens), n_best=others)


def _identities(images: Batch | Tensor) -> Iterator[bytes]:
    """Keys that identify images in any order: their ids, or their pixels."""
    if isinstance(images, Batch):
        return (image.encode() for image in images.image_ids)
    return (image.cpu().numpy().tobytes() for image in images)
