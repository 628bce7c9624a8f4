"""`export`: a captioner as a directory of ONNX graphs."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capdistill import __version__
from capdistill.captioner import Captioner, require_loaded
from capdistill.deploy import manifest as files
from capdistill.deploy.executorch import require_executorch, write_programs
from capdistill.deploy.graphs import (
    Entry,
    Traced,
    random_images,
    require_close,
    tensors_of,
    trace,
)
from capdistill.deploy.greedy import require_plain, write_greedy
from capdistill.deploy.manifest import FileEntry, Manifest
from capdistill.deploy.quantize import Calibration, quantize_graphs
from capdistill.deploy.writing import OPSET, Graph, announced, write_graph
from capdistill.errors import ConfigError, MissingExtra, require_bool
from capdistill.fake_quantization import release
from capdistill.files import user_path, write_text
from capdistill.generation.config import GenerationConfig, GenerationSpec, resolve
from capdistill.generation.decode import generate
from capdistill.progress import report
from capdistill.runtime import generator
from capdistill.saving import is_saved, require_no_other


def export(
    captioner: Captioner,
    directory: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    calibration: Any = None,
    generation: GenerationConfig | Mapping[str, Any] | None = None,
    greedy: bool = False,
    executorch: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write a captioner as ONNX graphs, which run without torch.

    The directory holds encoder.onnx, step.onnx (one word, for greedy decoding and beam search),
    the tokenizer, the options of generation and manifest.json. Each graph is run and compared with
    torch before the directory is written; a process that is killed leaves what was there before,
    or no manifest. The captioner is not changed.

    Example:
        >>> import capdistill as cd, tempfile
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> with tempfile.TemporaryDirectory() as folder:    # doctest: +SKIP
        ...     cd.deploy.export(student, folder).step_inputs
        ('tokens', 'position', 'image_keys', 'image_values', 'image_mean', 'state_h', 'state_c')

    Args:
        captioner: A `Captioner`; any encoder and decoder that torch.onnx can export.
        directory: Created if it does not exist; an earlier export in it is replaced.
        quantize: "int8" writes 8-bit graphs, a quarter of the size: see `deploy.quantize`.
        calibration: Images for quantize="int8", like those that will be captioned; 128 are used.
            A folder, a data set, its splits (the training images), or a list of images. A captioner
            that was trained with quantize="int8" needs none: it is rounded as in training then.
        generation: The options that the exported captioner uses by default.
        greedy: Also write greedy.onnx, which is greedy decoding in one graph, from images to ids,
            and to `finite`, false for an image without a caption. It holds all weights again.
        executorch: Also write encoder.pte and step.pte, the same two as programs of ExecuTorch, in
            float32 for its backend XNNPACK. They read one image, in `beam_size` rows, and as many
            words as `max_length` of `generation` allows.
        progress: Report each graph on standard error. An encoder takes up to a minute.

    Raises:
        ConfigError: it is no `Captioner`, a part cannot be exported (the message names it), or the
            directory cannot be written.
        MissingExtra: the extra `onnx` is not installed, or `executorch` where it is asked for.
    """
    _require_libraries()
    require_bool("export: progress", progress)
    _require_options(quantize, calibration, greedy, executorch)
    _require_captioner(captioner)
    calibration = None if quantize is None else Calibration.of(captioner, calibration)
    target = user_path(directory)
    require_no_other(target)
    spec = GenerationSpec.of(resolve(generation, {}), captioner.tokenizer)
    if greedy:
        require_plain(spec)
    plain, say = _plain_copy(captioner), report if progress else _silent

    def fill(folder: Path) -> Manifest:
        entries = _write_float32(plain, folder, say)
        if greedy:
            _write_greedy(plain, spec, folder)
        if executorch:
            write_programs(plain, spec, folder, say)
        if quantize:
            say("Quantizing to 8 bits ...")
            quantize_graphs(folder / files.ENCODER, folder / files.STEP, calibration)
            if greedy:
                _join(plain, spec, folder)
        return _describe(plain, entries, spec, folder, quantize or "float32")

    return files.write_directory(target, fill)


def _silent(text: str) -> None:
    pass


def _require_libraries() -> None:
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtra(
                f"export needs {name} ({error}). Install it: pip install 'capdistill[onnx]'."
            ) from error


def _require_options(quantize: object, calibration: Any, greedy: bool, executorch: bool) -> None:
    """Refuse values of these that are unknown, or do not go together."""
    require_bool("export: greedy", greedy)
    require_bool("export: executorch", executorch)
    if quantize not in (None, "int8"):
        raise ConfigError(f"export: quantize={quantize!r} was given; use None or 'int8'.")
    if quantize is None and calibration is not None:
        raise ConfigError("export: calibration belongs to quantize='int8'; give that, too.")
    if executorch:
        if quantize:
            raise ConfigError(
                "export: executorch=True writes programs in float32. Leave quantize out, and "
                "export in 8 bits to another directory."
            )
        require_executorch()


def _require_captioner(captioner: object) -> None:
    if not isinstance(captioner, Captioner):
        raise ConfigError(
            f"export: {type(captioner).__name__} cannot be exported; only a Captioner, which is "
            "one encoder with one decoder, can. An ensemble and a foreign teacher (Hugging Face, "
            "cached, wrapped) run code of their own: distil it into a Captioner and export that."
        )
    require_loaded(captioner)
    if not is_saved(captioner.tokenizer):
        raise ConfigError(
            f"export: the tokenizer {type(captioner.tokenizer).__name__} cannot be written to a "
            "file. Use a tokenizer of capdistill.tokenizers, or a WordTokenizer."
        )


def _plain_copy(captioner: Captioner) -> Captioner:
    """On the CPU in float32: graphs are portable, and the captioner stays as it is."""
    plain = copy.deepcopy(captioner).to("cpu", torch.float32).requires_grad_(False).eval()
    release(plain)
    return plain


def _write_float32(
    captioner: Captioner, folder: Path, say: Callable[[str], None]
) -> tuple[Entry, ...]:
    """Both graphs, compared with torch; returns what the decoder keeps."""
    traced = trace(captioner)
    _write_graphs(traced, folder, say)
    _compare(captioner, traced.entries, folder)
    return traced.entries


def _write_graphs(traced: Traced, folder: Path, say: Callable[[str], None]) -> None:
    entries, side = traced.entries, tuple(traced.images.shape[1:])
    encoder = Graph(
        f"encoder {type(traced.encoder.encoder).__name__}",
        traced.encoder,
        (traced.images,),
        {"images": ("images", *side)},
        {each.input: ("images", *each.axes(0)) for each in entries},
    )
    inputs = {each.input: (*each.leading, *each.axes("slots")) for each in entries}
    changed = {
        f"next_{each.input}": (*each.leading, *each.axes("next_slots"))
        for each in entries
        if each.kind != "image"
    }
    step = Graph(
        f"decoder {type(traced.step.decoder).__name__}",
        traced.step,
        (traced.tokens, torch.tensor(2), traced.state),
        {"tokens": ("images", "beams"), "position": (), **inputs},
        {"logits": ("images", "beams", traced.vocabulary), **changed},
    )
    for graph, name in ((encoder, files.ENCODER), (step, files.STEP)):
        with announced(folder / name, say):
            write_graph(graph, folder / name)


@torch.no_grad()
def _compare(captioner: Captioner, entries: Sequence[Entry], folder: Path) -> None:
    """Run both graphs as torch does, for one image and for three with two beams each.

    Raises:
        ConfigError: their outputs differ from torch's.
    """
    encoder, step = (_session(folder / name) for name in (files.ENCODER, files.STEP))
    changing = [each for each in entries if each.kind != "image"]
    random = generator(1, "export")
    words = len(captioner.tokenizer.vocabulary)
    for count, beams in ((1, 1), (3, 2)):
        images = random_images(captioner, count, random)
        state = captioner.decoder.start(captioner.encode(images))
        feeds = _run(encoder, {"images": images})
        for entry in entries:
            if not entry.late:
                value = tensors_of(state)[entry.kind, entry.name]
                require_close(
                    captioner.encoder, files.ENCODER, entry.input, value, feeds[entry.input]
                )
        for entry in entries:
            if entry.kind == "row":
                feeds[entry.input] = feeds[entry.input][:, None].repeat_interleave(beams, 1)
        state = state.expand(beams)
        for position in range(3):
            tokens = torch.randint(0, words, (count, beams), generator=random)
            logits, state = captioner.decoder.step(tokens.flatten(), state)
            out = _run(step, {"tokens": tokens, "position": torch.tensor(position), **feeds})
            given = out["logits"].flatten(0, 1)
            require_close(captioner.decoder, files.STEP, "logits", logits, given)
            feeds.update({each.input: out[f"next_{each.input}"] for each in changing})


@torch.no_grad()
def _write_greedy(captioner: Captioner, spec: GenerationSpec, folder: Path) -> None:
    """With its words compared with torch's."""
    path = _join(captioner, spec, folder)
    images = random_images(captioner, 3, generator(2, "export"))
    ids = _run(_session(path), {"images": images})["ids"]
    plain = replace(spec, config=GenerationConfig())
    expected = [each.tokens for each in generate(*captioner.decoding(images), plain)]
    given = [_words(row, spec.end_id) for row in ids.tolist()]
    if expected != given:
        raise ConfigError(
            f"export: {files.GREEDY} gives {given[0]} where torch gives {expected[0]}. Export "
            "without greedy=True."
        )


def _join(captioner: Captioner, spec: GenerationSpec, folder: Path) -> Path:
    path, pad = folder / files.GREEDY, captioner.tokenizer.pad_id
    write_greedy(folder / files.ENCODER, folder / files.STEP, path, spec, pad)
    return path


def _words(row: list[int], end_id: int) -> tuple[int, ...]:
    return tuple(row[: row.index(end_id)] if end_id in row else row)


def _session(path: Path) -> Any:
    onnxruntime: Any = importlib.import_module("onnxruntime")

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _options(spec: GenerationSpec, captioner: Captioner) -> dict[str, Any]:
    """The content of generation.json: the options, and what they mean in token ids."""
    ids = asdict(spec)
    ids["config"] = spec.config.model_dump(mode="json")
    return {**ids, "pad_id": captioner.tokenizer.pad_id}


def _describe(
    captioner: Captioner,
    entries: Sequence[Entry],
    spec: GenerationSpec,
    folder: Path,
    precision: str,
) -> Manifest:
    """Write what is needed beside the graphs; returns the manifest of all files."""
    captioner.tokenizer.save(folder / files.TOKENIZER)  # type: ignore[attr-defined]
    write_text(folder / files.GENERATION, json.dumps(_options(spec, captioner), indent=2) + "\n")
    names = ["torch", "onnx", "onnxscript"]
    if (folder / files.STEP_PROGRAM).exists():
        names.append("executorch")
    libraries = {name: importlib.metadata.version(name) for name in names}
    return Manifest(
        name=captioner.name,
        precision=precision,
        image_size=captioner.image_size,
        mean=tuple(captioner.encoder.mean),
        std=tuple(captioner.encoder.std),
        image_inputs=tuple(each.input for each in entries if each.kind != "row"),
        state=tuple(each.input for each in entries if each.kind == "row"),
        vocabulary=len(captioner.tokenizer.vocabulary),
        max_length=spec.max_length,
        files={path.name: FileEntry.measured(path) for path in folder.iterdir()},
        versions={"capdistill": __version__, **libraries, "opset": OPSET},
    )
