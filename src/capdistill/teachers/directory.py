"""The directory of a saved ensemble, with its members; and that of a Hugging Face teacher."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capdistill.errors import CheckpointError, ConfigError, shortened
from capdistill.files import from_json, read_manifest, remove_abandoned, temporary_name, write_text
from capdistill.saving import DESCRIPTION, ENSEMBLE, PRETRAINED, require_no_other, saved_file

_FORMAT = "capdistill.ensemble/1"
_PRETRAINED_FORMAT = "capdistill.pretrained/1"
HUB = "hf:"  # before a name on the Hugging Face Hub, where a directory could be meant


def write(directory: Path, members: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write every member, then the file that lists them: until then, the old ensemble is complete.

    Args:
        directory: Created if it does not exist.
        members: Name -> a model with `save`.
        about: Arguments of `Ensemble` beside the members, as JSON.

    Raises:
        ConfigError: the directory cannot be written, or holds something else.
    """
    require_no_other(directory, ENSEMBLE)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        listed = [
            {"name": name, "directory": _write_member(member, directory, number)}
            for number, (name, member) in enumerate(members.items(), 1)
        ]
        write_list(directory, about, {each["name"]: each["directory"] for each in listed})
        kept = {member["directory"] for member in listed}
        for path in directory.iterdir():
            if path.is_dir() and path.name not in kept and _description(path).is_file():
                shutil.rmtree(path)  # a member of the old ensemble
    except OSError as error:
        raise ConfigError(
            f"Cannot write {directory}: {error.strerror or error}. Give a directory that exists or "
            "can be created, is writable and has space."
        ) from error


def write_list(directory: Path, about: Mapping[str, Any], members: Mapping[str, str]) -> None:
    """Write the file that lists the members of an ensemble.

    Args:
        directory: The directory.
        about: As for `write`.
        members: Name -> name of its directory within.
    """
    listed = [{"name": name, "directory": place} for name, place in members.items()]
    content = {"format": _FORMAT, **about, "members": listed}
    write_text(directory / ENSEMBLE, json.dumps(content, indent=2))


def _write_member(member: Any, directory: Path, number: int) -> str:
    """Save a member below the directory, under a name that follows from its content."""
    staged = directory / temporary_name("member")
    try:
        member.save(staged)
        content = hashlib.sha256(_description(staged).read_bytes()).hexdigest()
        place = directory / f"{number}-{content[:12]}"
        if place.exists():
            shutil.rmtree(place)
        staged.rename(place)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return place.name


def _description(directory: Path) -> Path:
    """The file that describes the captioner, ensemble or other teacher in a directory."""
    others = (directory / ENSEMBLE, directory / PRETRAINED)
    found = next((file for file in others if file.is_file()), None)
    return found or saved_file(directory, DESCRIPTION)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What was given to `write`: arguments of `Ensemble`, and the directory of each member.

    Raises:
        CheckpointError: there is no ensemble, or one of another format.
    """
    path = directory / ENSEMBLE
    if saved_file(directory, DESCRIPTION).is_file() and not path.is_file():
        raise CheckpointError(
            f"{directory} holds a saved captioner, no ensemble. Read it with "
            "capdistill.teachers.load(directory)."
        )
    content = read_manifest(path, _FORMAT, "an ensemble", "Ensemble.save", _check)
    about = {key: content[key] for key in ("name", "mixing", "weights")}
    places = {each["name"]: directory / each["directory"] for each in content["members"]}
    return about, places


def _check(content: Mapping[str, Any]) -> None:
    _ = content["name"], content["mixing"], content["weights"]
    for each in content["members"]:
        if type(each["name"]) is not str or Path(each["directory"]).name != each["directory"]:
            raise ValueError("a member has no name, or is not in a directory within")


def write_pretrained(directory: Path, arguments: Mapping[str, Any]) -> None:
    """Write the arguments of `from_pretrained`, which name the model, as JSON.

    Raises:
        ConfigError: the directory cannot be written, or holds something else.
    """
    require_no_other(directory, PRETRAINED)
    content = {"format": _PRETRAINED_FORMAT, **arguments}
    write_text(directory / PRETRAINED, json.dumps(content, indent=2))


def read_pretrained(directory: Path) -> dict[str, Any]:
    """The arguments that were given to `write_pretrained`.

    Raises:
        CheckpointError: the file is damaged, or of another format.
    """
    path, what = directory / PRETRAINED, "a teacher of Hugging Face"
    writer = "HuggingFaceTeacher.save"
    content = read_manifest(path, _PRETRAINED_FORMAT, what, writer, _check_pretrained)
    return {name: content[name] for name in _ARGUMENTS if content.get(name) is not None}


_ARGUMENTS = {
    "name_or_path_or_module": (str,),
    "prompt": (str,),
    "dtype": (str,),
    "device_map": (str, int, dict),
}


def _check_pretrained(content: Mapping[str, Any]) -> None:
    _ = content["name_or_path_or_module"]
    for name in content.keys() & _ARGUMENTS:
        if content[name] is not None and not isinstance(content[name], _ARGUMENTS[name]):
            raise ValueError(f"{name} is {shortened(content[name])}")
    if not isinstance(content["name_or_path_or_module"], str):
        raise ValueError("it names no model")


def is_pretrained(given: Any) -> bool:
    """Whether it names a model of Hugging Face transformers: its directory, or "hf:NAME".

    Example:
        >>> is_pretrained("hf:Salesforce/blip-image-captioning-base"), is_pretrained("runs/teacher")
        (True, False)
    """
    if not isinstance(given, (str, Path)):
        return False
    if str(given).startswith(HUB):
        return True
    try:
        content = from_json(Path(given, "config.json").expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return False
    return isinstance(content, dict) and "model_type" in content  # a run has a config.json, too
