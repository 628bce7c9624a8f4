"""Captions sampled from the student: for on-policy distillation and self-critical training."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.generation.hypotheses import HypothesisBatch
from capdistill.generation.search import Sampling, image_keys
from capdistill.outputs import Batch
from capdistill.runtime import inference, stable_hash
from capdistill.tokenizer import Tokenizer


class SampledCaptions(NamedTuple):
    """Captions drawn from a captioner; those of an image stand side by side.

    Args:
        ids: (I * samples, T) from the start token to the end token, then padding.
        mask: (I * samples, T) True where a token is real. A caption that reached the length limit
            has no end token, so that nothing is trained to end there.
        texts: The I * samples captions as text.
    """

    ids: Tensor
    mask: Tensor
    texts: tuple[str, ...]


def sample_captions(
    captioner: Captioner,
    batch: Batch,
    samples: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> SampledCaptions:
    """Draw captions word by word from a captioner, without dropout and without gradients.

    Every word depends on (seed, epoch, image, number of the caption) and the weights alone: not on
    the other images of the batch, on `samples`, or on any random state. As in decoding, the start,
    padding and unknown tokens are never drawn. Flags of the captioner are restored.

    Call it within the autocast of the training step. To run a frozen trunk once for the samples and
    the step, give it the batch of `with_frozen_tokens`, and train on that batch too.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"], max_length=5)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> ids = torch.tensor([[1, 4, 5, 6, 2]])
        >>> batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ids, ids > 0, ("",), ("0",))
        >>> sampled = sample_captions(student, batch, samples=3, epoch=1)
        >>> sampled.ids[:, 0].tolist(), len(sampled.texts)   # each row begins with the start token
        ([1, 1, 1], 3)

    Args:
        captioner: The captioner to draw from.
        batch: On the captioner's device; its images are described, its captions are not read.
        samples: Captions per image.
        temperature: Divides the log-probabilities before a word is drawn.
        top_k: Draw from the k most probable words; 0 from all.
        seed: Seed of the run.
        epoch: The current epoch.

    Raises:
        ConfigError: samples < 1, temperature <= 0 or top_k < 0.
    """
    config = GenerationConfig(
        sample=True,
        num_return=samples,
        temperature=temperature,
        top_k=top_k,
        seed=stable_hash(seed, "sampled captions", epoch),
    )
    spec = GenerationSpec.of(config, captioner.tokenizer)
    keys = image_keys(name.encode("utf-8", "surrogatepass") for name in batch.image_ids)
    with inference(captioner):
        features = captioner.encode(batch)
        drawn = Sampling(captioner.decoder, features, spec, keys.to(features.device)).run()
    torch.clear_autocast_cache()  # casts made without gradients must not serve the step
    return _padded(drawn, captioner.tokenizer)


def _padded(drawn: HypothesisBatch, tokenizer: Tokenizer) -> SampledCaptions:
    """Rows of ids that begin with the start token and end with the first end token."""
    lengths = (drawn.lengths + drawn.ended).flatten()  # (B,) words, and the end token if any
    longest = int(lengths.max())
    words = drawn.tokens[..., :longest].flatten(0, 1)  # (B, T - 1)
    real = torch.arange(longest, device=words.device) < lengths[:, None]
    first = torch.full_like(lengths[:, None], tokenizer.start_id)
    ids = torch.cat([first, words.masked_fill(~real, tokenizer.pad_id)], dim=1)  # (B, T)
    mask = torch.cat([torch.ones_like(first, dtype=torch.bool), real], dim=1)
    counts = drawn.lengths.flatten().tolist()
    rows = zip(words.tolist(), counts, strict=True)
    return SampledCaptions(ids, mask, tuple(tokenizer.decode(row[:n]) for row, n in rows))


def with_frozen_tokens(captioner: Captioner, batch: Batch) -> Batch:
    """The batch with the output of the encoder's frozen stages, if it has any that can be cached.

    Whoever encodes that batch, with gradients or without, starts from there: the frozen stages run
    once for the samples and the training step. The batch given is not changed, and the values count
    only as long as no frozen weight changes. An encoder without frozen stages is left to run
    again: with gradients, dropout and batch statistics its training pass differs from sampling.
    """
    encoder = captioner.encoder
    key = encoder.current_key() if batch.images.numel() else None
    if key is None or key in batch.cached:
        return batch
    with inference(captioner):
        values = encoder.to_cache(batch.images)
    torch.clear_autocast_cache()
    return replace(batch, cached={**batch.cached, key: values})
