"""Ctrl-C as a request: the first is noted, so that a step can be finished; a second one stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticing_ctrl_c(notice: Callable[[], bool]) -> Iterator[None]:
    """Inside, Ctrl-C calls `notice`; what handled it before comes back afterwards.

    Outside the main thread, where Python forbids handlers, nothing is changed.

    Example:
        >>> asked = []
        >>> with noticing_ctrl_c(lambda: not asked and not asked.append("once")):
        ...     signal.raise_signal(signal.SIGINT)
        >>> asked
        ['once']

    Args:
        notice: Whether the request is heeded; False is a KeyboardInterrupt at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if not notice():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:  # None: the handler was not Python's own
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
