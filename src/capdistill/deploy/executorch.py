"""A captioner as two programs of ExecuTorch (.pte), for one image, run by its backend XNNPACK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.deploy import manifest as files
from capdistill.deploy.graphs import (
    Entry,
    FirstState,
    Step,
    Traced,
    random_images,
    require_close,
    tensors_of,
    trace,
)
from capdistill.deploy.writing import announced, cause_of, quiet
from capdistill.errors import ConfigError, MissingExtra
from capdistill.generation.config import GenerationSpec
from capdistill.runtime import generator

_EXIR, _RUNTIME = "executorch.exir", "executorch.runtime"
_FOLDING = "executorch.exir.passes.constant_prop_pass"
_XNNPACK = "executorch.backends.xnnpack.partition.xnnpack_partitioner"


def require_executorch() -> None:
    """Import what `write_programs` needs.

    Raises:
        MissingExtra: ExecuTorch is not installed, or not for this release of torch.
    """
    for name in (_EXIR, _FOLDING, _XNNPACK, _RUNTIME):
        try:
            with quiet():
                import_module(name)
        except (ImportError, OSError, AttributeError) as error:
            raise MissingExtra(
                f"export: executorch=True needs {name} ({type(error).__name__}: {error}). Install "
                "it: pip install 'capdistill[executorch]'. A release of ExecuTorch is built for "
                f"one of torch, here {torch.__version__}."
            ) from error


def write_programs(
    captioner: Captioner, spec: GenerationSpec, folder: Path, say: Callable[[str], None]
) -> None:
    """Write encoder.pte and step.pte, and compare both with torch.

    The encoder returns the tensors that the step reads behind the words and their position, in the
    same order. The step returns the logits, and those of its tensors that change, which are the
    last ones.

    Args:
        captioner: On the CPU, in float32 and in evaluation mode.
        spec: Sets the number of rows (`beam_size`) and of words (`max_length`).
        folder: Where the files go.
        say: Reports progress.

    Raises:
        ConfigError: ExecuTorch cannot take a part, or computes something else than torch.
    """
    beams = spec.config.beam_size
    traced = trace(captioner, images=1, beams=beams)
    encoder = Program(
        f"encoder {type(captioner.encoder).__name__}",
        _FirstRows(traced.encoder, beams),
        (traced.images,),
    )
    slots = torch.export.Dim.DYNAMIC(min=0, max=beams * spec.max_length)
    step = Program(
        f"decoder {type(captioner.decoder).__name__}",
        _InOrder(traced.step),
        (traced.tokens, torch.tensor(2), [each.contiguous() for each in traced.state]),
        ({}, {}, [_growing(entry, slots) for entry in traced.entries]),
    )
    for program, name in ((encoder, files.ENCODER_PROGRAM), (step, files.STEP_PROGRAM)):
        with announced(folder / name, say):
            (folder / name).write_bytes(lowered(program))
    _compare(captioner, traced, folder, spec.max_length)


@dataclass(frozen=True)
class Program:
    """A module with what ExecuTorch must know of it.

    Args:
        part: What the module is made of, for messages: "decoder LSTMDecoder".
        module: In evaluation mode.
        example: Arguments of its `forward`, contiguous.
        dynamic: The axes that grow, as torch.export wants them; None where all are fixed.
    """

    part: str
    module: nn.Module
    example: tuple[Any, ...]
    dynamic: Any = None


class _FirstRows(nn.Module):
    """(1, 3, S, S) images to the tensors that the first step reads, (1, k, ...) for a row's."""

    def __init__(self, first: FirstState, beams: int) -> None:
        super().__init__()
        self.first, self.beams = first, beams

    def forward(self, images: Tensor) -> list[Tensor]:
        pairs = zip(self.first.entries, self.first(images), strict=True)
        return [
            (value[:, None].repeat_interleave(self.beams, 1) if e.kind == "row" else value).clone(
                memory_format=torch.contiguous_format
            )
            for e, value in pairs
        ]


class _InOrder(nn.Module):
    """A step whose outputs are contiguous, as its inputs must be."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, tokens: Tensor, position: Tensor, state: list[Tensor]) -> list[Tensor]:
        values = self.step(tokens, position, state)
        return [value.clone(memory_format=torch.contiguous_format) for value in values]


def _growing(entry: Entry, slots: Any) -> dict[int, Any]:
    return {len(entry.leading) + axis: slots for axis in entry.growing}


def lowered(program: Program) -> bytes:
    """The content of a .pte file.

    Raises:
        ConfigError: ExecuTorch cannot take the module.
    """
    exir: Any = import_module(_EXIR)
    fold: Any = import_module(_FOLDING).constant_prop_pass
    partitioner: Any = import_module(_XNNPACK).XnnpackPartitioner()
    try:
        with quiet(), torch.enable_grad():  # then a cache is extended, not written in place
            exported = torch.export.export(
                program.module, program.example, dynamic_shapes=program.dynamic, strict=False
            )
            fixed = fold(exported)  # such as a resized position embedding: its operator is missing
            edge = exir.to_edge_transform_and_lower(fixed, partitioner=[partitioner])
            return bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise ConfigError(
            f"export: ExecuTorch cannot take the {program.part} ({cause_of(error)}). Its forward "
            "pass must be traceable by torch.export: no Python branch on values of tensors, and "
            "only operators that ExecuTorch has. Export without executorch=True."
        ) from error


@torch.no_grad()
def _compare(captioner: Captioner, traced: Traced, folder: Path, words: int) -> None:
    """Run both programs as torch does, for as many words as they take."""
    encoder, step = (_method(folder / n) for n in (files.ENCODER_PROGRAM, files.STEP_PROGRAM))
    random, beams = generator(1, "export"), traced.tokens.shape[1]
    images = random_images(captioner, 1, random)
    state = captioner.decoder.start(captioner.encode(images)).expand(beams)
    values = list(encoder([images]))
    for entry, given in zip(traced.entries, values, strict=True):
        if not entry.late:
            expected = tensors_of(state)[entry.kind, entry.name].view(given.shape)
            part = captioner.encoder
            require_close(part, files.ENCODER_PROGRAM, entry.input, expected, given)
    for position in range(words):
        tokens = torch.randint(0, traced.vocabulary, (1, beams), generator=random)
        logits, state = captioner.decoder.step(tokens.flatten(), state)
        given, *changed = step([tokens, torch.tensor(position), *values])
        require_close(captioner.decoder, files.STEP_PROGRAM, "logits", logits, given[0])
        values[len(values) - len(changed) :] = changed


def _method(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    runtime: Any = import_module(_RUNTIME).Runtime.get()
    execute: Any = runtime.load_program(path).load_method("forward").execute
    return execute  # type: ignore[no-any-return]
