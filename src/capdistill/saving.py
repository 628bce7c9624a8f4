"""The directory of a saved captioner: weights, description of its parts, tokenizer.

Used by `Captioner.save` and `Captioner.load`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from capdistill import decoders, encoders
from capdistill.errors import CapdistillError, CheckpointError, ConfigError, shortened
from capdistill.files import (
    from_json,
    read_manifest,
    remove_abandoned,
    system_error,
    temporary_name,
    write_atomically,
    write_text,
)
from capdistill.registry import recipe_of
from capdistill.tokenizer import Tokenizer, WordTokenizer
from capdistill.tokenizers.huggingface import HuggingFace
from capdistill.tokenizers.saved import load as load_tokenizer
from capdistill.weights import StateOf, load_exactly, read_metadata, read_state_dict, strip_prefixes

WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "captioner.json", "tokenizer.json"
ENSEMBLE, TARGETS, PRETRAINED = "ensemble.json", "targets.json", "pretrained.json"
_KINDS = {DESCRIPTION: "a saved captioner", ENSEMBLE: "a saved ensemble", TARGETS: "cached targets"}
_KINDS[PRETRAINED] = "a saved teacher of Hugging Face"
PENDING = ".captioner"  # a directory of files that are complete but not yet in place
_FORMAT = "capdistill.captioner/1"
IDENTITY = "capdistill.weights"  # in the metadata of the weights
_REGISTRIES: dict[str, Any] = {"encoder": encoders, "decoder": decoders}
_COMPILED = "_orig_mod."  # what torch.compile adds to names

Description = dict[str, Any]


def describe_part(part: nn.Module, kind: str, allow_unregistered: bool = False) -> Any:
    """Name and arguments to recreate a component; None if it has none and that is allowed.

    Example:
        >>> decoder = decoders.create("lstm", dim=8, hidden=12)
        >>> describe_part(decoder, "decoder")
        {'name': 'lstm', 'kwargs': {'dim': 8, 'hidden': 12}}

    Raises:
        ConfigError: it was not created by a registry, or its arguments do not fit in JSON.
    """
    recipe = recipe_of(part)
    if recipe is not None:
        return {"name": recipe.name, "kwargs": _as_json(recipe.kwargs, kind)}
    if allow_unregistered:
        return None
    raise ConfigError(
        f"Captioner.save: the {kind} {type(part).__name__} was not made by a registry, so a file "
        f"cannot describe it. Register its class (capdistill.{kind}s.register) and create it "
        f"by name, or save with allow_unregistered=True and give the part to "
        f"Captioner.load(directory, {kind}=...)."
    )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Class of a tokenizer, and a hash of the content and order of its vocabulary.

    Example:
        >>> describe_tokenizer(WordTokenizer(["dog"]))["class"]
        'capdistill.tokenizer.WordTokenizer'
    """
    content = json.dumps([*tokenizer.vocabulary]).encode()
    return {
        "class": _class_name(type(tokenizer)),
        "vocabulary": hashlib.sha256(content).hexdigest(),
    }


def write(
    directory: Path, model: nn.Module, tokenizer: Tokenizer, description: Description
) -> None:
    """Replace the captioner in a directory completely, or not at all.

    A process that is killed meanwhile leaves the old captioner or the new one, never a mixture:
    the new files are gathered in a directory within, which becomes valid by one rename and whose
    files are then moved into place. Readers look there first (`saved_file`).

    Raises:
        ConfigError: the directory cannot be written, or holds something else.
    """
    require_no_other(directory, DESCRIPTION)
    state = {
        key.replace(_COMPILED, ""): value.detach().to("cpu", copy=True).contiguous()
        for key, value in model.state_dict().items()
    }
    weights = hash_weights(state)
    checksums = {"name": _digest_of(description["name"])}
    for kind, registry in _REGISTRIES.items():
        part = description[kind]
        checksums[kind] = _checksum(part, registry.get(part["name"]) if part else None)
    content = {"format": _FORMAT, **description, "weights": weights, "checksums": checksums}
    data = to_safetensors(state, {IDENTITY: weights})
    staged, pending = directory / temporary_name("captioner"), directory / PENDING
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        _move_into_place(directory)  # complete files of a killed process
        try:
            staged.mkdir()
            write_atomically(staged / WEIGHTS, lambda path: path.write_bytes(data))
            if is_saved(tokenizer):
                tokenizer.save(staged / TOKENIZER)
                checksums["tokenizer"] = _digest_of(_parsed(staged / TOKENIZER))
            write_text(staged / DESCRIPTION, json.dumps(content, indent=2))
            _sync(staged)
            staged.rename(pending)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        _sync(directory)
        _move_into_place(directory)
    except (OSError, ConfigError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ConfigError(
            f"Cannot write {directory}: {cause.strerror or cause}. Give a directory that exists or "
            "can be created, is writable and has space; the captioner in it was left as it was."
        ) from cause


def require_no_other(directory: Path, own: str = "") -> None:
    """Raise ConfigError if a directory holds something saved that another file describes."""
    for name, kind in _KINDS.items():
        if name != own and saved_file(directory, name).is_file():
            raise ConfigError(f"{directory} holds {kind}. Give another directory.")


def saved_file(directory: str | Path, name: str) -> Path:
    """Where a file of a saved captioner is, also if the process that saved it was killed.

    Example:
        >>> saved_file("runs/student/best", WEIGHTS).name
        'model.safetensors'
    """
    pending = Path(directory, PENDING, name)
    return pending if pending.is_file() else Path(directory, name)


def _move_into_place(directory: Path) -> None:
    pending = directory / PENDING
    if not pending.is_dir():
        return
    for path in sorted(pending.iterdir()):
        path.replace(directory / path.name)
    pending.rmdir()
    _sync(directory)


def _sync(directory: Path) -> None:
    """Flush a directory, so that its names survive a power failure."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_weights(state: Mapping[str, Tensor] | StateOf) -> str:
    """SHA-256 of names and values.

    Raises:
        ConfigError: a tensor has no values.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        if tensor.is_meta:
            raise ConfigError(f"{name} is on the device 'meta', without values. Load the weights.")
        value = tensor.detach().cpu()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(directory: Path, content: Description, model: nn.Module) -> None:
    """Load the saved weights, exactly or not at all.

    Weights and description must have been saved together. A file of weights without an identity
    (written by other tools) is accepted.

    Raises:
        CheckpointError: they belong to different captioners, or the weights cannot be read or do
            not fit; the message lists names and shapes.
    """
    path = saved_file(directory, WEIGHTS)
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks {WEIGHTS}. Copy all files of the captioner.")
    identity = read_metadata(path).get(IDENTITY)
    expected = content.get("weights")
    if identity and expected and identity != expected:
        raise CheckpointError(
            f"{path} and {saved_file(directory, DESCRIPTION)} were not saved together: the weights "
            f"are {identity[:12]}, those described {str(expected)[:12]}. Copy all files of one "
            "captioner, or save it again."
        )
    state = strip_prefixes(read_weights(path), model.state_dict())
    load_exactly(model, state, f"The weights in '{path}'")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file that `write` wrote, compared with their checksum.

    Raises:
        CheckpointError: they cannot be read, or have changed since they were saved.
    """
    state, identity = read_state_dict(path), read_metadata(path).get(IDENTITY)
    if identity and identity != hash_weights(state):
        raise CheckpointError(
            f"'{path}' is damaged: the values are not those that were saved (their checksum is "
            "wrong). Copy the file again, or use another checkpoint."
        )
    return state


def read_description(directory: Path) -> Description:
    """The description that was given to `write`.

    Raises:
        CheckpointError: the directory holds no captioner, or one of another format.
    """
    path = saved_file(directory, DESCRIPTION)
    if (directory / ENSEMBLE).is_file() and not path.is_file():
        raise CheckpointError(
            f"{directory} holds a saved ensemble. Read it with capdistill.teachers.load(directory)."
        )
    content = read_manifest(path, _FORMAT, "a captioner", "Captioner.save", _check_content)
    _require_checksum(path, content, "name", _digest_of(content["name"]))
    return content


def make_part(content: Description, kind: str, directory: Path | None = None) -> Any:
    """Recreate a component with random weights, which those of the file replace.

    Args:
        content: The description.
        kind: "encoder" or "decoder".
        directory: Where the weights are; a part much larger than their file is not made.

    Raises:
        CheckpointError: it cannot be created here; the message says how to pass it.
    """
    described, fix = content[kind], f"give the part to Captioner.load(directory, {kind}=...)"
    if described is None:
        raise CheckpointError(
            f"This captioner was saved with an unregistered {kind}, which no file describes: {fix}."
        )
    name, registry = described["name"], _REGISTRIES[kind]
    try:
        cls = registry.get(name)
        kwargs = _without_hub(cls, described["kwargs"])
        if directory is not None:
            _require_room(lambda: cls(**kwargs), kind, directory)
        part = registry.create(name, **kwargs)
    except Exception as error:  # a class may raise anything at arguments of another kind
        if isinstance(error, CapdistillError) and not isinstance(error, ConfigError):
            raise
        ours = isinstance(error, ConfigError)
        reason = str(error) if ours else f"{type(error).__name__}: {error}."
        raise CheckpointError(
            f"The {kind} '{name}' of this captioner cannot be made here: {reason} "
            f"Install the package that it came from, or {fix}."
        ) from error
    _require_checksum(DESCRIPTION, content, kind, _checksum(described, cls))
    return part


_MARGIN = 2**24  # bytes that a part may have beyond twice the file of weights


def _require_room(make: Callable[[], nn.Module], kind: str, directory: Path) -> None:
    """Refuse a description of a part that the weights cannot be of, before its memory is taken."""
    path = saved_file(directory, WEIGHTS)
    try:
        with torch.device("meta"):
            values = make().state_dict().values()
        needed = sum(value.numel() * value.element_size() for value in values)
    except Exception:  # a class that cannot be made without memory
        return
    if path.is_file() and needed > 2 * path.stat().st_size + _MARGIN:
        raise CheckpointError(
            f"The {kind} that {directory / DESCRIPTION} describes takes {needed:,} bytes, but "
            f"{path.name} has {path.stat().st_size:,}: they were not saved together, or are "
            "damaged. Copy all files of one captioner, or save it again."
        )


def find_tokenizer(
    directory: Path, content: Description, tokenizer: Tokenizer | None = None
) -> Tokenizer:
    """The saved tokenizer, or the given one if it has the same vocabulary.

    Raises:
        CheckpointError: it is not in the directory, or its vocabulary differs.
    """
    saved = content.get("tokenizer") or {}
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{directory}: the tokenizer is described by {shortened(saved)}.")
    if tokenizer is None:
        kind = saved.get("class")
        if kind not in (None, *map(_class_name, _OURS)):
            raise CheckpointError(
                f"The captioner in {directory} was saved with a tokenizer of the class {kind}, "
                "which capdistill does not write. Give it: Captioner.load(directory, tokenizer=...)"
            )
        file = saved_file(directory, TOKENIZER)
        tokenizer = load_tokenizer(file)
        _require_vocabulary(directory, saved, tokenizer)
        _require_checksum(file, content, "tokenizer", _digest_of(_parsed(file)))
    _require_vocabulary(directory, saved, tokenizer)
    return tokenizer


def _require_vocabulary(directory: Path, saved: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    given = describe_tokenizer(tokenizer)["vocabulary"]
    if saved.get("vocabulary", given) != given:
        raise CheckpointError(
            f"The vocabulary of the {type(tokenizer).__name__} ({len(tokenizer.vocabulary)} "
            f"entries) is not the one that the captioner in {directory} was saved with: words or "
            "their order differ. Give the tokenizer that it was trained with."
        )


def _require_checksum(path: Path | str, content: Description, name: str, found: str) -> None:
    """Refuse a value that is not the one that was saved; files without checksums are accepted."""
    checksums = content.get("checksums")
    expected = checksums.get(name) if isinstance(checksums, Mapping) else None
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path} has changed since it was saved: the checksum of '{name}' is wrong. Copy the "
            f"file again; if you edited it, remove 'checksums' from {DESCRIPTION}."
        )


def _checksum(part: Any, cls: type | None) -> str:
    """A checksum of a part; arguments that select pretrained weights have no effect on it."""
    if part is None:
        return _digest_of(None)
    unused: tuple[str, ...] = getattr(cls, "hub_arguments", ())
    kwargs = {name: value for name, value in part["kwargs"].items() if name not in unused}
    return _digest_of({**part, "kwargs": kwargs})


def _digest_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(path: Path) -> Any:
    return from_json(path.read_text(encoding="utf-8"))


_OURS = (WordTokenizer, HuggingFace)


def is_saved(tokenizer: Tokenizer) -> TypeGuard[WordTokenizer | HuggingFace]:
    """Whether a captioner's directory holds this tokenizer; a subclass may encode differently."""
    return type(tokenizer) in _OURS


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_content(content: Description) -> None:
    if not isinstance(content["name"], str):
        raise TypeError("its name is not a string")
    for kind in _REGISTRIES:
        described = content[kind]
        if described is not None and not (
            isinstance(described["name"], str) and isinstance(described["kwargs"], dict)
        ):
            raise TypeError(f"its {kind} has no name and arguments")


def _without_hub(cls: type, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with those that select pretrained weights set to False."""
    accepted = {*kwargs, *inspect.signature(cls).parameters}
    names: tuple[str, ...] = getattr(cls, "hub_arguments", ())
    return {**kwargs, **{name: False for name in names if name in accepted}}


def _as_json(kwargs: Mapping[str, Any], kind: str) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(kwargs), default=_plain)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Captioner.save: the arguments of the {kind} do not fit in JSON ({error}). Use "
            "numbers, strings, paths, lists and dicts as arguments of registered parts."
        ) from error


def _plain(value: Any) -> Any:
    """Paths as strings, NumPy's numbers and arrays as numbers and lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
