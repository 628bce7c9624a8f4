"""Time, size and memory as plain figures. Nothing here loads torch."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Latency:
    """Milliseconds per image at batch size 1, after warm-up.

    Example:
        >>> Latency.of([0.001, 0.002, 0.003])
        Latency(median=2.0, p95=3.0, n=3)

    Args:
        median: Half of the images take no longer.
        p95: 95 % of the images take no longer.
        n: Number of images timed.
    """

    median: float
    p95: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From seconds per image."""
        ordered = sorted(1000.0 * value for value in seconds)
        last = math.ceil(0.95 * len(ordered)) - 1
        return cls(statistics.median(ordered), ordered[last], len(ordered))


def disk_bytes(directory: str | Path) -> int:
    """Bytes of all files below a directory.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"12345")
        ...     disk_bytes(folder)
        5
    """
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def highest_resident() -> int:
    """Highest resident memory of this process in bytes.

    On Linux it is read from /proc: `ru_maxrss` also counts the parent's memory from before the
    process was started.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
