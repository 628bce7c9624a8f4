"""A directory that is not what was exported is refused by name; writing is all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capdistill.deploy.manifest import (
    GREEDY,
    MANIFEST,
    REQUIRED,
    FileEntry,
    Manifest,
    read_manifest,
    write_directory,
)
from capdistill.errors import CheckpointError, ConfigError


def made(folder: Path, content: str = "content", extra: tuple[str, ...] = ()) -> Manifest:
    """Fill a folder with files of one line, and describe them."""
    for name in (*REQUIRED, *extra):
        (folder / name).write_text(f"{content} of {name}")
    return Manifest(
        name="student",
        precision="float32",
        image_size=8,
        mean=(0.5, 0.25, 0.1),
        std=(0.5, 0.5, 0.3),
        image_inputs=("image_keys",),
        state=("state_h",),
        vocabulary=9,
        max_length=41,
        files={path.name: FileEntry.measured(path) for path in folder.iterdir()},
        versions={"capdistill": "0.1.0", "opset": 18},
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_directory(tmp_path / "exported", made)
    return tmp_path / "exported"


def edit(directory: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Change the manifest, with a checksum that fits if `sign`."""
    content = json.loads((directory / MANIFEST).read_text())
    change(content)
    if sign:
        content.pop("checksum", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(content))


def test_what_is_written_is_read(directory: Path) -> None:
    manifest = read_manifest(directory)
    assert manifest.mean == (0.5, 0.25, 0.1)
    assert manifest.step_inputs == ("tokens", "position", "image_keys", "state_h")
    assert set(manifest.files) == set(REQUIRED)
    assert manifest.size == sum((directory / name).stat().st_size for name in REQUIRED)
    entry = manifest.files["step.onnx"]
    assert entry.sha256 == hashlib.sha256((directory / "step.onnx").read_bytes()).hexdigest()
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", REQUIRED)
def test_a_changed_file_is_named(directory: Path, name: str) -> None:
    data = bytearray((directory / name).read_bytes())
    data[3] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} has changed .* checksum is wrong"):
        read_manifest(directory)
    read_manifest(directory, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_and_a_missing_file_are_named(directory: Path, verify: bool) -> None:
    whole = (directory / "step.onnx").read_bytes()
    (directory / "step.onnx").write_bytes(whole[:5])
    with pytest.raises(CheckpointError, match=r"step\.onnx has 5 bytes, but 20 were exported"):
        read_manifest(directory, verify=verify)
    (directory / "step.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"step\.onnx is missing"):
        read_manifest(directory, verify=verify)


def test_a_newer_format_is_named_with_the_version_that_wrote_it(directory: Path) -> None:
    edit(directory, lambda content: content.update(format=2, capdistill="7.1", layout="new"))
    with pytest.raises(CheckpointError, match=r"format 2, written by capdistill 7\.1.*Upgrade"):
        read_manifest(directory)


def test_an_edited_manifest_is_refused(directory: Path) -> None:
    edit(directory, lambda content: content.update(vocabulary=10), sign=False)
    with pytest.raises(CheckpointError, match=r"manifest\.json has changed since it was written"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("image"), "KeyError"),
        (lambda content: content.update(vocabulary=True), "positive whole numbers"),
        (lambda content: content.update(precision="int4"), "int4"),
        (lambda content: content.update(state=[3]), "strings"),
        (lambda content: content["files"].pop("step.onnx"), "does not list step.onnx"),
        (lambda content: content["files"].update({"../a": {}}), "KeyError"),
        (
            lambda content: content["files"].update({"../a": {"sha256": "0", "bytes": 1}}),
            "not the name of a file beside it",
        ),
        (lambda content: content.update(state=["image_keys"]), "listed twice"),
        (lambda content: content["image"].update(mean=[0.5]), "three finite numbers"),
        *(
            (
                lambda content, name=name: content["files"].update(
                    {name: {"sha256": "0", "bytes": 1}}
                ),
                "not the name of a file beside it",
            )
            for name in ("a\0b", "\ud800", "C:a")
        ),
        (lambda content: content.update(format=True), "format True"),
    ],
)
def test_a_manifest_that_does_not_describe_a_captioner_is_refused(
    directory: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    edit(directory, change)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not written by"),
        ('{"name": "a web page", "icons": []}', "not written by"),
    ],
    ids=["empty", "truncated", "nested", "list", "web page"],
)
def test_a_foreign_manifest_is_refused(directory: Path, text: str, reason: str) -> None:
    (directory / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(directory)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "step.onnx"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read.* not a file"):
        read_manifest(directory)


def test_a_directory_without_a_manifest_is_refused_with_the_fix(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"no exported captioner.*deploy\.export"):
            read_manifest(path)


def test_a_path_near_an_export_names_it(directory: Path) -> None:
    for near in (directory.parent, directory / "encoder.onnx"):
        with pytest.raises(CheckpointError, match=rf"Give {directory}, which holds one"):
            read_manifest(near)


def test_a_saved_captioner_in_place_of_an_export_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "captioner.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"capdistill export {tmp_path} --out DIR"):
        read_manifest(tmp_path)


def test_an_export_that_fails_leaves_the_earlier_one(directory: Path) -> None:
    def fails(folder: Path) -> Manifest:
        (folder / "step.onnx").write_text("half")
        raise ConfigError("no")

    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ConfigError, match="no"):
        write_directory(directory, fails)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_second_export_replaces_the_first_and_only_that(directory: Path) -> None:
    write_directory(directory, lambda folder: made(folder, "second", (GREEDY,)))
    (directory / "notes.txt").write_text("mine")
    assert GREEDY in read_manifest(directory).files
    write_directory(directory, lambda folder: made(folder, "third"))
    assert (directory / "step.onnx").read_text() == "third of step.onnx"
    assert not (directory / GREEDY).exists()
    assert (directory / "notes.txt").read_text() == "mine"
    read_manifest(directory)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write"):
        write_directory(tmp_path / "file", made)


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_killed_export_is_never_taken_for_a_good_one(directory: Path, moves: int) -> None:
    """The process dies after some of the files were moved into place."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from capdistill.deploy import manifest
from tests.deploy.test_manifest import made
real, count = Path.replace, [0]
def replace(self, target):
    if Path(target).parent == Path({str(directory)!r}):
        if count[0] == {moves}:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
    return real(self, target)
Path.replace = replace
manifest.write_directory(Path({str(directory)!r}), lambda folder: made(folder, "new"))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        read_manifest(directory)
    write_directory(directory, lambda folder: made(folder, "again"))
    read_manifest(directory)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
