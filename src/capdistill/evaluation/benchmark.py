"""`bench`: captioners side by side, each in a process of its own. Nothing here loads torch."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from capdistill.data.pixels import read_pixels
from capdistill.deploy.manifest import ENCODER, STEP, is_exported
from capdistill.errors import (
    CapdistillError,
    ConfigError,
    DataError,
    require_int,
    shortened,
    suggest,
)
from capdistill.evaluation.bench_table import Bench, Measured, Ratio
from capdistill.evaluation.resources import Latency, disk_bytes
from capdistill.evaluation.timed_models import CONFIG, Request, Timing
from capdistill.files import user_path
from capdistill.progress import report

HUB = "hf:"  # before a name on the Hugging Face Hub
_KILLED = -9  # by SIGKILL, which Windows does not have
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def bench(
    models: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    rounds: int = 5,
    images_per_round: int = 4,
    batch_size: int = 8,
    words: int | None = 12,
    threads: int = 1,
    starts: int = 3,
    reference: str | None = None,
    progress: bool = True,
) -> Bench:
    """Measure captioners on the CPU, each in a process of its own, in turns.

    Every model captions the same image files. In a round the models take turns, so that other work
    on the computer slows all of them alike. An image that cannot be read is named in a warning and
    left out. A model that fails after its first caption is in `Bench.failed`, without figures.

    Example:
        .. code-block:: python

            models = {"int8": "exported/int8", "BLIP": "hf-config:blip-base"}
            print(cd.evaluation.bench(models, "photos"))

    Args:
        models: Name -> model, or models. A model is a directory that `deploy.export` or
            `Captioner.save` wrote, any saved teacher, a preset (with random weights), or
            "hf-config:" before "blip-base", "vit-gpt2", "git-base" or the path of a config.json
            (with random weights: time and memory do not depend on them).
        images: A folder, or image files.
        rounds: In each, every model is timed once.
        images_per_round: Images that each model captions one by one in a round, after one untimed.
        batch_size: Images of a batch, one a round; 0 times no batches.
        words: Tokens of every caption, because time depends on them and random weights write
            until the limit; None leaves it to the models.
        threads: Threads that compute.
        starts: How often the start is timed.
        reference: Name of the model that the others are compared with; the first by default.
        progress: Report each step on standard error.

    Raises:
        ConfigError: an argument is out of range, or a model is unknown.
        DataError: there are no images, or none that can be read.
        CapdistillError: a model cannot be loaded or makes no caption, or all of them failed; the
            message holds the reason.
    """
    for name, value, least in (
        ("rounds", rounds, 1),
        ("images_per_round", images_per_round, 1),
        ("batch_size", batch_size, 0),
        ("threads", threads, 1),
        ("starts", starts, 1),
        ("words", 2 if words is None else words, 2),
    ):
        require_int(f"bench: {name}", value, least)
    named = _named(models)
    reference = next(iter(named)) if reference is None else reference
    if reference not in tuple(named):  # it may not be hashable
        raise ConfigError(f"bench: reference='{reference}'. {suggest(reference, named)}")
    files = _readable(_image_files(images), rounds * max(images_per_round, batch_size))
    say = report if progress else _silent
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="capdistill-bench-"))
        requests = {
            name: _request(model, Path(folder, str(n)), files[0], threads, words, say)
            for n, (name, model) in enumerate(named.items())
        }
        runs = {name: _Run(request) for name, request in requests.items()}
        for last in [False] * (starts - 1) + [True]:
            for name, run in runs.items():
                say(f"Starting {name} ...")
                process = stack.enter_context(run.started())
                if not last:
                    process.end()
        failed = _take_turns(runs, files, rounds, images_per_round, batch_size, say)
        runs = {name: run for name, run in runs.items() if name not in failed}
        measured = {name: run.measured() for name, run in runs.items()}
    reference = reference if reference in runs else next(iter(runs))
    ratios = {name: _ratios(run, runs[reference]) for name, run in runs.items()}
    settings = {
        "threads": threads,
        "words": words,
        "rounds": rounds,
        "images_per_round": images_per_round,
        "batch_size": batch_size,
        "starts": starts,
    }
    return Bench(measured, ratios, reference, settings, failed)


def _silent(text: str) -> None:
    pass


def _named(models: Any) -> dict[str, str]:
    if isinstance(models, Mapping):
        named = {str(name): _given(model) for name, model in models.items()}
    else:
        several = isinstance(models, Iterable) and not isinstance(models, str)
        given = [_given(model) for model in (models if several else [models])]
        named = dict(zip(given, given, strict=True))
        if len(named) < len(given):
            raise ConfigError("bench: a model was given twice. Give each once.")
    if not named:
        raise ConfigError("bench: no model was given.")
    return named


def _given(model: object) -> str:
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            f"bench: {shortened(model)} was given as a model; expected a directory, the name of a "
            "preset or hf-config:NAME, a list of them, or a mapping from names to them."
        )
    return os.fspath(model)


def _image_files(images: Any) -> list[str]:
    from capdistill.data.image_names import images_below

    if isinstance(images, (str, os.PathLike)):
        folder = user_path(images, DataError)
        files = images_below(folder) if folder.is_dir() else [folder]
    else:
        several = images if isinstance(images, Iterable) else [images]
        files = [user_path(each, DataError) for each in several]
    if not files or not all(file.is_file() for file in files):
        missing = next((file for file in files if not file.is_file()), images)
        raise DataError(f"bench: {missing} holds no image. Give a folder or files of images.")
    return [str(file) for file in files]


def _readable(files: Sequence[str], count: int) -> list[str]:
    """The first images that can be read, at most so many."""
    found: list[str] = []
    for file in files:
        if len(found) == count:
            break
        try:
            read_pixels(file)
            found.append(file)
        except DataError as error:
            warnings.warn(f"bench: an image was left out: {error}", stacklevel=3)
    if not found:
        raise DataError(f"bench: none of the {len(files)} images can be read; see the warnings.")
    return found


def _request(
    model: str, folder: Path, image: str, threads: int, words: int | None, say: Any
) -> Request:
    """Where a model is; one with random weights is written first."""
    if model.startswith(HUB):
        return Request("torch", model, image, threads, words)
    kind, place = "torch", user_path(model)
    if model.startswith(CONFIG) or (not place.exists() and _is_preset(model)):
        say(f"Writing {model} with random weights ...")
        _write_random(model, folder)
        kind, place = "transformers" if model.startswith(CONFIG) else "torch", folder
    elif is_exported(place):
        kind = "onnx"
    elif not place.is_dir():
        from capdistill import presets

        raise ConfigError(
            f"bench: '{model}' is neither a directory nor a preset. "
            f"{suggest(model, presets.names())}"
        )
    return Request(kind, str(place), image, threads, words)


def _is_preset(model: str) -> bool:
    from capdistill import presets

    return model in presets.names()


def _write_random(model: str, folder: Path) -> None:
    command = [sys.executable, "-m", "capdistill.evaluation.random_models", model, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(1))
    if done.returncode:
        raise CapdistillError(f"bench: '{model}' cannot be made: {_last_line(done.stderr)}")


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_VARIABLES, str(threads))}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


class _Process:
    """A process of `timed_models`: it has made its first caption."""

    def __init__(self, request: Request, errors: IO[str]) -> None:
        self.request, self._errors = request, errors
        command = [sys.executable, "-m", "capdistill.evaluation.timed_models"]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(request.threads),
        )
        self.first = self._answer()
        self.start_seconds = time.perf_counter() - began

    def time(self, batches: Sequence[Sequence[str]]) -> tuple[list[Timing], int]:
        """Caption batches of files. A timing each, and the peak of memory so far."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its answer says why
            print(json.dumps(batches), file=self._process.stdin, flush=True)
        answer = self._answer()
        return [Timing(**each) for each in answer["timings"]], answer["peak"]

    def end(self) -> None:
        """Let it end."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.communicate()

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self.end()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._why()}
        if "error" in answer:
            self.kill()
            raise CapdistillError(f"bench: {self.request.directory}: {answer['error']}")
        return dict(answer)

    def _why(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        last = _last_line(self._errors.read())
        if self._process.returncode == _KILLED:
            return f"its process was killed, as the system does where memory is short ({last})"
        return f"its process ended ({self._process.returncode}): {last}"


class _Run:
    """One model and what has been measured of it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.process: _Process | None = None
        self.starts: list[tuple[float, float]] = []  # wall, processor
        self.rounds: list[list[Timing]] = []
        self.batches: list[tuple[int, Timing]] = []
        self.memory = 0
        self.batch_memory: int | None = None

    @contextmanager
    def started(self) -> Iterator[_Process]:
        """A process; it ends with the block."""
        with tempfile.TemporaryFile("w+") as errors:
            self.process = process = _Process(self.request, errors)
            self.starts.append((process.start_seconds, process.first["processor"]))
            try:
                yield process
            finally:
                process.kill()

    def time_images(self, warm_up: str, files: Sequence[str]) -> None:
        """One image after another."""
        assert self.process is not None
        timings, peak = self.process.time([[file] for file in (warm_up, *files)])
        self.rounds.append(timings[1:])
        self.memory = max(self.memory, peak)

    def time_batch(self, files: Sequence[str]) -> None:
        """A batch at once."""
        assert self.process is not None
        [timing], self.batch_memory = self.process.time([files])
        self.batches.append((len(files), timing))

    def measured(self) -> Measured:
        """Everything so far."""
        assert self.process is not None
        each = [timing for timings in self.rounds for timing in timings]
        speeds = [count / timing.total for count, timing in self.batches]
        parameters, place = self.process.first["parameters"], self.request.directory
        return Measured(
            kind=self.request.kind,
            parameters=_constants(place) if self.request.kind == "onnx" else parameters,
            disk_bytes=None if place.startswith(HUB) else disk_bytes(place),
            memory_bytes=self.memory,
            batch_memory_bytes=self.batch_memory,
            start_seconds=statistics.median(wall for wall, _ in self.starts),
            start_processor_seconds=statistics.median(used for _, used in self.starts),
            latency_ms=Latency.of([timing.total for timing in each]),
            reading_ms=Latency.of([timing.reading for timing in each]),
            encoding_ms=Latency.of([timing.encoding for timing in each]),
            decoding_ms=Latency.of([timing.decoding for timing in each]),
            processor_ms=Latency.of([timing.processor for timing in each]),
            captions_per_second=statistics.median(speeds) if speeds else None,
            caption=self.process.first["caption"],
        )


def _take_turns(
    runs: Mapping[str, _Run],
    files: Sequence[str],
    rounds: int,
    images_per_round: int,
    batch_size: int,
    say: Any,
) -> dict[str, str]:
    """All rounds, first of single images: a batch needs more memory. Every other goes backwards.

    Returns:
        The models that failed, and why.

    Raises:
        CapdistillError: all of them failed.
    """
    failed: dict[str, str] = {}

    def turns(number: int, time_one: Callable[[_Run], None]) -> None:
        for name in [name for name in runs if name not in failed][:: 1 if number % 2 == 0 else -1]:
            try:
                time_one(runs[name])
            except CapdistillError as error:
                failed[name] = str(error)
                say(f"{name} failed: {error}")
        if len(failed) == len(runs):
            raise CapdistillError(" ".join(failed.values()))

    for number in range(rounds):
        say(f"Round {number + 1} of {rounds}: one image at a time ...")
        chosen = _some(files, number, images_per_round)
        turns(number, partial(_Run.time_images, warm_up=files[0], files=chosen))
    for number in range(rounds if batch_size else 0):
        say(f"Round {number + 1} of {rounds}: batches ...")
        turns(number, partial(_Run.time_batch, files=_some(files, number, batch_size)))
    return failed


def _some(files: Sequence[str], number: int, count: int) -> list[str]:
    """The files of a round; from the beginning again after the last one."""
    return [files[(number * count + n) % len(files)] for n in range(count)]


def _ratios(run: _Run, reference: _Run) -> dict[str, Ratio]:
    def each(of: _Run, name: str) -> list[float]:
        return [statistics.median(getattr(t, name) for t in timings) for timings in of.rounds]

    def ratio(name: str) -> Ratio:
        pairs = zip(each(run, name), each(reference, name), strict=True)
        return Ratio.of([own / max(other, 1e-9) for own, other in pairs])

    return {"latency": ratio("total"), "processor": ratio("processor")}


def _constants(directory: str) -> int | None:
    """Numbers that the graphs hold; None without the package onnx."""
    try:
        import onnx
    except ImportError:
        return None
    count = 0
    for name in (ENCODER, STEP):
        graph = onnx.load(str(Path(directory, name))).graph
        for tensor in graph.initializer:
            size = 1
            for side in tensor.dims:
                size *= side
            count += size
    return count
