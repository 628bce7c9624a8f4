"""Atomic writes: whole, or as if nothing had been tried."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from capdistill.errors import ConfigError
from capdistill.files import write_atomically, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_is_put_in_place_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ünï\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "ünï\r\n".encode()
    assert names(tmp_path) == ["a.txt"]


def test_missing_directories_are_made(tmp_path: Path) -> None:
    write_text(str(tmp_path / "run" / "1" / "a.txt"), "x")
    assert (tmp_path / "run" / "1" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failing_writer_leaves_the_old_file_and_its_own_error(tmp_path, error) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"Cannot write .*a\.txt: No space left on device\. .* has space; files written"
    with pytest.raises(ConfigError, match=message) as caught:
        write_atomically(path, write)
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_fills_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_content_is_on_the_disk_before_the_move(tmp_path, monkeypatch) -> None:
    path, events = tmp_path / "a.txt", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))
    )
    write_text(path, "new")
    assert events == ["fsync", "replace"]


def test_a_file_in_place_of_the_directory_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for path in (tmp_path / "run" / "a.txt", tmp_path / "run" / "deep" / "a.txt"):
        with pytest.raises(ConfigError, match=r"Cannot write .*Give a directory that exists or"):
            write_text(path, "x")
    assert (tmp_path / "run").read_text() == "a file"


def test_a_directory_in_place_of_the_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ConfigError, match=r"Cannot write .*a\.txt: Is a directory"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_directory_is_an_error_that_says_so(tmp_path, monkeypatch, code) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=f"{os.strerror(code)}.*is writable"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Cannot write /proc/none/a\.txt"):
        write_text("/proc/none/a.txt", "x")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, seen, done = tmp_path / "a.txt", set(), threading.Event()
    write_text(path, "0" * 9999)

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for digit in "123456789":
        write_text(path, digit * 9999)
    done.set()
    reader.join()
    assert seen <= {digit * 9999 for digit in "0123456789"}
