"""One batch through the models before anything is trained, and what must come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.losses.token import first_difference
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import asking
from capdistill.tokenizer import pad_batch

Shape = tuple[int | None, ...]


def probe_batch(captioner: Captioner, models: list[nn.Module]) -> Batch:
    """Two grey images with two captions each, of two lengths, at the size the models share."""
    pass

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


_MEANING = {
    "logits": "captions, target positions (batch.targets), entries of tokenizer.vocabulary",
    "mask": "captions, target positions; return batch.target_mask",
    "features": "images (not captions), visual tokens, width",
    "attention": "captions, target positions, visual tokens",
    "hidden": "captions, target positions, width",
}


def check_layout(
    name: str,
    output: object,
    batch: Batch,
    need: frozenset[str],
    vocabulary: int,
    spec: ModelSpec | None = None,
) -> None:
    """Every shape of an output against the batch, the vocabulary and, where known, the spec.

    Example:
        >>> import torch
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 5, 2]]), mask=torch.ones(1, 3, dtype=torch.bool),
        ...     captions=("dog",), image_ids=("a.jpg",),
        ... )
        >>> output = CaptionerOutput(torch.zeros(1, 2, 6), None, None, None, batch.target_mask)
        >>> check_layout("theirs", output, batch, frozenset(), vocabulary=6)

    Args:
        name: How messages call the model.
        output: What came back; anything but a `CaptionerOutput` is refused.
        batch: What went in.
        need: Fields that must not be None.
        vocabulary: V.
        spec: Number of tokens and widths that were declared or probed.

    Raises:
        IncompatibleModels: names what was given, the shape that is wanted and what it means.
    """
    if not isinstance(output, CaptionerOutput):
        raise IncompatibleModels(
            f"{name}: adapt returned {type(output).__name__}, but must return a CaptionerOutput."
        )
    for what in sorted(need):
        if getattr(output, what) is None:
            raise IncompatibleModels(
                f"{name}: {what} needed, but adapt returned None.\n"
                f"Return CaptionerOutput(..., {what}=...), or leave out the loss that needs it."
            )
    rows, length = batch.targets.shape
    _require(name, "logits", output.logits, (rows, length, vocabulary))
    _require(name, "mask", output.mask, (rows, length))
    tokens, width = (spec.tokens, spec.feature_dim) if spec else (None, None)
    if output.features is not None:
        _require(name, "features", output.features, (batch.num_images, tokens, width))
        tokens = output.features.shape[1]
    if output.attention is not None:
        _require(name, "attention", output.attention, (rows, length, tokens))
    if output.hidden is not None:
        widths = spec.hidden_dims if spec else (None,) * len(output.hidden)
        _check_hidden(name, output.hidden, (rows, length), widths)


def check_vocabulary(name: str, spec: ModelSpec, vocabulary: Sequence[str]) -> None:
    """A declared spec must list the tokenizer's entries.

    Raises:
        IncompatibleModels: it does not.
    """
    if list(spec.vocabulary) != list(vocabulary):
        raise IncompatibleModels(
            f"{name}: the declared spec lists {len(spec.vocabulary)} vocabulary entries that are "
            f"not the tokenizer's {len(vocabulary)}. Give ModelSpec tokenizer.vocabulary."
        )


def _check_hidden(
    name: str,
    hidden: Sequence[Tensor],
    start: tuple[int, int],
    widths: Sequence[int | None],
) -> None:
    if len(hidden) != len(widths):
        raise IncompatibleModels(
            f"{name}: adapt returned {len(hidden)} hidden states, but the spec has {len(widths)}. "
            "Return one a layer, then what the vocabulary projection sees."
        )
    for place, (layer, width) in enumerate(zip(hidden, widths, strict=True)):
        _require(name, f"hidden[{place}]", layer, (*start, width))


def _require(name: str, what: str, value: Tensor, wanted: tuple[int | None, ...]) -> None:
    """None in `wanted` stands for any size."""
    found = tuple(value.shape)
    if len(found) == len(wanted) and all(
        size in (None, here) for size, here in zip(wanted, found, strict=True)
    ):
        return
    shown = ", ".join("any" if size is None else str(size) for size in wanted)
    raise IncompatibleModels(
        f"{name}: adapt returned {what} of shape {found}, but this batch needs ({shown}): "
        f"{_MEANING[what.split('[')[0]]}."
    )


def size_of(captioner: Any) -> int:
    """Side in pixels of the images it reads; 224 where neither it nor its encoder says."""
    size: Any = getattr(captioner, "image_size", None)
    if size is None:
        size = getattr(getattr(captioner, "encoder", None), "image_size", 224)
    return int(size)


def image_size(models: list[Any]) -> int:
    """The larger image size of the models: each downsizes for itself."""
    sizes = [getattr(model, "image_size", None) for model in models]
    return max([int(size) for size in sizes if size] or [224])
