"""What a captioner costs: bytes on disk, time an image, peak memory.

Run as `python -m capdistill.measure DIRECTORY`, it is the process of its own in which a saved
captioner's memory is measured: an earlier model can not have left anything behind there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capdistill.errors import CapdistillError
from capdistill.outputs import Batch
from capdistill.training.runtime import autocast

WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds an image at batch size 1, after warm-up.

    Example:
        >>> Latency.of([0.001, 0.002, 0.003])
        Latency(median=2.0, p95=3.0, n=3)

    Args:
        median: Half of the images take no longer.
        p95: 95 % of the images take no longer.
        n: How many images were timed.
    """

    median: float
    p95: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From seconds an image."""
        ordered = sorted(1000.0 * value for value in seconds)
        last = min(len(ordered) - 1, int(0.95 * len(ordered)))
        return cls(statistics.median(ordered), ordered[last], len(ordered))


@dataclass(frozen=True)
class Memory:
    """Peak memory of captioning one image after another, in bytes.

    Args:
        peak: What the model needs: on CPU the highest resident memory of a process of its own
            minus `baseline`; on CUDA the allocator's peak for this model.
        baseline: Resident memory of that process after its imports, before the model; 0 on CUDA.
    """

    peak: int
    baseline: int


def time_each(
    run: Callable[[Any], object], items: Sequence[Any], device: torch.device | None = None
) -> Latency:
    """Time `run` on each item, after warm-up on the first ones.

    Example:
        >>> time_each(lambda item: None, [1, 2, 3]).n
        3
    """
    for item in items[:WARM_UP]:
        run(item)
    return Latency.of([_seconds(run, item, device) for item in items])


def time_captions(
    captioner: Any, batches: Sequence[Batch], device: torch.device, precision: str
) -> Latency:
    """Time `captioner.generate` on batches of one image, the pixels already on the device."""
    ready = [batch.to(device) for batch in batches]
    with autocast(device, precision):
        return time_each(captioner.generate, ready, device)


def disk_bytes(directory: str | Path) -> int:
    """Bytes of all files below a directory.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"12345")
        ...     disk_bytes(folder)
        5
    """
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def cuda_memory(captioner: Any, batches: Sequence[Batch], device: torch.device) -> Memory:
    """The CUDA allocator's peak while captioning, other models' memory taken off."""
    own = sum(t.numel() * t.element_size() for t in captioner.state_dict().values())
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for batch in batches:
        captioner.generate(batch.to(device))
    return Memory(torch.cuda.max_memory_allocated(device) - before + own, 0)


def cpu_memory(directory: str | Path, *, images: int = 4, precision: str = "fp32") -> Memory:
    """Load a saved captioner in a new process, caption some images there, read its peak.

    Args:
        directory: As written by `Captioner.save`.
        images: How many (random) images it captions, one after another.
        precision: As in `evaluate`.

    Raises:
        CapdistillError: that process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "capdistill.measure", str(directory)]
    command += ["--images", str(images), "--precision", precision]
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CapdistillError(f"the process that measures memory failed: {lines[-1]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: Iterable[str] | None = None) -> int:
    """Load a captioner, caption random images, print its memory as JSON."""
    parser = argparse.ArgumentParser(prog="python -m capdistill.measure", description=__doc__)
    parser.add_argument("directory", help="written by Captioner.save")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args(None if arguments is None else list(arguments))
    memory = _load_and_caption(given.directory, given.images, given.precision)
    print(json.dumps(asdict(memory)))
    return 0


def _load_and_caption(directory: str, images: int, precision: str) -> Memory:
    import timm  # noqa: F401  what any captioner imports belongs to the baseline

    from capdistill.captioner import Captioner

    baseline = _highest_resident()
    captioner = Captioner.load(directory)
    size = int(captioner.encoder.image_size)
    chance = torch.Generator().manual_seed(0)
    with autocast(torch.device("cpu"), precision):
        for _ in range(images):
            pixels = torch.randint(256, (1, 3, size, size), generator=chance, dtype=torch.uint8)
            captioner.generate(pixels)
    return Memory(max(0, _highest_resident() - baseline), baseline)


def _highest_resident() -> int:
    """Highest resident memory of this process in bytes.

    On Linux from its own address space: `ru_maxrss` also remembers the parent's, from before
    the process was started.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _seconds(run: Callable[[Any], object], item: Any, device: torch.device | None) -> float:
    _wait(device)
    start = time.perf_counter()
    run(item)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
