"""Paths as users give them, text in any encoding, and writes that are whole or nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from capdistill.errors import ConfigError, DataError
from capdistill.files import DirectoryLock, printable, user_path, write_atomically, write_text


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


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~") == tmp_path
    assert user_path("~/run/1") == user_path(Path("~/run/1")) == tmp_path / "run" / "1"
    write_text("~/run/a.txt", "x")
    assert (tmp_path / "run" / "a.txt").read_text() == "x"


def test_a_tilde_within_a_name_is_an_ordinary_character() -> None:
    assert user_path("run/~/a.txt") == Path("run/~/a.txt")
    assert user_path("~no-such-user.jpg") == Path("~no-such-user.jpg")


def test_a_tilde_without_a_home_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # HOME unset, unknown user id
    with pytest.raises(ConfigError, match=r"~/run: there is no home directory"):
        user_path("~/run")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a\0b.txt", r"'a\\x00b\.txt': the path cannot be used"),
        ("x" * 300, r"xxx\.\.\.xxx+: the path cannot be used \(File name too long\)"),
        ("/".join("x" * 200 for _ in range(30)), "File name too long"),
        ("a\ud800.txt", "cannot be part of a file name"),
        ("", "An empty path"),
        (None, "NoneType was given as a path"),
        (b"a.txt", "bytes was given as a path"),
        (3, "int was given as a path"),
    ],
    ids=["nul", "long name", "long path", "surrogate", "empty", "None", "bytes", "number"],
)
def test_what_cannot_be_a_path_is_our_error(path: object, message: str) -> None:
    for error in (ConfigError, DataError):
        with pytest.raises(error, match=message):
            user_path(path, error)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        write_text(path, "x")  # type: ignore[arg-type]


def test_a_path_that_may_not_be_read_is_our_error(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ConfigError, match=r"\(Permission denied\)"):
        user_path(str(tmp_path / "a.txt"))


def test_a_directory_that_may_not_be_entered_is_our_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="the directory cannot be entered"):
        user_path(tmp_path, DataError)


def test_a_loop_of_links_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot be used"):
        user_path(tmp_path / "a" / "c.txt")


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "犬" * 85):
        write_text(tmp_path / name, "x")
    assert len(names(tmp_path)) == 3


def test_a_directory_is_no_file_name() -> None:
    for path in (".", "/"):
        with pytest.raises(ConfigError, match="Add a file name"):
            write_text(path, "x")


def test_text_is_written_as_utf_8_and_lone_surrogates_as_json_escapes(tmp_path: Path) -> None:
    text = "é犬🐕 \ud83d"
    write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text("utf-8") == "é犬🐕 \\ud83d"
    write_text(tmp_path / "a.json", json.dumps([text], ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_bytes()) == [text]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift-jis"])
def test_printable_text_can_be_printed_and_keeps_what_the_stream_has(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    text = "a dog é 犬 🐕 \ud83d \udc80\n"
    stream.write(printable(text, stream))
    stream.flush()
    assert printable("a dog\n", stream) == "a dog\n"
    assert ("é" in printable(text, stream)) == (encoding not in ("ascii", "shift-jis"))
    assert r"\ud83d" in printable(text, stream)


def test_a_stream_without_a_known_encoding_is_printable() -> None:
    class Odd:
        encoding = "no-such-encoding"

    assert printable("é", Odd()) == r"\xe9"  # type: ignore[arg-type]
    assert printable("é", io.StringIO()) == "é"


def test_printing_through_a_pipe_in_the_c_locale_never_fails() -> None:
    code = "from capdistill.files import printable; print(printable('a dog \\u72ac \\ud83d'))"
    variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a dog \\u72ac \\ud83d\n"


def test_files_needs_no_torch() -> None:
    code = "import capdistill.files, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no such processes")
def test_a_forked_process_does_not_keep_a_directory_locked(tmp_path: Path) -> None:
    started, tell = os.pipe()
    with DirectoryLock() as lock:
        lock.take(tmp_path)
        child = os.fork()
        if not child:  # like a worker process, which lives on where its parent is killed
            os.write(tell, b"x")
            time.sleep(60)
            os._exit(0)
        try:
            os.read(started, 1)
            with pytest.raises(ConfigError, match="in use"):
                DirectoryLock().take(tmp_path)
            lock.__exit__(None, None, None)
            with DirectoryLock() as again:
                again.take(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(started)
            os.close(tell)


def test_a_missing_directory_needs_no_lock(tmp_path: Path) -> None:
    with DirectoryLock() as lock:
        lock.take(tmp_path / "none")
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", ["https://example.com/a.jpg", "s3://bucket/run", Path("http://a")])
def test_a_url_is_no_path(path: str | Path) -> None:
    with pytest.raises(ConfigError, match="is a URL"):
        user_path(path)
