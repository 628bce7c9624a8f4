"""A captioner in a process of its own, which is timed on order.

`python -m capdistill.evaluation.timed_models REQUEST` loads a captioner, captions one image, and
then captions the images of each line of its input: objects in JSON, one a line, both ways. It
loads torch for captioners that need it, and for no others.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from capdistill.data.pixels import Pixels, read_pixels, square_pixels
from capdistill.errors import CapdistillError
from capdistill.evaluation.resources import highest_resident
from capdistill.generation.config import GenerationConfig

CONFIG = "hf-config:"  # before a configuration of transformers
VISION = {  # model type -> its class, its image processor, and its encoder
    "blip": ("BlipForConditionalGeneration", "BlipImageProcessor", "vision_model"),
    "git": ("GitForCausalLM", "CLIPImageProcessor", "git.image_encoder"),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", "ViTImageProcessor", "encoder"),
}
KINDS = ("onnx", "torch", "transformers")
R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    """What a process is to load and how.

    Args:
        kind: Of `KINDS`: what `deploy.export` wrote, a captioner or teacher in torch, or a model of
            transformers by itself.
        directory: Where it is.
        image: The first image.
        threads: Threads that compute.
        words: Tokens of every caption; None lets the models end their captions.
    """

    kind: str
    directory: str
    image: str
    threads: int = 1
    words: int | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds for some images at once.

    Args:
        reading: From files to pixels.
        encoding: In the encoder.
        decoding: The rest, up to the captions.
        processor: Of the processor, for all of it, in all threads.
    """

    reading: float
    encoding: float
    decoding: float
    processor: float

    @property
    def total(self) -> float:
        """Seconds from files to captions."""
        return self.reading + self.encoding + self.decoding


@dataclass
class Stopwatch:
    """Adds up the seconds in the functions that it wraps.

    Example:
        >>> watch = Stopwatch()
        >>> watch.timed(len)("abc"), watch.seconds > 0
        (3, True)
    """

    seconds: float = 0.0

    def timed(self, function: Callable[..., R]) -> Callable[..., R]:
        """The function, timed."""

        def run(*arguments: Any, **options: Any) -> R:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return run


class TimedModel(Protocol):
    """A captioner with a stopwatch on its encoder."""

    watch: Stopwatch
    parameters: int | None

    def read(self, path: str) -> Any:
        """The pixels of an image file."""

    def caption(self, images: Sequence[Any]) -> list[str]:
        """Captions of pixels, a batch at once."""


def generation_of(words: int | None) -> GenerationConfig | None:
    """Greedy decoding that takes this many steps for every caption."""
    if words is None:
        return None
    return GenerationConfig(max_length=words, min_length=words - 1)


@dataclass
class OnnxModel:
    """What `deploy.export` wrote, without torch."""

    request: Request
    watch: Stopwatch = field(default_factory=Stopwatch)
    parameters: int | None = None

    def __post_init__(self) -> None:
        from capdistill.deploy.onnx_captioner import OnnxCaptioner

        request = self.request
        self.captioner = OnnxCaptioner.load(request.directory, threads=request.threads)
        encoder = self.captioner._encoder
        encoder.run = self.watch.timed(encoder.run)

    def read(self, path: str) -> Pixels:
        """As for every model."""
        return square_pixels(read_pixels(path), self.captioner.image_size)

    def caption(self, images: Sequence[Any]) -> list[str]:
        """As for every model."""
        generation = generation_of(self.request.words)
        return [each.text for each in self.captioner.generate(np.stack(images), generation)]


class TorchModel:
    """A captioner, an ensemble or a teacher that is saved in a directory."""

    def __init__(self, request: Request) -> None:
        import torch

        from capdistill.compatibility import image_size
        from capdistill.teachers.ensemble import leaves, load

        torch.set_num_threads(request.threads)
        self.watch, self.request = Stopwatch(), request
        model: Any = load(request.directory)
        for leaf in leaves(model):
            adapter, encoder = (getattr(leaf, name, None) for name in ("adapter", "encoder"))
            if adapter is not None:
                adapter.encode = self.watch.timed(adapter.encode)
            elif encoder is not None:
                encoder.forward = self.watch.timed(encoder.forward)
        self.model, self.size = model, image_size(model)
        self.parameters: int | None = sum(each.numel() for each in model.parameters())
        self._tensor: Callable[[Any], Any] = torch.from_numpy

    def read(self, path: str) -> Pixels:
        """As for every model."""
        return square_pixels(read_pixels(path), self.size)

    def caption(self, images: Sequence[Any]) -> list[str]:
        """As for every model."""
        generation = generation_of(self.request.words)
        return [
            each.text for each in self.model.generate(self._tensor(np.stack(images)), generation)
        ]


class TransformersModel:
    """A model of transformers with its own image processor and its own `generate`.

    The captions are left in ids: random weights write no words.
    """

    def __init__(self, request: Request) -> None:
        import torch
        import transformers

        torch.set_num_threads(request.threads)
        self.watch = Stopwatch()
        config = json.loads(Path(request.directory, "config.json").read_text(encoding="utf-8"))
        name, processor, encoder = VISION[config["model_type"]]
        place = request.directory
        self.processor = getattr(transformers, processor).from_pretrained(place)
        self.model: Any = getattr(transformers, name).from_pretrained(place).eval()
        part = self.model.get_submodule(encoder)
        part.forward = self.watch.timed(part.forward)
        self.parameters: int | None = sum(each.numel() for each in self.model.parameters())
        words = request.words
        self.options = {"max_new_tokens": words or 20, "do_sample": False, "num_beams": 1}
        self.options |= {} if words is None else {"min_new_tokens": words}

    def read(self, path: str) -> Any:
        """As for every model."""
        from PIL import Image

        with Image.open(path) as image:
            made = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return made["pixel_values"]

    def caption(self, images: Sequence[Any]) -> list[str]:
        """As for every model; ids as text."""
        import torch

        with torch.inference_mode():
            made = self.model.generate(pixel_values=torch.cat(list(images)), **self.options)
        return [" ".join(map(str, ids)) for ids in made.tolist()]


def load_timed(request: Request) -> TimedModel:
    """The captioner of a request."""
    makers: Mapping[str, Callable[[Request], TimedModel]] = {
        "onnx": OnnxModel,
        "torch": TorchModel,
        "transformers": TransformersModel,
    }
    return makers[request.kind](request)


def time_batch(model: TimedModel, paths: Sequence[str]) -> tuple[Timing, list[str]]:
    """Caption image files at once. Timings, and the captions."""
    model.watch.seconds, used = 0.0, time.process_time()
    began = time.perf_counter()
    images = [model.read(path) for path in paths]
    read = time.perf_counter()
    captions = model.caption(images)
    done = time.perf_counter()
    encoding = model.watch.seconds
    timing = Timing(
        read - began, encoding, done - read - encoding, processor=time.process_time() - used
    )
    return timing, captions


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, caption, answer; then do each order until the input ends."""
    [given] = sys.argv[1:] if arguments is None else arguments
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        request = Request(**json.loads(given))
        model = load_timed(request)
        _, captions = time_batch(model, [request.image])
        answer(caption=captions[0], parameters=model.parameters, processor=time.process_time())
        for line in sys.stdin:
            timings = [asdict(time_batch(model, paths)[0]) for paths in json.loads(line)]
            answer(timings=timings, peak=highest_resident())
    except CapdistillError as error:
        answer(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
