"""A captioner of a few hundred parameters, its parts made by name, that other tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from capdistill import decoders, encoders
from capdistill.captioner import Captioner
from capdistill.encoders import Encoder
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer, WordTokenizer, pad_batch

WORDS = ("a", "dog", "cat", "runs", "sits", "red")


class Patches(Encoder):
    """Four patches of an 8 x 8 picture, with a batch norm and dropout in the way."""

    prefix_tokens, grid, tokens, token_dim, image_size = 0, (2, 2), 4, 6, 8
    hub_arguments = ("weights",)

    def __init__(self, dim: int = 8, *, weights: bool | str = True, note: object = None) -> None:
        super().__init__()
        self.dim, self.asked_for, self.note = dim, weights, note
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6))
        self.project = nn.Sequential(nn.Linear(6, dim), nn.Dropout(0.5))

    def trunk(self, images: Tensor) -> Tensor:
        pixels = self.normalise(images).to(self.backbone[0].weight.dtype)
        return self.backbone(pixels).flatten(2).transpose(1, 2)

    def head(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        return self.backbone.parameters()


class LetterTokenizer:
    """Somebody else's tokenizer, as GPT-2 users set it: start = end = padding = 0."""

    pad_id = start_id = end_id = 0
    max_length = 6
    vocabulary = ("<|end|>", "a", "dog", "runs", "cat")

    def encode(self, caption: str) -> list[int]:
        return [0, *map(self.vocabulary.index, caption.split()), 0]

    def decode(self, ids: Sequence[int]) -> str:
        words = [self.vocabulary[i] for i in ids]
        return " ".join(words[: words.index("<|end|>")] if "<|end|>" in words else words)


def tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS, max_length=6)


def toy(words: Tokenizer | None = None, *, seed: int = 0, encoder: Encoder | None = None):
    """A captioner in evaluation mode whose captions depend on the picture."""
    torch.manual_seed(seed)
    captioner = Captioner(
        encoders.create("toy-patches", dim=8) if encoder is None else encoder,
        decoders.create("lstm", dim=8, embed=6, hidden=8, layers=1, heads=2),
        tokenizer() if words is None else words,
        name="toy",
    )
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(2.0)
    return captioner.eval()


def pictures(count: int = 5, size: int = 8) -> Tensor:
    """(I, 3, size, size) uint8 noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch_of(words: Tokenizer, captions: Sequence[str], images: Tensor) -> Batch:
    """The captions of an image stand together."""
    ids, mask = pad_batch([words.encode(caption) for caption in captions], words.pad_id)
    names = tuple(f"{i}.jpg" for i in range(len(images)))
    return Batch(images, ids, mask, tuple(captions), names)
