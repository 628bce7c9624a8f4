"""A saved tokenizer of any kind."""

from __future__ import annotations

from pathlib import Path

from capdistill.errors import CheckpointError
from capdistill.files import from_json, user_path
from capdistill.tokenizer import WordTokenizer
from capdistill.tokenizers.given import FORMAT
from capdistill.tokenizers.huggingface import HuggingFace

_MAX_BYTES = 2**28  # of a file; the largest vocabularies take a tenth


def load(path: str | Path) -> WordTokenizer | HuggingFace:
    """Read the file of a tokenizer that was saved, alone or with a captioner.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     WordTokenizer(["a", "dog"]).save(f"{folder}/tokenizer.json")
        ...     load(f"{folder}/tokenizer.json")
        WordTokenizer(6 words, max_length=40)

    Args:
        path: The file, or the directory of a saved captioner.

    Raises:
        CheckpointError: the file was not written by `save`.
    """
    path = user_path(path, CheckpointError)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a saved tokenizer ({type(error).__name__}: {error})."
        ) from error
    if isinstance(content, dict) and "model" in content and "format" not in content:
        raise CheckpointError(
            f"{path} is a tokenizer.json of the library tokenizers. Use it with "
            "capdistill.tokenizers.HuggingFace(path, keep=captions), or in a run file as "
            '"tokenizer": {"name": "huggingface", "path": ...}.'
        )
    is_subwords = isinstance(content, dict) and content.get("format") == FORMAT
    return HuggingFace.load(path) if is_subwords else WordTokenizer.load(path)
