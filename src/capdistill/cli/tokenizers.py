"""The section "tokenizer" of a run file: words or subwords, saved or made from the captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from typing_extensions import Self

from capdistill.cli.common import captioner_directory
from capdistill.cli.data import FullPath
from capdistill.errors import ConfigError

if TYPE_CHECKING:
    from capdistill.data import Splits
    from capdistill.tokenizer import WordTokenizer
    from capdistill.tokenizers.huggingface import HuggingFace

_OF_WORDS, _ROLES = ("min_count", "max_size"), ("start", "end", "pad")
_OTHERS = {  # options that a kind does not have -> the kind that has them
    "words": {"trim": "huggingface", **dict.fromkeys(_ROLES, "huggingface")},
    "huggingface": dict.fromkeys(_OF_WORDS, "words"),
    "teacher": {
        **dict.fromkeys((*_OF_WORDS, "path"), "words"),
        **dict.fromkeys(_ROLES, "huggingface"),
    },
}


class TokenizerSection(BaseModel):
    """Words, or the subwords of a Hugging Face tokenizer or of the teacher.

    Args:
        name: "words", "huggingface", or "teacher": the pieces of a teacher of Hugging Face.
        path: Words: a saved tokenizer (a file or a captioner's directory); without one they are
            counted in the training captions. Hugging Face: a tokenizer.json or its directory.
        min_count, max_size: Options of `WordTokenizer.train`.
        max_length: Words or pieces kept of a caption.
        trim: Whether subwords are trimmed to those of the training captions.
        start, end, pad: Special tokens or ids, where the tokenizer does not declare them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["words", "huggingface", "teacher"] = "words"
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
        if self.name == "huggingface" and self.path is None:
            raise ValueError(
                "tokenizer: name 'huggingface' needs path=..., a tokenizer.json or its directory."
            )
        fields = type(self).model_fields
        for option, other in _OTHERS[self.name].items():
            if getattr(self, option) != fields[option].default:
                raise ValueError(
                    f"tokenizer: '{option}' is an option of the tokenizer '{other}', but its name "
                    f"is '{self.name}'. Remove it, or set tokenizer.name={other}."
                )
        return self


def make_tokenizer(
    section: TokenizerSection, data: Splits, teacher: Any = None
) -> WordTokenizer | HuggingFace:
    """A saved tokenizer, or one made with the captions of the training split.

    Raises:
        ConfigError: the teacher's pieces are asked for, and it has none.
    """
    from capdistill import tokenizers
    from capdistill.saving import TOKENIZER, saved_file

    options: dict[str, Any] = section.model_dump(exclude={"name", "path", "trim"})
    if section.name != "words":
        keep = data.train.captions if section.trim else None
        if section.name == "teacher":
            pieces = _pieces_of(teacher)
            return tokenizers.HuggingFace(pieces, keep, section.max_length)
        options = {name: options[name] for name in ("max_length", *_ROLES)}
        return tokenizers.HuggingFace(section.path, keep, **options)
    if section.path is None:
        options = {name: options[name] for name in ("min_count", "max_size", "max_length")}
        return tokenizers.WordTokenizer.train(data.train.captions, **options)
    path = Path(section.path)
    if not path.is_file():
        beside = (path / TOKENIZER).is_file()
        path = saved_file(path if beside else captioner_directory(section.path), TOKENIZER)
    return tokenizers.load(path)


def _pieces_of(teacher: Any) -> HuggingFace:
    from capdistill.tokenizers import HuggingFace

    tokenizer = getattr(teacher, "tokenizer", None)
    if not isinstance(tokenizer, HuggingFace):
        has = "there is no teacher" if tokenizer is None else f"it has a {type(tokenizer).__name__}"
        raise ConfigError(
            f"tokenizer: name 'teacher' takes the pieces of a teacher of Hugging Face, but {has}. "
            "Leave the section out: the student then has the teacher's tokenizer."
        )
    return tokenizer
