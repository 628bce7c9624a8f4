"""What 8 bits cost and save: size, time on one thread, CIDEr-D, and captions alone and in a batch.

    python benchmarks/quantization.py CAPTIONER --data flickr8k [--images 1000] [--calibration 128]
    python benchmarks/quantization.py CAPTIONER --data flickr8k --trained RUN/best --only plain

Exports a saved captioner, quantizes its encoder and its step graph in several ways, and captions
the validation images with each. `--trained` are captioners that were trained further from it with
quantize="int8" or, to tell what that does, without. The difference of CIDEr-D to float32 has a
paired interval. Times are seconds of the processor, so that other work matters little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from torch import Tensor

import capdistill as cd
from capdistill.data.pixels import read_batches
from capdistill.decoders.base import DecoderState
from capdistill.deploy.convolutions import quantize_convolutions
from capdistill.deploy.manifest import Manifest, read_manifest
from capdistill.deploy.products import quantize_products
from capdistill.deploy.writing import quiet
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.generation.decode import generate
from capdistill.metrics.bootstrap import paired_bootstrap

BATCH = 50


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [each.name for each in graph.get_outputs()]
    return dict(zip(names, graph.run(None, feeds), strict=True))


class Graphs(torch.nn.Module):
    """The step graph as a decoder, so that torch's searches run it."""

    def __init__(self, step: Path, manifest: Manifest) -> None:
        super().__init__()
        self.step_graph, self.manifest = session(step), manifest
        self.vocabulary = manifest.vocabulary
        self.first: dict[str, np.ndarray] = {}
        self.feeds: list[dict[str, np.ndarray]] | None = None

    def start(self, features: Tensor) -> DecoderState:
        """`features` are the places of the images in `first`."""
        which = features[:, 0].long().numpy()
        values = {name: torch.from_numpy(value[which]) for name, value in self.first.items()}
        rows = {name: values[name] for name in self.manifest.state}
        return DecoderState({name: values[name] for name in self.manifest.image_inputs}, rows)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        by_image = (-1, state.beams)
        feeds = {name: value.numpy() for name, value in state.image.items()}
        feeds |= {
            name: value.reshape(len(tokens) // state.beams, state.beams, *value.shape[1:]).numpy()
            for name, value in state.row.items()
        }
        feeds |= {"tokens": tokens.view(by_image).numpy(), "position": np.array(state.position)}
        if self.feeds is not None:
            self.feeds.append(feeds)
        out = {name: torch.from_numpy(value) for name, value in run(self.step_graph, feeds).items()}
        image = {name: out.get(f"next_{name}", value) for name, value in state.image.items()}
        row = {
            name: out[f"next_{name}"].flatten(0, 1) if f"next_{name}" in out else value
            for name, value in state.row.items()
        }
        after = DecoderState(image, row, state.beams, state.position + 1)
        return out["logits"].flatten(0, 1), after


def first_states(path: Path, images: np.ndarray, batch: int = BATCH) -> dict[str, np.ndarray]:
    graph = session(path)
    parts = [run(graph, {"images": each}) for each in split(images, batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (images[i : i + size] for i in range(0, len(images), size))


def captions(
    graphs: Graphs, tokenizer: Any, beam_size: int, batch: int = BATCH, count: int | None = None
) -> list[str]:
    spec = GenerationSpec.of(GenerationConfig(beam_size=beam_size), tokenizer)
    total = len(next(iter(graphs.first.values()))) if count is None else count
    places = torch.arange(total, dtype=torch.float32)[:, None].split(batch)
    found = [each for part in places for each in generate(graphs, part, spec)]  # type: ignore[arg-type]
    return [tokenizer.decode(each.tokens) for each in found]


def seconds(call: Callable[[], object], times: int) -> float:
    """Median processor time of one call."""
    call()
    spent = []
    for _ in range(times):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


# -- ways to quantize --------------------------------------------------------------------------


def products(form: Any) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        model = onnx.load(source)
        quantize_products(model, form)
        onnx.save(model, target)

    return write


def dynamic(source: Path, target: Path) -> None:
    """ONNX Runtime's: one scale for the activations of the whole batch."""
    quantization.quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
    )


def blocks(source: Path, target: Path) -> None:
    """MatMulNBits with 8 bits, blocks of 64 and integer activations by block."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=64, is_symmetric=True, accuracy_level=4, bits=8
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


class Recorded(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Inputs of the step graph while real captions were generated."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def static(feeds: list[dict[str, np.ndarray]]) -> Callable[[Path, Path], None]:
    """ONNX Runtime's: one scale for each activation, from the recorded inputs."""

    def write(source: Path, target: Path) -> None:
        quantization.quantize_static(
            source,
            target,
            Recorded(feeds),
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )

    return write


def convolutions(
    calibration: np.ndarray, form: str | None = "row", **options: Any
) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        quantize_convolutions(source, target, split(calibration, 8), **options)
        if form:
            products(form)(target, target)

    return write


# -- the table -----------------------------------------------------------------------------------


@dataclass
class Row:
    """A variant with its captions."""

    name: str
    encoder: Path
    step: Path
    greedy: list[str]
    beam: list[str]
    alone: int


class Bench:
    """The captioner, its float32 graphs and the images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.captioner = cd.Captioner.load(options.captioner)
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / "float32" / "manifest.json").exists():
            cd.deploy.export(self.captioner, self.out / "float32")
        self.manifest = read_manifest(self.out / "float32")
        data = cd.data.Flickr8k(options.data)
        self.references = [e.references for e in data.val.examples[: options.images]]
        self.images = self.read("images", [e.path for e in data.val.examples[: options.images]])
        places = np.random.default_rng(0).permutation(len(data.train))[: options.calibration]
        paths = [data.train.examples[i].path for i in places]
        self.calibration = self.read("calibration", paths)
        self.calibration_paths = paths
        self.states: dict[Path, dict[str, np.ndarray]] = {}
        self.encoder = self.out / "float32" / "encoder.onnx"
        self.step = self.out / "float32" / "step.onnx"

    def read(self, name: str, paths: list[Any]) -> np.ndarray:
        kept = self.out / f"{name}-{len(paths)}.npy"
        if not kept.exists():
            batches = read_batches(paths, self.manifest.image_size, BATCH, "raise")
            np.save(kept, np.concatenate([np.stack(each) for each in batches]))
        return np.load(kept)

    def trained(self, directory: Path, place: int) -> Iterator[Row]:
        """Another captioner in float32 and in 8 bits, with the ranges of its training if it has."""
        captioner = cd.Captioner.load(directory)
        if captioner.tokenizer.vocabulary != self.captioner.tokenizer.vocabulary:
            raise SystemExit(f"{directory} has another vocabulary.")
        for quantize in (None, "int8"):
            out = self.out / f"trained-{place}-{quantize or 'float32'}"
            ranges = captioner.activation_ranges is not None or quantize is None
            images = None if ranges else self.calibration_paths
            if not (out / "manifest.json").exists():
                cd.deploy.export(captioner, out, quantize=quantize, calibration=images)
            name = f"{directory}: {quantize or 'float32'}"
            yield self.measure(name, out / "encoder.onnx", out / "step.onnx", True)

    def recorded(self) -> list[dict[str, np.ndarray]]:
        """Inputs of the step for 100 calibration images."""
        graphs = Graphs(self.step, self.manifest)
        graphs.first = first_states(self.encoder, self.calibration[:100])
        graphs.feeds = []
        captions(graphs, self.captioner.tokenizer, 1)
        return graphs.feeds

    def made(self, name: str, source: Path, form: Callable[[Path, Path], None] | None) -> Path:
        if form is None:
            return source
        target = self.out / f"{source.stem}-{name.replace(' ', '-')}.onnx"
        if not target.exists():
            with quiet():
                form(source, target)
        return target

    def measure(self, name: str, encoder: Path, step: Path, beam: bool) -> Row:
        if encoder not in self.states:
            self.states[encoder] = first_states(encoder, self.images)
        graphs, words = Graphs(step, self.manifest), self.captioner.tokenizer
        graphs.first = self.states[encoder]
        greedy = captions(graphs, words, 1)
        best = captions(graphs, words, 3) if beam else []
        count = min(200, len(self.images))
        graphs.first = first_states(encoder, self.images[:count], batch=1)
        alone = captions(graphs, words, 1, batch=1)
        equal = sum(a == b for a, b in zip(alone, greedy, strict=False))
        return Row(name, encoder, step, greedy, best, count - equal)

    def times(self, row: Row) -> tuple[float, float, float]:
        """Milliseconds of the encoder for one image, and of a step with one row and with three."""
        image = self.images[:1]
        encoder, graphs = session(row.encoder), Graphs(row.step, self.manifest)
        graphs.first = run(encoder, {"images": image})
        state = graphs.start(torch.zeros(1, 1))
        spent = [seconds(lambda: run(encoder, {"images": image}), 30)]
        for beams in (1, 3):
            rows, tokens = state.expand(beams), torch.full((beams,), 5)
            spent.append(seconds(lambda r=rows, t=tokens: graphs.step(t, r), 100))  # type: ignore[misc]
        return spent[0] * 1e3, spent[1] * 1e3, spent[2] * 1e3

    def report(self, row: Row, base: Row) -> None:
        size = (row.encoder.stat().st_size + row.step.stat().st_size) / 1e6
        cells = [row.name, f"{size:.2f}", *(f"{each:.2f}" for each in self.times(row))]
        for ours, theirs in ((row.greedy, base.greedy), (row.beam, base.beam)):
            if not ours:
                cells.append("")
                continue
            found = paired_bootstrap(self.references, theirs, ours, metrics=["cider_d"])["cider_d"]
            low, high = (100 * end / found.a for end in found.interval)
            change = 100 * found.difference / found.a
            cells.append(f"{found.b:.4f} ({change:+.2f} %, {low:+.2f} to {high:+.2f})")
        same = sum(a == b for a, b in zip(row.greedy, base.greedy, strict=True))
        cells += [f"{same / len(row.greedy):.1%}", str(row.alone)]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captioner", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Flickr8k")
    parser.add_argument("--out", type=Path, default=Path("quantization"), help="files go here")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="other captioners")
    parser.add_argument("--only", nargs="*", help='names of variants, all by default, or "plain"')
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    cal = bench.calibration
    every: dict[str, Any] = {"nodes_to_exclude": []}
    encoders: dict[str, Any] = {
        "all conv and rows": convolutions(cal, "row", **every),
        "all conv 7 bits and rows": convolutions(cal, "row", reduce_range=True, **every),
        "conv and rows": convolutions(cal, "row"),
        "conv uncorrected and rows": convolutions(cal, "row", correct_biases=False),
        "conv and weights": convolutions(cal, "weight"),
        "weights": products("weight"),
    }
    steps: dict[str, Any] = {
        "weights": products("weight"),
        "rows": products("row"),
        "dynamic": dynamic,
        "blocks": blocks,
        "static": lambda source, target: static(bench.recorded())(source, target),
    }
    print(
        "| variant | MB | encoder ms | step ms | step ms, 3 beams | CIDEr-D greedy | beam 3 "
        "| same captions | differing alone |\n|" + "---|" * 9
    )
    base = bench.measure("float32", bench.encoder, bench.step, True)
    bench.report(base, base)
    for place, directory in enumerate(options.trained):
        for row in bench.trained(directory, place):
            bench.report(row, base)
    pairs = [("plain", "conv and rows", "rows")]  # as `export` does
    pairs += [(f"both: {each}, rows", each, "rows") for each in encoders if each != pairs[0][1]]
    pairs += [(f"step: {each}", None, each) for each in steps]
    for name, encoder, step in pairs:
        if options.only and name not in options.only:
            continue
        try:
            first = bench.made(encoder or "", bench.encoder, encoders[encoder] if encoder else None)
            word = bench.made(step or "", bench.step, steps[step] if step else None)
            bench.report(bench.measure(name, first, word, name.startswith(("both", "plain"))), base)
        except Exception as error:  # the others are measured all the same
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} |")


if __name__ == "__main__":
    main()
