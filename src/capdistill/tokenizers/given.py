"""The content of tokenizer files: any Hugging Face tokenizer's, and our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capdistill.errors import ConfigError, MissingExtra, is_count, require_int, shortened
from capdistill.files import from_json, user_path

FORMAT = "capdistill.subword_tokenizer/1"
ROLES = ("start", "end", "pad", "unknown")
_DECLARED = ("bos_token", "cls_token", "eos_token", "sep_token", "pad_token", "unk_token")
_STARTS = ("<s>", "[CLS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<start>")
_ENDS = ("</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<end>")
_PADS = ("<pad>", "[PAD]", "<|pad|>")
_MODELS = ("BPE", "Unigram", "WordPiece")


class Given(NamedTuple):
    """A tokenizer as it was given.

    Args:
        content: The object in its tokenizer.json.
        roles: "bos_token" and the like -> token, where it is known.
        vocabulary: All entries in the order of their ids.
    """

    content: dict[str, Any]
    roles: dict[str, str]
    vocabulary: tuple[str, ...]


def read(tokenizer: Any, size: int | None = None) -> Given:
    """Content, special tokens and vocabulary of a tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers, a `tokenizers.Tokenizer`, or a path to a
            tokenizer.json or its directory.
        size: Number of ids, where the model has more than the tokenizer.

    Raises:
        ConfigError: it is something else, or has no subwords.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        content, roles = _from_path(user_path(tokenizer))
    else:
        content, roles = _from_object(tokenizer)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") not in _MODELS:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ConfigError(
            f"HuggingFace: the tokenizer is a {kind} model; expected one of {', '.join(_MODELS)}. "
            "Words as they are have capdistill.WordTokenizer."
        )
    return Given(_with_spaces(content), roles, _entries(content, size))


def _with_spaces(content: dict[str, Any]) -> dict[str, Any]:
    """CLIP's decoder leaves ends of words in the text; transformers replaces them afterwards."""
    suffix, rule = content["model"].get("end_of_word_suffix"), content.get("decoder")
    if not suffix or rule is None or suffix in as_text(rule):
        return content
    spaces = {"type": "Replace", "pattern": {"String": suffix}, "content": " "}
    return {**content, "decoder": {"type": "Sequence", "decoders": [rule, spaces]}}


def _from_object(tokenizer: Any) -> tuple[dict[str, Any], dict[str, str]]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not callable(getattr(backend, "to_str", None)):
        raise ConfigError(
            f"HuggingFace: the tokenizer is {shortened(tokenizer)} ({type(tokenizer).__name__}); "
            "expected a fast tokenizer of transformers (AutoTokenizer.from_pretrained(...), "
            "use_fast=True), a tokenizers.Tokenizer, or the path of a tokenizer.json."
        )
    roles = {role: getattr(tokenizer, role, None) for role in _DECLARED}
    return from_json(backend.to_str()), {k: str(v) for k, v in roles.items() if v is not None}


def _from_path(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"HuggingFace: {file} cannot be read ({error}). Expected a tokenizer.json, as "
            "AutoTokenizer.from_pretrained(name).save_pretrained(directory) writes it; a name on "
            "the Hub is no path."
        ) from error
    if not isinstance(content, dict) or "model" not in content:
        ours = isinstance(content, dict) and str(content.get("format")).startswith("capdistill.")
        fix = "It was saved by capdistill: read it with capdistill.tokenizers.load(path)."
        raise ConfigError(
            f"HuggingFace: {file} is no tokenizer.json of the library tokenizers. "
            + (fix if ours else "Expected an object with the key 'model'.")
        )
    return from_json(library_tokenizer(file.read_text(encoding="utf-8")).to_str()), _roles_beside(
        file.parent
    )


def library_tokenizer(content: str) -> Any:
    """A `tokenizers.Tokenizer` from its JSON; files of older versions become those of this one.

    Raises:
        MissingExtra: the package tokenizers is not installed.
        ConfigError: it cannot read this.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra(
            "Encoding subwords needs the package tokenizers, which is not installed. Install "
            'the extra (pip install "capdistill[hf]"), or where an exported captioner runs without '
            "torch, the package alone: pip install tokenizers"
        ) from error
    return library_call(lambda: Tokenizer.from_str(content))


def library_call(call: Callable[[], Any]) -> Any:
    """What the library tokenizers returns.

    Raises:
        ConfigError: it fails; a panic of the library is no `Exception`.
    """
    try:
        return call()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ConfigError(
            f"HuggingFace: the library tokenizers cannot use this tokenizer ({error}). Update "
            "the library, or save the tokenizer again with the installed version."
        ) from error


def _roles_beside(directory: Path) -> dict[str, str]:
    roles = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            values = from_json((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for role in _DECLARED if isinstance(values, dict) else ():
            value = values.get(role)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                roles[role] = token
    return roles


def _entries(content: Mapping[str, Any], size: int | None) -> tuple[str, ...]:
    """All entries by id; an id without one is '<unused ID>'."""
    pairs = {index: piece for piece, index in pieces_of(content["model"]).items()}
    pairs |= {added["id"]: added["content"] for added in content.get("added_tokens") or ()}
    least = max(pairs, default=-1) + 1
    if size is not None and not is_count(size, least):
        raise ConfigError(
            f"HuggingFace: size={size!r} was given; the tokenizer has {least} ids. Give the width "
            "of the model's logits, which is at least that, or leave it out."
        )
    return tuple(pairs.get(index, f"<unused {index}>") for index in range(size or least))


def pieces_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Piece -> id of the model in a tokenizer.json."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def special_pieces(content: Mapping[str, Any]) -> set[str]:
    """The entries that are marked as special tokens."""
    added = content.get("added_tokens") or ()
    return {token["content"] for token in added if token.get("special")}


def unknown_piece(content: Mapping[str, Any]) -> str | None:
    """The entry that the model itself gives for what it cannot spell."""
    model = content["model"]
    if model["type"] == "Unigram":
        index = model.get("unk_id")
        return None if index is None else str(model["vocab"][index][0])
    token = model.get("unk_token")
    return token if token in model["vocab"] else None


def find_roles(
    given: Given, start: str | int | None, end: str | int | None, pad: str | int | None
) -> tuple[int, int, int, int | None]:
    """The ids of start, end, padding and unknown: those given, or those that it declares.

    Raises:
        ConfigError: one that was given does not exist, or there is no end token.
    """
    ids = {piece: index for index, piece in enumerate(given.vocabulary)}

    def first(*tokens: str | None) -> int | None:
        return next((ids[token] for token in tokens if token in ids), None)

    def chosen(name: str, value: str | int | None) -> int | None:
        if value is None:
            return None
        if isinstance(value, str) and value in ids:
            return ids[value]
        if is_count(value, 0) and int(value) < len(ids):
            return int(value)
        raise ConfigError(
            f"HuggingFace: {name}={value!r} is not in the vocabulary of {len(ids)} entries. "
            f"{_specials(given)}"
        )

    role = given.roles.get
    last = chosen("end", end)
    last = first(role("eos_token"), role("sep_token"), *_ENDS) if last is None else last
    if last is None:
        raise ConfigError(
            "HuggingFace: the tokenizer names no token that ends a text. Give end=..., the token "
            f"(or its id) with which the model ends a caption. {_specials(given)}"
        )
    begin, padding = chosen("start", start), chosen("pad", pad)
    begin = first(role("bos_token"), role("cls_token"), *_STARTS) if begin is None else begin
    padding = first(role("pad_token"), *_PADS) if padding is None else padding
    begin, padding = (last if begin is None else begin), (last if padding is None else padding)
    unknown = first(unknown_piece(given.content))
    unknown = None if unknown == last else unknown
    if unknown is None and first(role("unk_token")) not in (begin, last, padding):
        unknown = first(role("unk_token"))  # of byte-level models, which never need it
    return begin, last, padding, unknown


def _specials(given: Given) -> str:
    names = sorted(special_pieces(given.content))
    shown = ", ".join(repr(name) for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"Its special tokens: {shown or 'none'}{more}."


def as_text(content: Mapping[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def check_content(content: Any) -> None:
    """Refuse a file that `HuggingFace.save` did not write.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("its format is another one")
    pieces, full, ids = (content[key] for key in ("pieces", "full_vocabulary", "full_ids"))
    if not _are(pieces, str) or len(set(pieces)) != len(pieces) or not pieces:
        raise ValueError("'pieces' is not a list of different strings")
    if (full is None) != (ids is None):
        raise ValueError("'full_ids' and 'full_vocabulary' do not go together")
    if ids is not None and not (
        _are(full, str) and _are(ids, int) and all(0 <= index < len(full) for index in ids)
    ):
        raise ValueError("'full_ids' are not ids of 'full_vocabulary'")
    if ids is not None and [full[index] for index in ids] != pieces:
        raise ValueError("'pieces' are not those of 'full_ids'")
    special, roles = content["special"], [content[role] for role in ROLES]
    if not _are(special, int) or not all(0 <= index < len(pieces) for index in special):
        raise ValueError("'special' is not a list of ids")
    if not all(type(index) is int and 0 <= index < len(pieces) for index in roles[:3]):
        raise ValueError("start, end and pad are not ids")
    if roles[3] is not None and not (type(roles[3]) is int and 0 <= roles[3] < len(pieces)):
        raise ValueError("'unknown' is not an id")
    require_int("max_length", content["max_length"], 1)
    model = content["tokenizer"]["model"]
    if not isinstance(model, Mapping) or not isinstance(model.get("type"), str):
        raise ValueError("'tokenizer' has no model")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
