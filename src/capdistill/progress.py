"""Progress of a long loop: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from capdistill.files import printable

T = TypeVar("T")


def progress(
    items: Iterable[T],
    total: int | None,
    what: str,
    *,
    unit: str = "image",
    show: bool = True,
    seconds: float = 10.0,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield the items, showing a bar on a terminal and occasional lines elsewhere.

    Both go to standard error, with the rate and the time left. A loop shorter than `seconds` prints
    no line.

    Example:
        >>> sum(progress([1, 2, 3], 3, "Encoding", show=False))
        6

    Args:
        items: The items of the loop.
        total: The number of units, if known.
        what: The work, such as "Encoding images".
        unit: Name of a unit.
        show: False shows nothing.
        seconds: The least time between two lines.
        size: Units of an item, such as the images of a batch.
    """
    stream = sys.stderr
    if not show or stream is None:
        yield from items
        return
    if stream.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    began = last = time.monotonic()
    printed, count = False, 0
    for item in items:
        yield item
        count += size(item)
        if time.monotonic() - last >= seconds:
            last, printed = time.monotonic(), True
            line = _progress_line(count, total, units, last - began)
            print(printable(f"{what}: {line}", stream), file=stream, flush=True)
    if printed:
        print(printable(f"{what}: {count:,} {units}, done", stream), file=stream, flush=True)


def on_terminal() -> bool:
    """Whether standard error is a terminal. A service may have no standard error at all."""
    return sys.stderr is not None and sys.stderr.isatty()


def report(text: str) -> None:
    """Print a line on standard error, where there is one."""
    if sys.stderr is not None:
        print(printable(text, sys.stderr), file=sys.stderr, flush=True)


def _progress_line(count: int, total: int | None, units: str, seconds: float) -> str:
    rate = count / seconds
    if not total or not count:
        return f"{count:,} {units}, {rate:.3g} per second"
    left = datetime.timedelta(seconds=round(max(total - count, 0) / rate))
    share = f"{count:,} of {total:,} {units} ({count / total:.0%})"
    return f"{share}, {rate:.3g} per second, {left} left"
