"""One batch through the models before anything is trained, and what must come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner, evaluating
from capdistill.errors import IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.losses.token import first_difference
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.tokenizer import pad_batch

Shape = tuple[int | None, ...]


def probe_batch(captioner: Captioner, models: list[nn.Module]) -> Batch:
    """Two grey images with two captions each, of two lengths, at the size the models share."""
    from capdistill.training.run import image_size

    size = image_size(models)
    tokenizer = captioner.tokenizer
    words = [tokenizer.start_id, *[len(tokenizer.vocabulary) - 1] * 2, tokenizer.end_id]
    ids, mask = pad_batch([words, words[1:], words[1:], words], tokenizer.pad_id)
    return Batch(
        images=torch.full((2, 3, size, size), 127, dtype=torch.uint8),
        input_ids=ids,
        mask=mask,
        captions=("",) * 4,
        image_ids=("0", "1"),
    )


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside, whatever the caller did; every flag comes back."""
    with evaluating(model), torch.no_grad():
        yield


def ask(model: Any, batch: Batch, need: frozenset[str]) -> CaptionerOutput:
    """A model's output for a batch, its shapes checked, on the CPU; nothing is changed by it.

    Raises:
        IncompatibleModels: the output is not what the model's specification promises.
    """
    device = _device_of(model)
    batch = batch.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), asking(model):
        output: CaptionerOutput = model(batch, need=need)
    require_output(model, output, batch, need)
    return _moved(output, torch.device("cpu"))


def require_output(model: Any, output: CaptionerOutput, batch: Batch, need: frozenset[str]) -> None:
    """Compare the shapes a model gives with those it promises.

    Raises:
        IncompatibleModels: they differ; names the tensor, what came and what was expected.
    """
    spec = model.spec(batch)
    rows, words = batch.targets.shape
    expected: dict[str, tuple[Tensor | None, Shape]] = {
        "logits": (output.logits, (rows, words, len(spec.vocabulary)))
    }
    if output.features is not None:
        wanted = (batch.num_images, spec.tokens, spec.feature_dim)
        expected["features"] = (output.features, wanted)
    if "attention" in need and spec.has_attention:
        expected["attention"] = (output.attention, (rows, words, spec.tokens))
    if "hidden" in need:
        widths: list[int | None] = list(spec.hidden_dims)
        for i, (vector, width) in enumerate(zip_longest(output.hidden or (), widths)):
            promised: Shape = (rows, words, width) if i < len(widths) else ()
            expected[f"hidden[{i}]"] = (vector, promised)
    for name, (tensor, shape) in expected.items():
        _require_shape(spec.name, name, tensor, shape, batch)


def _require_shape(
    model: str, name: str, tensor: Tensor | None, shape: Shape, batch: Batch
) -> None:
    given = None if tensor is None else tuple(tensor.shape)
    fits = given is not None and len(given) == len(shape)
    if fits and all(w in (None, g) for g, w in zip(given or (), shape, strict=True)):
        return
    shown = ", ".join("any" if size is None else str(size) for size in shape)
    wanted = f"({shown})" if shape else "none, by its specification"
    raise IncompatibleModels(
        f"'{model}' gives {name} of shape {given}, but a batch of {batch.num_images} images with "
        f"{batch.captions_per_image} captions each needs {wanted}. Correct the model's forward, "
        "or its specification."
    )


def require_one_vocabulary(student: ModelSpec, teacher: ModelSpec) -> None:
    """The teacher reads the student's ids: they must mean the same words.

    Raises:
        IncompatibleModels: names the first entry that differs.
    """
    place = first_difference(student.vocabulary, teacher.vocabulary)
    if place is None:
        return
    mine, theirs = (
        repr(spec.vocabulary[place]) if place < len(spec.vocabulary) else "no entry"
        for spec in (student, teacher)
    )
    raise IncompatibleModels(
        f"The vocabularies differ at entry {place}: '{student.name}' has {mine} "
        f"({len(student.vocabulary)} entries), '{teacher.name}' has {theirs} "
        f"({len(teacher.vocabulary)} entries), so that the teacher would read other words than "
        "were written. Build both models with one tokenizer, or compare features alone: "
        'losses={"feature": {"name": "feature", "match": "pooled"}}.'
    )


def require_scalars(
    losses: Mapping[str, DistillationLoss],
    student: CaptionerOutput,
    teacher: CaptionerOutput,
    batch: Batch,
) -> None:
    """Every loss gives one number for these outputs; nothing is changed by it.

    Raises:
        IncompatibleModels: it gives something else.
    """
    for name, loss in losses.items():
        device = _device_of(loss)
        with torch.random.fork_rng(devices=[]), asking(loss):
            value = loss(_moved(student, device), _moved(teacher, device), batch.to(device))
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise IncompatibleModels(
                f"The loss '{name}' ({type(loss).__name__}) gives {given}, but must give one "
                "number: the sum over tokens or images, a floating-point tensor of shape ()."
            )


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _moved(output: CaptionerOutput, device: torch.device) -> CaptionerOutput:
    return replace(
        output,
        logits=output.logits.to(device),
        hidden=None if output.hidden is None else tuple(h.to(device) for h in output.hidden),
        features=None if output.features is None else output.features.to(device),
        attention=None if output.attention is None else output.attention.to(device),
        mask=output.mask.to(device),
    )
