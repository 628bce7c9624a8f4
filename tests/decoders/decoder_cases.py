"""Tiny decoders of every form that tests of this folder share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capdistill.decoders import Decoder
from capdistill.decoders.lstm import LSTMDecoder
from capdistill.decoders.transformer import TransformerDecoder

DIM, TOKENS, VOCABULARY = 8, 5, 11
FORMS = {
    "lstm-parallel": (LSTMDecoder, {"embed": 6, "hidden": 10, "layers": 2, "heads": 2}),
    "lstm-parallel-1": (LSTMDecoder, {"embed": 6, "hidden": 10, "layers": 1, "heads": 2}),
    "lstm-untied": (LSTMDecoder, {"embed": 6, "hidden": 10, "layers": 3, "tied": False}),
    "lstm-recurrent": (
        LSTMDecoder,
        {"embed": 6, "hidden": 10, "layers": 2, "heads": 2, "attention": "recurrent"},
    ),
    "lstm-recurrent-untied": (
        LSTMDecoder,
        {"embed": 6, "hidden": 10, "layers": 1, "attention": "recurrent", "tied": False},
    ),
    "transformer": (TransformerDecoder, {"width": 12, "layers": 2, "heads": 2, "ffn": 16}),
    "transformer-1": (TransformerDecoder, {"width": 12, "layers": 1, "heads": 3, "ffn": 16}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str, *, dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> Decoder:
    """A decoder in evaluation mode; no parameter is left at a constant."""
    torch.manual_seed(0)
    cls, options = FORMS[form]
    decoder = cls(DIM, dropout=dropout, **options)
    decoder.build(VOCABULARY)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.to(dtype).eval()


def inputs(images: int = 2, k: int = 3, length: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(I * k, T) ids and (I, N, D) float64 features."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (images * k, length), generator=generator)
    features = torch.randn(images, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return ids, features
