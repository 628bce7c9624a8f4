"""Subword tokenizers of a few pieces in the usual notations, with spans as those have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch

from capdistill.outputs import Batch
from capdistill.tokenizer import pad_batch

LETTERS = "abcdefghijklmnopqrstuvwxyz.,'-AD"
Style = Literal["byte_level", "sentencepiece", "wordpiece", "words"]


class Pieces:
    """Greedy longest match, word by word; single letters are the fallback.

    "byte_level": "Ġdog" within a caption, "dog" at its start or inside a word. "sentencepiece":
    "▁dog" anywhere. "wordpiece": "dog" for the first piece of a word, "##s" for others. "words":
    lower-cased whole words without punctuation, and an unknown one.
    """

    pad_id, start_id, end_id, unk_id = range(4)

    def __init__(self, pieces: Sequence[str], style: Style, max_length: int = 40) -> None:
        self.style, self.max_length = style, max_length
        fallback = {
            "byte_level": [*LETTERS, *("Ġ" + letter for letter in LETTERS)],
            "sentencepiece": ["▁", *LETTERS],
            "wordpiece": [*LETTERS, *("##" + letter for letter in LETTERS)],
            "words": [],
        }[style]
        rest = [piece for piece in fallback if piece not in pieces]
        self.vocabulary = ("<pad>", "<start>", "<end>", "<unk>", *pieces, *rest)
        self.ids = {piece: number for number, piece in enumerate(self.vocabulary)}

    def encode(self, caption: str) -> list[int]:
        return self.encode_spans(caption)[0]

    def encode_spans(self, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
        found: list[tuple[int, tuple[int, int]]] = []
        pattern = r"[\w'-]+" if self.style == "words" else r"[\w'-]+|[^\w\s]"
        for match in re.finditer(pattern, caption):
            found += self._pieces(match[0], match.start())
        n, kept = len(caption), found[: self.max_length]
        end = [(self.end_id, (n, n))] if len(kept) == len(found) else []
        ids, spans = zip((self.start_id, (0, 0)), *kept, *end, strict=True)
        return list(ids), list(spans)

    def _pieces(self, word: str, at: int) -> list[tuple[int, tuple[int, int]]]:
        if self.style == "words":
            word = word.lower()
            return [(self.ids.get(word, self.unk_id), (at, at + len(word)))]
        mark = {"byte_level": "Ġ" if at else "", "sentencepiece": "▁", "wordpiece": ""}[self.style]
        rest, pieces, place = mark + word, [], at - len(mark)
        while rest:
            inner = "##" if self.style == "wordpiece" and pieces else ""
            lengths = range(len(rest), 0, -1)
            length = next((n for n in lengths if inner + rest[:n] in self.ids), 1)
            span = max(place, 0), place + length
            pieces.append((self.ids.get(inner + rest[:length], self.unk_id), span))
            rest, place = rest[length:], place + length
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        pieces = []
        for each in ids:
            if each == self.end_id:
                break
            if each not in (self.pad_id, self.start_id):
                pieces.append(self.vocabulary[each])
        if self.style == "words":
            return " ".join(pieces)
        if self.style == "wordpiece":
            return " ".join(pieces).replace(" ##", "")
        return "".join(pieces).replace("Ġ", " ").replace("▁", " ").strip()


def batch_of(captions: Sequence[str], tokenizer: Pieces, k: int = 1) -> Batch:
    """A batch of captions, k an image, with the ids of a tokenizer."""
    ids, mask = pad_batch([tokenizer.encode(caption) for caption in captions], tokenizer.pad_id)
    images = len(captions) // k
    pixels = torch.zeros(images, 3, 8, 8, dtype=torch.uint8)
    return Batch(pixels, ids, mask, tuple(captions), tuple(map(str, range(images))))


def logits_of(captions: Sequence[str], tokenizer: Pieces, seed: int, scale: float = 2.0):
    """(B, T - 1, V) float64 logits that depend on what was read up to each position alone."""
    batch = batch_of(captions, tokenizer)
    rows, length = batch.targets.shape
    logits = torch.zeros(rows, length, len(tokenizer.vocabulary), dtype=torch.float64)
    for row, ids in enumerate(batch.input_ids.tolist()):
        for place in range(length):
            key = hash((seed, tuple(ids[: place + 1]))) % 2**31
            rng = torch.Generator().manual_seed(key)
            logits[row, place] = scale * torch.randn(
                logits.shape[-1], generator=rng, dtype=torch.float64
            )
    return logits
