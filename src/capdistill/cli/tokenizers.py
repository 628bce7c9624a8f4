"""The section "tokenizer" of a run file: words or subwords, saved or made from the captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from typing_extensions import Self

from capdistill.cli.common import captioner_directory
from capdistill.cli.data import FullPath

if TYPE_CHECKING:
    from capdistill.data import Splits
    from capdistill.tokenizer import WordTokenizer
    from capdistill.tokenizers.huggingface import HuggingFace

_OF_WORDS, _OF_SUBWORDS = ("min_count", "max_size"), ("trim", "start", "end", "pad")


class TokenizerSection(BaseModel):
    """Words, or the subwords of a Hugging Face tokenizer.

    Args:
        name: "words" or "huggingface".
        path: Words: a saved tokenizer (a file or a captioner's directory); without one they are
            counted in the training captions. Hugging Face: a tokenizer.json or its directory.
        min_count, max_size: Options of `WordTokenizer.train`.
        max_length: Words or pieces kept of a caption.
        trim: Whether subwords are trimmed to those of the training captions.
        start, end, pad: Special tokens or ids, where the tokenizer does not declare them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["words", "huggingface"] = "words"
    path: FullPath | None = None
    min_count: StrictInt = Field(default=5, ge=1)
    max_size: StrictInt | None = Field(default=None, ge=5)
    max_length: StrictInt = Field(default=40, ge=1)
    trim: StrictBool = True
    start: StrictStr | StrictInt | None = None
    end: StrictStr | StrictInt | None = None
    pad: StrictStr | StrictInt | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        subwords = self.name == "huggingface"
        if subwords and self.path is None:
            raise ValueError(
                "tokenizer: name 'huggingface' needs path=..., a tokenizer.json or its directory."
            )
        fields = type(self).model_fields
        for option in _OF_WORDS if subwords else _OF_SUBWORDS:
            if getattr(self, option) != fields[option].default:
                other = "words" if subwords else "huggingface"
                raise ValueError(
                    f"tokenizer: '{option}' is an option of the tokenizer '{other}', but its name "
                    f"is '{self.name}'. Remove it, or set tokenizer.name={other}."
                )
        return self


def make_tokenizer(section: TokenizerSection, data: Splits) -> WordTokenizer | HuggingFace:
    """A saved tokenizer, or one made with the captions of the training split."""
    from capdistill import tokenizers
    from capdistill.saving import TOKENIZER, saved_file

    options: dict[str, Any] = section.model_dump(exclude={"name", "path", "trim"})
    if section.name == "huggingface":
        options = {name: options[name] for name in ("max_length", "start", "end", "pad")}
        keep = data.train.captions if section.trim else None
        return tokenizers.HuggingFace(section.path, keep, **options)
    if section.path is None:
        options = {name: options[name] for name in ("min_count", "max_size", "max_length")}
        return tokenizers.WordTokenizer.train(data.train.captions, **options)
    path = Path(section.path)
    if not path.is_file():
        beside = (path / TOKENIZER).is_file()
        path = saved_file(path if beside else captioner_directory(section.path), TOKENIZER)
    return tokenizers.load(path)
