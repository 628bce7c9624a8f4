"""Small tokenizers of every kind, trained on the bundled captions."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import capdistill as cd

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def captions() -> tuple[str, ...]:
    return tuple(cd.data.sample().train.captions)


@cache
def _corpus() -> tuple[str, ...]:
    return (*captions(), *["The quick brown fox (skateboarding) in São Paulo: 日本, 🐕."] * 3)


def _byte_level() -> Tokenizer:
    """As GPT-2, Qwen, SmolVLM, BART."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _corpus(), _trainer("Bpe", 800, ["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return made


def _sentencepiece_bpe() -> Tokenizer:
    """As Llama and PaliGemma: ▁ for spaces, and bytes for unknown characters."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.train_from_iterator(_corpus(), _trainer("Bpe", 900, ["<unk>", "<s>", "</s>", *BYTES]))
    return _with_plain_bytes(made)


def _unigram() -> Tokenizer:
    """As T5: ▁ for spaces, no bytes."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(_corpus(), _trainer("Unigram", 600, special, unk_token="<unk>"))
    return made


def _unigram_with_bytes() -> Tokenizer:
    """As ALBERT-like models with byte fallback."""
    content = json.loads(_unigram().to_str())
    content["model"]["byte_fallback"] = True
    content["model"]["vocab"] += [[piece, -30.0] for piece in BYTES]
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, content["decoder"]],
    }
    return Tokenizer.from_str(json.dumps(content))


def _word_piece() -> Tokenizer:
    """As BERT, BLIP, GIT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(_corpus(), _trainer("WordPiece", 600, special))
    return made


def _end_of_word() -> Tokenizer:
    """As CLIP and GPT-1: the last piece of a word ends with </w>."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder("</w>")
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(_corpus(), _trainer("Bpe", 600, special, end_of_word_suffix="</w>"))
    return made


def _trainer(kind: str, size: int, special: list[str], **options: Any) -> Any:
    make = getattr(trainers, f"{kind}Trainer")
    return make(vocab_size=size, special_tokens=special, show_progress=False, **options)


def _with_plain_bytes(made: Tokenizer) -> Tokenizer:
    """The bytes as pieces of the model, as SentencePiece has them, and not as special tokens."""
    content = json.loads(made.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(content))


_MAKERS = {
    "byte-level BPE": _byte_level,
    "SentencePiece BPE": _sentencepiece_bpe,
    "Unigram": _unigram,
    "Unigram with bytes": _unigram_with_bytes,
    "WordPiece": _word_piece,
    "BPE with ends of words": _end_of_word,
}
KINDS = tuple(_MAKERS)


@cache
def full(kind: str) -> Tokenizer:
    return _MAKERS[kind]()


@cache
def trimmed(kind: str, max_length: int = 1000) -> cd.tokenizers.HuggingFace:
    return cd.tokenizers.HuggingFace(full(kind), keep=captions()[::3], max_length=max_length)


@cache
def untrimmed(kind: str) -> cd.tokenizers.HuggingFace:
    return cd.tokenizers.HuggingFace(full(kind), max_length=1000)
