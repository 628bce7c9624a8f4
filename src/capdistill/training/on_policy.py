"""On-policy distillation: captions sampled from the student, which the teacher then scores.

`sample_captions` also serves self-critical training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError
from capdistill.generation.choice import image_keys
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.generation.search import HypothesisBatch, Sampling
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch
from capdistill.runtime import generator, inference, stable_hash
from capdistill.tokenizer import Tokenizer


def replace_captions(
    student: Captioner,
    batch: Batch,
    share: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> Batch:
    """The batch with a share of its captions replaced by captions sampled from the student.

    Teacher and student then read the sampled words, and the losses between them hold the student to
    the teacher's prediction after each of its own words: training meets the beginnings that it
    meets in generation. The sampling itself is not differentiated.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> ids = torch.tensor([[1, 4, 5, 6, 2]] * 4)
        >>> batch = Batch(
        ...     torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ids, ids > 0, ("a dog runs",) * 4,
        ...     ("1", "2"),
        ... )
        >>> replace_captions(student, batch, 0.5).sampled.view(2, 2).sum(1).tolist()
        [1, 1]

    Args:
        student: The captioner that is trained.
        batch: On its device, with k captions per image.
        share: Which `sampled_rows` are replaced.
        temperature, top_k, seed, epoch: As for `sample_captions`.

    Source:
        Agarwal et al. (2024), On-Policy Distillation of Language Models, algorithm 1, where `share`
        is the student data fraction lambda; imitation learning with the teacher as the oracle: Lin
        et al. (2020), Autoregressive Knowledge Distillation through Imitation Learning.
    """
    rows = sampled_rows(batch, share, seed, epoch)  # (B,), on the CPU
    if not rows.any():
        return batch
    batch = with_frozen_tokens(student, batch)
    chosen = rows.view(batch.num_images, -1)  # (I, k)
    images = chosen.any(1).nonzero()[:, 0]  # (J,)
    samples = int(chosen.sum(1).max())
    drawn = sample_captions(
        student,
        _without_captions(batch, images),
        samples,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        epoch=epoch,
    )
    first = torch.zeros(batch.num_images, 1, dtype=torch.int64)
    first[images, 0] = samples * torch.arange(len(images))
    places = (first + chosen.cumsum(1) - 1)[chosen]  # the n-th of an image takes its n-th sample
    return _with_rows(batch, rows, drawn, places, student.tokenizer.pad_id)


def sampled_rows(batch: Batch, share: float, seed: int, epoch: int) -> Tensor:
    """(B,) True for the captions to replace, as a function of (seed, epoch, image) for each image.

    Of the k captions of an image, share * k are chosen at random. Where that is no whole number,
    it is rounded up or down at random, so that the share is met on average.
    """
    k = batch.captions_per_image
    rows = torch.zeros(batch.num_images, k, dtype=torch.bool)
    for image, name in enumerate(batch.image_ids):
        rng = generator(seed, "on policy", epoch, name)
        count = int(share * k + torch.rand(1, generator=rng, dtype=torch.float64).item())
        rows[image, torch.randperm(k, generator=rng)[:count]] = True
    return rows.flatten()


def _without_captions(batch: Batch, images: Tensor) -> Batch:
    """Some images of a batch, (J,), with an empty caption each."""
    images = images.to(batch.images.device)
    ids = batch.input_ids[: len(images), :1]
    return Batch(
        images=batch.images[images],
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        captions=("",) * len(images),
        image_ids=tuple(batch.image_ids[i] for i in images.tolist()),
        cached={key: values[images] for key, values in batch.cached.items()},
    )


def _with_rows(
    batch: Batch, rows: Tensor, drawn: SampledCaptions, places: Tensor, pad_id: int
) -> Batch:
    """The batch with the captions `places` of the drawn ones in its rows, (B,) bool."""
    length = max(batch.input_ids.shape[1], drawn.ids.shape[1])

    def merged(old: Tensor, new: Tensor, padding: int) -> Tensor:  # (B, T) each
        old, new = (F.pad(each, (0, length - each.shape[1]), value=padding) for each in (old, new))
        old[rows.to(old.device)] = new[places.to(new.device)]
        return old

    captions = list(batch.captions)
    for row, place in zip(rows.nonzero()[:, 0].tolist(), places.tolist(), strict=True):
        captions[row] = drawn.texts[place]
    sampled = rows.to(batch.input_ids.device)
    return replace(
        batch,
        input_ids=merged(batch.input_ids, drawn.ids, pad_id),
        mask=merged(batch.mask, drawn.mask, 0),
        captions=tuple(captions),
        sampled=sampled if batch.sampled is None else sampled | batch.sampled,
    )


def require_scored(
    losses: Mapping[str, DistillationLoss],
    share: float | tuple[float, float],
    cross_entropy: bool,
) -> None:
    """Sampled captions are worth their time only if a teacher's loss looks at their words.

    Args:
        losses: Those of the run.
        share: The option `on_policy`.
        cross_entropy: Whether the cross-entropy has a weight.

    Raises:
        ConfigError: no loss does; or no reference would be left for the cross-entropy.
    """
    scoring = [
        loss
        for loss in losses.values()
        if loss.from_teacher and (loss.per == "token" or loss.needs & {"logits", "hidden"})
    ]
    if not scoring:
        raise ConfigError(
            f"on_policy={share} samples captions for the teacher to score word by word, but none "
            f"of the losses ({', '.join(losses) or 'there are none'}) compares words. Add a loss "
            'such as losses={"token": "token"}, or leave on_policy out.'
        )
    if cross_entropy and share in (1.0, (1.0, 1.0)):
        raise ConfigError(
            "on_policy=1 replaces every reference caption, which leaves nothing for the "
            'cross-entropy. Give weights={"ce": 0, ...}, or a smaller share.'
        )


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
    keys = image_keys(batch.image_ids)
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


def sharing_trunks(models: Iterable[object]) -> list[Captioner]:
    """One captioner for each frozen trunk, or frozen stages, that several of the models have.

    Equal weights and settings count, whether the modules are the same or copies.
    """
    captioners = [model for model in models if isinstance(model, Captioner)]
    alike = Counter(map(_frozen_layout, captioners))
    groups: dict[str, list[Captioner]] = {}
    for captioner in captioners:
        if alike[_frozen_layout(captioner)] > 1:  # or hashing the weights is not worth it
            key = captioner.encoder.current_key()
            groups.setdefault(key or "", []).append(captioner)
    return [group[0] for key, group in groups.items() if key and len(group) > 1]


def _frozen_layout(captioner: Captioner) -> object:
    encoder = captioner.encoder
    shapes = tuple(p.shape for p in encoder.parameters() if not p.requires_grad)
    return type(encoder), shapes or id(captioner)


def with_shared_tokens(captioners: Sequence[Captioner], batch: Batch) -> Batch:
    """The batch with the output of the frozen stages of these captioners, each computed once."""
    for captioner in captioners:
        encoder = captioner.encoder
        found = None if torch.is_grad_enabled() else batch.cached.get(encoder.live_key)
        key = encoder.current_key()
        if found is not None and key is not None and encoder.trunk_frozen:
            batch = replace(batch, cached={**batch.cached, key: found})
        else:
            batch = with_frozen_tokens(captioner, batch)
    return batch


def beside(first: Batch, second: Batch, pad_id: int) -> Batch:
    """The captions of two batches of the same images side by side; those of `first` come first.

    Args:
        first: I * K captions.
        second: I * k captions, none of them sampled.
        pad_id: Id of the padding.

    Returns:
        I * (K + k) captions. The advantages of the second ones are 0.
    """
    both, images = (first, second), first.num_images
    longest = max(batch.input_ids.shape[1] for batch in both)

    def joined(values: Sequence[Tensor]) -> Tensor:  # each (B, T) or (B,)
        return torch.cat([v.view(images, -1, *v.shape[1:]) for v in values], 1).flatten(0, 1)

    def padded(values: Sequence[Tensor], pad: int) -> Tensor:
        return joined([F.pad(v, (0, longest - v.shape[1]), value=pad) for v in values])

    def per_caption(name: str, default: float) -> Tensor:
        given = [getattr(batch, name) for batch in both]
        rows = [torch.full((len(b.captions),), default, device=b.mask.device) for b in both]
        return joined([r if g is None else g for g, r in zip(given, rows, strict=True)])

    many, few = first.captions_per_image, second.captions_per_image
    texts = [
        text
        for i in range(images)
        for text in (*first.captions[i * many :][:many], *second.captions[i * few :][:few])
    ]
    weights = None if second.caption_weights is None else per_caption("caption_weights", 1.0)
    return replace(
        first,
        input_ids=padded([batch.input_ids for batch in both], pad_id),
        mask=padded([batch.mask for batch in both], 0),
        captions=tuple(texts),
        sampled=per_caption("sampled", 0.0).bool(),
        caption_weights=weights,
        advantages=per_caption("advantages", 0.0),
    )
