"""The key of a data set's images: their content, not the place or time of their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from capdistill.data import image_keys
from capdistill.data.dataset import Example
from capdistill.data.image_keys import images_key
from capdistill.feature_files import HASHES


def write(folder: Path) -> list[Example]:
    folder.mkdir()
    examples = []
    for number in range(4):
        path = folder / f"{number}.jpg"
        path.write_bytes(bytes([number]) * 100)
        examples.append(Example(str(number), path, ["a dog"]))
    return examples


def moved(examples: list[Example], folder: Path) -> list[Example]:
    return [Example(e.image_id, folder / e.path.name, e.captions) for e in examples]


def test_copies_and_touched_files_have_the_same_key(tmp_path: Path) -> None:
    examples = write(tmp_path / "a")
    key = images_key(examples, tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert images_key(moved(examples, tmp_path / "b"), tmp_path) == key
    os.utime(examples[0].path, (1, 1))
    assert images_key(examples, tmp_path) == key


@pytest.mark.parametrize("remembered", [False, True])
def test_a_changed_photo_of_the_same_size_and_time_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    monkeypatch.setattr(image_keys, "_WORTH_KEEPING", -1.0 if remembered else 9.0)
    examples = write(tmp_path / "a")
    key = images_key(examples, tmp_path)
    path = examples[2].path
    status = path.stat()
    path.write_bytes(b"\2" * 50 + b"x" + b"\2" * 49)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert images_key(examples, tmp_path) != key
    assert (tmp_path / HASHES).exists() == remembered


def test_order_ids_and_missing_files_are_part_of_the_key(tmp_path: Path) -> None:
    examples = write(tmp_path / "a")
    renamed = [Example("x", examples[0].path, ["a dog"]), *examples[1:]]
    keys = {images_key(each, tmp_path) for each in (examples, examples[::-1], renamed)}
    examples[0].path.unlink()
    assert len(keys | {images_key(examples, tmp_path)}) == 4


def test_files_that_were_not_touched_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_keys, "_WORTH_KEEPING", -1.0)
    examples = write(tmp_path / "a")
    key = images_key(examples, tmp_path)
    read: list[Path] = []
    original = image_keys._hash_file
    monkeypatch.setattr(image_keys, "_hash_file", lambda p: read.append(p) or original(p))
    assert images_key(examples, tmp_path) == key
    assert read == []
    os.utime(examples[1].path)
    assert images_key(examples, tmp_path) == key
    assert read == [examples[1].path]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "\0"])
def test_a_damaged_memory_is_written_anew(tmp_path: Path, content: str) -> None:
    examples = write(tmp_path / "a")
    key = images_key(examples, tmp_path)
    (tmp_path / HASHES).write_text(content)
    assert images_key(examples, tmp_path) == key
