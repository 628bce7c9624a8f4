"""What a captioner costs: bytes on disk, time per image, peak memory.

`python -m capdistill.evaluation.measure DIRECTORY` measures the memory of a saved captioner in a
separate process, in which no earlier model has left anything behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from capdistill.compatibility import image_size
from capdistill.errors import CapdistillError, DataError
from capdistill.evaluation.resources import Latency as Latency
from capdistill.evaluation.resources import disk_bytes as disk_bytes
from capdistill.evaluation.resources import highest_resident
from capdistill.generation.config import GenerationConfig
from capdistill.outputs import Batch
from capdistill.runtime import autocast
from capdistill.saving import PRETRAINED
from capdistill.teachers.ensemble import leaves, load

WARM_UP = 3  # images
TIMED = 20  # images


@dataclass(frozen=True)
class Memory:
    """Peak memory of captioning one image after another, in bytes.

    Args:
        peak: What the model needs: on CPU the highest resident memory of a separate process
            minus `baseline`; on CUDA the allocator's peak for this model.
        baseline: Resident memory of that process after its imports and a first small operation,
            before the model; 0 on CUDA.
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
    return time_in_turn([run], [items], device)[0]


def time_in_turn(
    runs: Sequence[Callable[[Any], object]],
    items: Sequence[Sequence[Any]],
    device: torch.device | None = None,
    *,
    budget: float = 20.0,
) -> list[Latency]:
    """Time several functions in turn, item by item: a busy machine slows all of them alike.

    Example:
        >>> [found.n for found in time_in_turn([len, len], [["a", "b"], ["c", "d"]])]
        [2, 2]

    Args:
        runs: The functions to time.
        items: For each of them the arguments it is called with, one after another.
        device: Synchronized before the clock is read.
        budget: Seconds after which no further item starts, once five were timed.
    """
    for run, each in zip(runs, items, strict=True):
        for item in each[:WARM_UP]:
            run(item)
    seconds: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for turn in range(min(len(each) for each in items)):
        if turn >= 5 and time.perf_counter() - began > budget:
            break
        for k, run in enumerate(runs):
            seconds[k].append(_seconds(run, items[k][turn], device))
    return [Latency.of(each) for each in seconds]


def time_captions(
    captioners: Sequence[Any],
    batches: Sequence[Sequence[Batch]],
    device: torch.device,
    precision: str,
    generation: GenerationConfig | None = None,
) -> list[Latency]:
    """Time `generate` of each model on its batches of one image; the pixels are on the device."""
    ready = [[batch.to(device) for batch in each] for each in batches]
    with autocast(device, precision):
        runs = [generate_function(captioner, generation) for captioner in captioners]
        return time_in_turn(runs, ready, device)


def generate_function(captioner: Any, generation: GenerationConfig | None) -> Callable[..., Any]:
    """`captioner.generate` with these options, or unchanged without any."""
    if generation is None:
        return captioner.generate  # type: ignore[no-any-return]
    return partial(captioner.generate, generation=generation)


def measure_costs(
    captioner: Any,
    data: Any,
    timed: Sequence[Batch],
    device: torch.device,
    precision: str,
    config: GenerationConfig | None,
) -> dict[str, Any]:
    """The measured fields of `Evaluation`; what cannot be measured becomes a note.

    Args:
        captioner: The model, on `device`.
        data: The data; time to read an image is measured if they name files.
        timed: Batches of one image each.
        device: The device it runs on.
        precision: As in `evaluate`.
        config: The decoding options.
    """
    costs: dict[str, Any] = {"notes": ()}
    if timed:
        costs["latency_ms"] = time_captions([captioner], [timed], device, precision, config)[0]
    else:
        costs["notes"] += ("Time was not measured: the batches hold no pixels.",)
    costs["preprocessing_ms"] = _preprocessing(captioner, data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            captioner.save(folder)
            elsewhere = (getattr(each, "weight_bytes", 0) for each in leaves(captioner))
            costs["disk_bytes"] = disk_bytes(folder) + sum(elsewhere)
            if device.type == "cpu":
                costs["memory"] = cpu_memory(folder, precision=precision, generation=config)
        except (CapdistillError, AttributeError) as error:
            costs["notes"] += (f"Size on disk and memory are not complete: {error}",)
    if device.type == "cuda" and timed:
        with autocast(device, precision):
            costs["memory"] = cuda_memory(captioner, timed, device, config)
    return costs


def _preprocessing(captioner: Any, data: Any) -> Latency | None:
    """Time per image from file to pixels, if the data name files."""
    from capdistill.data.images import centre_square, read_image

    size = image_size(captioner)
    paths = [example.path for example in getattr(data, "examples", ())[:TIMED]]
    readable = [path for path in paths if _readable(path)]
    if not readable:
        return None
    return time_each(lambda path: centre_square(read_image(path), size), readable)


def _readable(path: Path) -> bool:
    from capdistill.data.images import read_image

    try:
        read_image(path)
    except DataError:
        return False
    return True


def cuda_memory(
    captioner: Any,
    batches: Sequence[Batch],
    device: torch.device,
    generation: GenerationConfig | None = None,
) -> Memory:
    """The CUDA allocator's peak while captioning, without the memory of other models."""
    own = sum(t.numel() * t.element_size() for t in captioner.state_dict().values())
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for batch in batches:
        generate_function(captioner, generation)(batch.to(device))
    return Memory(torch.cuda.max_memory_allocated(device) - before + own, 0)


def cpu_memory(
    directory: str | Path,
    *,
    images: int = 4,
    precision: str = "fp32",
    generation: GenerationConfig | None = None,
) -> Memory:
    """Load a saved captioner in a new process, caption some images there, read its peak memory.

    Args:
        directory: As written by `Captioner.save` or `Ensemble.save`.
        images: Number of (random) images it captions, one after another.
        precision: As in `evaluate`.
        generation: The decoding options.

    Raises:
        CapdistillError: the process failed; the message holds its last line.
    """
    command = [sys.executable, "-m", "capdistill.evaluation.measure", str(directory)]
    command += ["--images", str(images), "--precision", precision]
    if generation is not None:
        command += ["--generation", json.dumps(generation.model_dump(mode="json"))]
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
    parser = argparse.ArgumentParser(
        prog="python -m capdistill.evaluation.measure", description=__doc__
    )
    parser.add_argument("directory", help="written by Captioner.save or Ensemble.save")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--generation", type=json.loads, default={}, help="options, as JSON")
    given = parser.parse_args(None if arguments is None else list(arguments))
    memory = _load_and_caption(given.directory, given.images, given.precision, given.generation)
    print(json.dumps(asdict(memory)))
    return 0


def _load_and_caption(
    directory: str, images: int, precision: str, generation: dict[str, Any]
) -> Memory:
    import timm  # noqa: F401  what any captioner imports belongs to the baseline

    if any(Path(directory).rglob(PRETRAINED)):
        import transformers  # noqa: F401
    with autocast(torch.device("cpu"), precision):
        _start_libraries()
    baseline = highest_resident()
    captioner = load(directory)
    size = image_size(captioner)
    rng = torch.Generator().manual_seed(0)
    with autocast(torch.device("cpu"), precision):
        for _ in range(images):
            pixels = torch.randint(256, (1, 3, size, size), generator=rng, dtype=torch.uint8)
            captioner.generate(pixels, generation)
    return Memory(max(0, highest_resident() - baseline), baseline)


def _start_libraries() -> None:
    """Run a convolution and a product, so that memory kept by the libraries is in the baseline."""
    image = torch.zeros(1, 8, 16, 16)
    mixed = torch.nn.Conv2d(8, 8, 3)(image).flatten(2)
    torch.nn.Linear(mixed.shape[2], 8)(mixed)


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
