"""Worker processes that read data: how many, how they start and end, what is sent to them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from capdistill.errors import ConfigError, DataError, shortened
from capdistill.runtime import launched, made_on_cpu

T = TypeVar("T")


def worker_start_method(given: str | None) -> str:
    """How worker processes start: "fork", "spawn" or "forkserver"; None is Python's default.

    Raises:
        ConfigError: this system has no such method.
    """
    methods = multiprocessing.get_all_start_methods()  # the first is the default
    if given is not None and given not in methods:
        raise ConfigError(f"start_method={given!r} was given; use one of {', '.join(methods)}.")
    return given or multiprocessing.get_start_method(allow_none=True) or methods[0]


def max_workers(start_method: str | None = None) -> int:
    """How many worker processes this one can use: its CPU cores, or none if it may not start any.

    Several processes that train together on a computer share its cores.

    Example:
        >>> max_workers() >= 0
        True
    """
    if multiprocessing.current_process().daemon:  # a worker itself
        return 0
    if worker_start_method(start_method) != "fork" and not _program_is_guarded():
        return 0
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(cores // launched().local_world_size, 1)


def _program_is_guarded() -> bool:
    """Whether a worker can import the program again without running it."""
    main = sys.modules.get("__main__")
    try:
        return "__main__" in Path(str(main.__file__)).read_text("utf-8")  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False


def require_picklable(data: Any, name: str = "data") -> None:
    """Reject data that cannot be sent to worker processes, and name the part that cannot.

    Example:
        >>> pairs = [("a.jpg", "a dog", lambda image: image)]
        >>> require_picklable(pairs)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: data[0][2] cannot be pickled ...

    Args:
        data: A data set, with all that it holds, such as its transform.
        name: Beginning of the message.

    Raises:
        ConfigError: it cannot be pickled.
    """
    error = _pickling_error(data)
    if error is None:
        return
    part, value = _unpicklable_part(data, name)
    raise ConfigError(
        f"{part} cannot be pickled ({shortened(value)}: {error}), so it cannot be sent to worker "
        "processes. Use num_workers=0, or replace it: a lambda by a function of a module, an open "
        "file by its path."
    ) from error


def is_picklable(value: Any) -> bool:
    """Whether a value can be sent to another process."""
    return _pickling_error(value) is None


def _pickling_error(value: Any) -> Exception | None:
    try:
        pickle.Pickler(_Discard(), pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:
        return error
    return None


class _Discard:
    def write(self, data: Any) -> int:
        return len(data)


def _unpicklable_part(value: Any, name: str, depth: int = 0) -> tuple[str, Any]:
    """The innermost part that cannot be pickled, with its name, such as "data.transform"."""
    parts: dict[str, Any] = {}
    if isinstance(value, Mapping):
        parts = {f"{name}[{key!r}]": each for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"{name}[{number}]": each for number, each in enumerate(value)}
    elif not isinstance(value, (type, FunctionType)):
        parts = {f"{name}.{key}": each for key, each in getattr(value, "__dict__", {}).items()}
    for part, each in parts.items():
        if depth < 9 and not is_picklable(each):
            return _unpicklable_part(each, part, depth + 1)
    return name, value


_FEW_BATCHES, _MAX_WORKERS = 8, 4


def default_num_workers(data: Any, batch_size: int = 16, *, start_method: str | None = None) -> int:
    """The number of processes to read a data set with.

    As many as there are CPU cores for this process, at most four. None for less than eight batches,
    for images in memory, on a single core, or in a process that may not start others. Without
    "fork", where workers import the program again, none for a data set that cannot be pickled or a
    program without `if __name__ == "__main__"`.

    Example:
        >>> from capdistill.data import sample
        >>> default_num_workers(sample().train)
        0

    Args:
        data: A data set.
        batch_size: Images per batch.
        start_method: As for `Loader`.
    """
    workers = max_workers(start_method)
    if workers < 2 or len(data) < _FEW_BATCHES * batch_size or _is_in_memory(data):
        return 0
    forked = worker_start_method(start_method) == "fork"
    return min(workers, _MAX_WORKERS) if forked or is_picklable(data) else 0


def _is_in_memory(data: Any) -> bool:
    first = data[0] if isinstance(data, (list, tuple)) else None
    image = first[0] if isinstance(first, (list, tuple)) and first else None
    return image is not None and not isinstance(image, (str, os.PathLike))


def worker_pool(
    data: Dataset[T], indices: list[Any], num_workers: int, start_method: str | None = None
) -> DataLoader[T]:
    """Processes that read `data[index]` for each of the indices, in their order.

    They stay for further epochs, for which the list (`sampler`) may be changed. `end` ends them, as
    does the end of the pool, in whichever thread it is collected, or of the program.

    Raises:
        ConfigError: processes that are not forked need data that can be pickled.
    """
    if worker_start_method(start_method) != "fork":
        for name, part in vars(data).items():
            require_picklable(part, name)
    while _killed:
        _killed.pop()._shutdown_workers()
    return DataLoader(
        data,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_signals,
        persistent_workers=True,
        multiprocessing_context=start_method,
        generator=torch.Generator(),  # leaves the global generator unchanged
    )


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Inside the block a worker process that has ended is our error, wherever torch raises it.

    Raises:
        DataError: a worker has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"A process that reads data has ended ({error}). It may have run out of memory, or "
            "could not import the data set. Pass num_workers=0 to read in this process."
        ) from error


def read_ahead(pool: DataLoader[T]) -> Iterator[T]:
    """What the processes of a pool read.

    Raises:
        DataError: one of them has ended.
    """
    with naming_lost_workers():
        with made_on_cpu():  # the seeds of the processes, and what they read
            reader: Any = iter(pool)
        if reader not in _readers:
            _readers.add(reader)
            weakref.finalize(pool, _kill, reader, os.getpid())
        yield from reader


def end(pool: DataLoader[Any] | None) -> None:
    """End the processes of a pool; an epoch that was left may still refer to them."""
    reader: Any = getattr(pool, "_iterator", None)
    if reader is not None:
        reader._shutdown_workers()
        _kill_workers(reader)


def _unchanged(result: Any) -> Any:
    return result


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process finishes its step
        signal.signal(number, signal.SIG_IGN)


# Torch asks workers to end by a message, from wherever the reader is collected. In the thread that
# sends the messages that may fail, and SIGTERM is ignored: the processes would stay for ever.
_readers: weakref.WeakSet[Any] = weakref.WeakSet()  # those that `_kill` waits for
_killed: list[Any] = []  # kept from being collected; the next pool is made in a proper thread


def _kill(reader: Any, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the pool too
        _kill_workers(reader)
        _killed.append(reader)


def _kill_workers(reader: Any) -> None:
    if reader._worker_pids_set:  # else torch reports that they were killed
        torch._C._remove_worker_pids(id(reader))
        reader._worker_pids_set = False
    for worker in reader._workers:
        worker.kill()
