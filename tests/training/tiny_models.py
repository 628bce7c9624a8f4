"""Models and data so small that a run of several epochs takes a fraction of a second."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill import Captioner, decoders
from capdistill.encoders.base import Encoder
from capdistill.outputs import Batch
from capdistill.tokenizer import WordTokenizer, pad_batch

SIDE = 8
TOKENIZER = WordTokenizer(["red", "lime", "blue", "a", "dog", "cat"])
QUIET: dict[str, Any] = {"device": "cpu", "precision": "fp32", "progress": False}


class Patches(Encoder):
    """Four patches of an 8 x 8 image; `seen` counts the images the trunk has read."""

    def __init__(
        self,
        dim: int = 6,
        width: int = 5,
        norm: bool = False,
        trainable: bool = True,
        mix: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.token_dim, self.tokens, self.grid = dim, width, 4, (2, 2)
        self.image_size = SIDE
        self.conv = nn.Conv2d(3, width, 4, 4)
        self.mix = nn.Conv2d(width, width, 1) if mix else nn.Identity()
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.project = nn.Linear(width, dim)
        self.seen = 0
        for parameter in self.trunk_parameters():
            parameter.requires_grad_(trainable)

    def trunk(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        pixels = self.normalise(images).to(self.conv.weight.dtype)
        tokens: Tensor = self.norm(self.mix(self.conv(pixels))).flatten(2).transpose(1, 2)
        return tokens

    def head(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.project(tokens)
        return features

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.conv.parameters()
        yield from self.mix.parameters()
        yield from self.norm.parameters()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.conv, self.mix, self.norm):
            for value in part.state_dict().values():
                digest.update(value.numpy().tobytes())
        return digest.hexdigest()


def make_student(seed: int = 1, dropout: float = 0.0, **encoder: Any) -> Captioner:
    torch.manual_seed(seed)
    options = {"dim": encoder.get("dim", 6), "embed": 6, "hidden": 8, "layers": 1, "heads": 2}
    decoder = decoders.create("lstm", dropout=dropout, **options)
    return Captioner(Patches(**encoder), decoder, TOKENIZER, name="student")


def make_teacher(
    seed: int = 2, dropout: float = 0.0, tokenizer: Any = TOKENIZER, **encoder: Any
) -> Captioner:
    torch.manual_seed(seed)
    dim = encoder.setdefault("dim", 8)
    options = {"dim": dim, "width": 8, "layers": 1, "heads": 2, "ffn": 8}
    decoder = decoders.create("transformer", dropout=dropout, **options)
    return Captioner(Patches(**encoder), decoder, tokenizer, name="teacher")


def make_batch(words: Sequence[int], k: int = 1, first: int = 0) -> Batch:
    """A caption of `words[b]` words in row b; image i of the batch is number `first + i`."""
    images = len(words) // k
    chance = torch.Generator().manual_seed(first)
    rows, pixels = [], []
    for b, count in enumerate(words):
        ids = torch.randint(4, len(TOKENIZER), (count,), generator=chance).tolist()
        rows.append([TOKENIZER.start_id, *ids, TOKENIZER.end_id])
        if b % k == 0:
            pixels.append(torch.randint(256, (3, SIDE, SIDE), generator=chance, dtype=torch.uint8))
    ids, mask = pad_batch(rows, TOKENIZER.pad_id)
    captions = tuple(TOKENIZER.decode(row) for row in rows)
    return Batch(
        images=torch.stack(pixels),
        input_ids=ids,
        mask=mask,
        captions=captions,
        image_ids=tuple(f"{first + i}" for i in range(images)),
        references=tuple(captions[i * k : (i + 1) * k] for i in range(images)),
    )


def merge(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    length = max(batch.input_ids.shape[1] for batch in batches)
    padded = [pad(batch, length - batch.input_ids.shape[1]) for batch in batches]
    return Batch(
        images=torch.cat([batch.images for batch in padded]),
        input_ids=torch.cat([batch.input_ids for batch in padded]),
        mask=torch.cat([batch.mask for batch in padded]),
        captions=sum((batch.captions for batch in padded), ()),
        image_ids=sum((batch.image_ids for batch in padded), ()),
        references=sum((batch.references or () for batch in padded), ()),
    )


def pad(batch: Batch, columns: int) -> Batch:
    """The same batch with more padding."""
    ids = F.pad(batch.input_ids, (0, columns), value=TOKENIZER.pad_id)
    return replace(batch, input_ids=ids, mask=F.pad(batch.mask, (0, columns), value=False))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
