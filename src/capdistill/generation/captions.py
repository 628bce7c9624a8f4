"""Features to captions with their text: what `generate` of a captioner and of a teacher share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from capdistill.decoders.base import Decoder
from capdistill.generation.decode import generate
from capdistill.generation.hypothesis import Hypothesis
from capdistill.generation.plan import Plan
from capdistill.generation.sampling import image_keys
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer


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
