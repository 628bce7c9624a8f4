"""Paths, text and files: every path a user gives, every text file written or printed.

Text files are UTF-8, whatever the locale. A lone surrogate (half an emoji, found in broken JSON)
has no UTF-8 form and is written as its escape, such as `\\ud83d`. The file stays valid UTF-8, and
in JSON that escape is the character itself. Files are written atomically: a reader never sees half
a file, even if the writer is killed.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from capdistill.errors import CapdistillError, CheckpointError, ConfigError


def read_object(path: str | Path, what: str, example: str = "") -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ConfigError: the file does not exist, or holds no JSON object.
    """
    try:
        content = from_json(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as {what} ({error}). Expected a JSON object{example}."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def read_manifest(
    path: Path, form: str, what: str, writer: str, check: Callable[[Any], object]
) -> dict[str, Any]:
    """Read the JSON file that describes the other files of a directory.

    Args:
        path: The file.
        form: Its "format".
        what: What it describes, for messages.
        writer: What writes such a directory, for messages.
        check: Is given the content; raises `ValueError`, `LookupError` or `TypeError` at what does
            not belong there.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another format.
    """
    try:
        content: dict[str, Any] = from_json(path.read_text(encoding="utf-8"))
        if content.get("format") != form:
            raise ValueError(f"format {content.get('format')!r}")
        check(content)
    except FileNotFoundError as error:
        place, best = path.parent, path.parent / "best"
        noun = what.removeprefix("a ").removeprefix("an ")
        found = f"{place} holds no {noun}" if place.is_dir() else f"There is no directory {place}"
        fix = f"a directory written by {writer}, with a file {path.name}"
        fix = f"{best}, the best of the run" if (best / path.name).is_file() else fix
        raise CheckpointError(f"{found}. Give {fix}.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not describe {what} ({type(error).__name__}: {error}). Expected a "
            f"directory written by {writer}, with format '{form}'."
        ) from error
    return content


# What reading a damaged or foreign file may raise.
DAMAGED: tuple[type[Exception], ...] = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, pickle.UnpicklingError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


def from_json(text: str | bytes) -> Any:
    """The values of a JSON text.

    Example:
        >>> from_json('{"a": [1, null]}')
        {'a': [1, None]}

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def user_path(path: str | os.PathLike[str], error: type[CapdistillError] = ConfigError) -> Path:
    """A path as a user gives it, with `~` expanded, checked as far as the file system can tell.

    The file need not exist. What comes back can be tested with `exists`, `is_file` and `is_dir`
    without an exception.

    Example:
        >>> user_path("runs/teacher")
        PosixPath('runs/teacher')
        >>> user_path("~/runs").is_absolute()
        True

    Args:
        path: A string or path object.
        error: The class to raise: `DataError` for data that are read, else `ConfigError`.

    Raises:
        CapdistillError: (of the class `error`) it is no path, is empty or holds a NUL character; a
            name in it is too long; the user may not enter one of its directories; it begins with
            `~` and there is no home directory.
    """
    given = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(given, str):
        raise error(f"{type(path).__name__} was given as a path; expected a string or a Path.")
    if not given:
        raise error("An empty path was given. Name a file or directory; '.' is the current one.")
    if re.match("[a-z][a-z0-9+.-]+:/", given, re.IGNORECASE):
        raise error(f"{_shortened(given)} is a URL: nothing is downloaded. Copy or mount it first.")
    expanded = os.path.expanduser(given)  # leaves '~name' alone where there is no such user
    if expanded == "~" or expanded.startswith(("~/", f"~{os.sep}")):
        raise error(f"{given}: there is no home directory (HOME is not set). Give the full path.")
    reason = _why_unusable(expanded)
    if reason:
        raise error(f"{_shortened(given)}: the path cannot be used ({reason}). Give another path.")
    return Path(expanded)


def _why_unusable(path: str) -> str | None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None  # whoever reads it reports that, and whoever writes it may create it
    except OSError as problem:  # name too long, permission denied, a loop of links
        return problem.strerror or str(problem)
    except UnicodeEncodeError as problem:
        return f"{path[problem.start]!r} cannot be part of a file name here"
    except ValueError as problem:  # a NUL character
        return str(problem)
    if stat.S_ISDIR(mode) and not os.access(path, os.X_OK):
        return "permission denied: the directory cannot be entered"
    return None


def _shortened(path: str) -> str:
    shown = path if path.isprintable() else repr(path)
    return shown if len(shown) <= 120 else f"{shown[:80]}...{shown[-30:]}"


def printable(text: str, stream: IO[str] | None = None) -> str:
    """The text with characters that the stream cannot encode escaped, so that printing succeeds.

    Example:
        >>> import io
        >>> printable("un café 🐕", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
        'un café \\\\U0001f415'
        >>> printable("half an emoji: \\ud83d", io.StringIO())
        'half an emoji: \\\\ud83d'

    Args:
        text: Any text.
        stream: Where it will be printed; default standard output.
    """
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "utf-8"
    try:
        codecs.lookup(encoding)
    except LookupError:
        encoding = "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text atomically as UTF-8. Line ends stay as they are; lone surrogates are escaped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/a.txt", "one\\n")
        ...     Path(folder, "a.txt").read_bytes()
        b'one\\n'

    Raises:
        ConfigError: as `write_atomically`.
    """
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "new", "a.txt")
        ...     write_atomically(file, lambda temporary: temporary.write_text("whole"))
        ...     file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)

    Args:
        path: The file. Its directory is created where it does not exist.
        write: Called with the temporary path; writes all content to it.

    Raises:
        ConfigError: the path cannot be used, or the directory cannot be written (read-only, full,
            or a file). The file at `path` then stays as it was, as it does whatever `write` raises.
    """
    path = user_path(path)
    if not path.name:
        raise ConfigError(f"Cannot write {path}: it is a directory. Add a file name.")
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        temporary.touch(exist_ok=False)  # with the permissions of any new file
        try:
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Give a directory that exists or can "
            "be created, is writable and has space; files written earlier were left as they are."
        ) from error


def lock(stream: IO[bytes]) -> None:
    """Wait for the exclusive right to a file. It ends when the file is closed.

    Threads wait for each other, too. Where a system or a disk has no such locks it does nothing.
    """
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)


def json_checksum(value: Any) -> int:
    """A checksum of a value that JSON can hold; it is the same when the value is read again."""
    return zlib.crc32(json.dumps(value).encode())


def system_error(error: BaseException) -> OSError | None:
    """The error of the system that an error is or was raised from, or None."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return cause if isinstance(cause, OSError) else None


def temporary_name(name: str) -> str:
    """A name for a file or directory that this process fills and then renames to `name`.

    Example:
        >>> temporary_name("model.safetensors").startswith(".model.safetensors.tmp-")
        True
    """
    return f".{name[:40]}.tmp-{_host()}-{os.getpid()}-{_PROCESS}-{secrets.token_hex(4)}"


def remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left behind under a `temporary_name`.

    A file of a process that still runs is left alone. So is one written from another computer,
    whose processes cannot be seen, until it is a day old.
    """
    try:
        names = [entry.name for entry in os.scandir(directory) if ".tmp-" in entry.name]
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        path = directory / name
        if match is None or _may_be_in_use(path, *match.groups()):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


_PROCESS = secrets.token_hex(3)  # tells this process from an earlier one of the same number
_TEMPORARY = re.compile(r"\..*\.tmp-([0-9a-f]{6})-(\d+)-([0-9a-f]{6})-[0-9a-f]{8}")
_DAY = 24 * 60 * 60


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _may_be_in_use(path: Path, host: str, process: str, token: str) -> bool:
    if host != _host():
        try:
            return time.time() - path.stat().st_mtime < _DAY
        except OSError:
            return True
    if int(process) == os.getpid():
        return token == _PROCESS
    if os.name != "posix":
        return False  # the file of a running process cannot be removed there
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process
        return True
    return True


class DirectoryLock:
    """The sole right to write a directory or a file, for one process and one purpose at a time.

    It ends with the process, however that ends, and leaves no file. Processes that are forked
    meanwhile do not have it. Where the system or the file system has no such locks (Windows, some
    network disks), it is always granted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, DirectoryLock() as first:
        ...     first.take(Path(folder))
        ...     try:
        ...         DirectoryLock().take(Path(folder))
        ...     except ConfigError:
        ...         print("in use")
        in use
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, path: Path) -> None:
        """Take the right, unless this object has it. Where nothing exists, nothing happens.

        Raises:
            ConfigError: another process has it, or another object of this one.
        """
        if self._descriptor is not None or not path.exists():
            return
        try:
            import fcntl

            descriptor = os.open(path, os.O_RDONLY)
        except (ImportError, OSError):
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            writer, fix = ("training", "out=") if path.is_dir() else ("process", "file")
            raise ConfigError(
                f"{path} is in use: another {writer} writes to it. Wait until it is over or end "
                f"it, or give another {fix}."
            ) from error
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor
        _LOCKED.add(descriptor)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor in _LOCKED:  # not so in a forked process
            _LOCKED.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


_LOCKED: set[int] = set()  # the descriptors of directories that this process holds


def _forget_locks() -> None:
    """Close a forked process's copies, lest it keep the directories when its parent is killed."""
    while _LOCKED:
        os.close(_LOCKED.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def finite_or_none(value: Any) -> Any:
    """The same content for JSON, with None for NaN and infinity, which JSON cannot hold.

    Example:
        >>> finite_or_none({"loss": float("nan"), "rates": (0.1, float("inf"))})
        {'loss': None, 'rates': [0.1, None]}

    Args:
        value: Mappings, lists and tuples of any depth; keys become strings, tuples lists.
    """
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
