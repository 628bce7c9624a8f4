"""Files of plain data and tensors: written atomically with checksums, read as data only."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from capdistill import __version__
from capdistill.errors import CheckpointError
from capdistill.files import DAMAGED, write_atomically

_MOST_VALUES = 10_000_000  # in a file: numbers, texts, tensors, lists and dicts


def write_file(path: Path, content: Mapping[str, Any], form: str) -> None:
    """Write plain data and tensors atomically. Every tensor, and the rest, has a checksum.

    Args:
        path: The file.
        content: What it holds.
        form: Its format, such as "capdistill.training/3".

    Raises:
        ConfigError: it cannot be written; the existing file is unchanged.
    """
    whole = {"format": form, "version": __version__, **content}
    write_atomically(path, lambda temporary: _dump(whole, temporary))


def _dump(content: dict[str, Any], path: Path) -> None:
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a full disk
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from error
    finally:
        torch.serialization.set_crc32_options(checks)


def read_file(path: Path, form: str, what: str = "training state") -> dict[str, Any]:
    """Read what `write_file` wrote, as data: a file cannot run code.

    Args:
        path: The file.
        form: The format that it must have.
        what: What it should hold, for messages.

    Raises:
        CheckpointError: it is missing, truncated, damaged, foreign, or of another version.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is truncated or not a {what}")
        _verify(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        _require_small(state)
    except CheckpointError:
        raise
    except DAMAGED as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    given = state.get("format") if isinstance(state, dict) else None
    if given != form:
        raise CheckpointError(f"{path} is not a {what}{_compared(given, form, state)}")
    found: dict[str, Any] = state
    return found


def _compared(given: object, form: str, state: Any) -> str:
    """Why a file of another format is refused."""
    name, _, version = form.partition("/")
    match = re.fullmatch(rf"{re.escape(name)}/([0-9]{{1,9}})", str(given))
    if match is None:
        return " of capdistill"
    newer = int(match[1]) > int(version)
    writer = f"capdistill {state.get('version', '(unknown)')}"
    return (
        f" of this version: it has format {match[1]}, written by {writer}, and this version reads "
        f"{version}. {'Update capdistill' if newer else 'Use the version that wrote it'}"
    )


def _verify(path: Path) -> None:
    """Compare the checksums that torch.save writes, which torch.load does not do."""
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("it is compressed, which torch.save does not do")
        if any(part.external_attr & _FOLDER for part in file.infolist()):
            raise ValueError("damaged: a part is marked as a folder, which torch reads as zeros")
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"damaged: the checksum of its part '{damaged}' is wrong")


_FOLDER = 0x10  # the attribute of MS-DOS


def _require_small(state: Any) -> None:
    """Refuse few bytes that stand for very many values."""
    left, values = [state], 0
    while left:
        value = left.pop()
        values += 1
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            left += value
        elif isinstance(value, torch.Tensor) and not _is_whole(value):
            raise ValueError("a tensor is larger than what the file holds of it")
        if values > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")


def _is_whole(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
