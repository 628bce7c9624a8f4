"""Captions to token ids and back: words, or the subwords of any Hugging Face tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.tokenizer import Tokenizer as Tokenizer
    from capdistill.tokenizer import WordTokenizer as WordTokenizer
    from capdistill.tokenizers.huggingface import HuggingFace as HuggingFace
    from capdistill.tokenizers.saved import load as load
else:
    from capdistill.tokenizer import Tokenizer as Tokenizer
    from capdistill.tokenizer import WordTokenizer as WordTokenizer

    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {"HuggingFace": "huggingface", "load": "saved"},
        "Tokenizer",
        "WordTokenizer",
    )
