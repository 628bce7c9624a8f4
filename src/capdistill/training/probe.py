"""One tiny batch through a model before anything is trained, and what must come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import IncompatibleModels
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.tokenizer import pad_batch


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


def require_output(model: Any, output: CaptionerOutput, batch: Batch, need: frozenset[str]) -> None:
    """Compare the shapes a model gives with those it promises.

    Raises:
        IncompatibleModels: they differ; names the tensor, what came and what was expected.
    """
    spec = model.spec(batch)
    rows, words = batch.targets.shape
    expected: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        "logits": (output.logits, (rows, words, len(spec.vocabulary)))
    }
    if output.features is not None:
        wanted = (batch.num_images, spec.tokens, spec.feature_dim)
        expected["features"] = (output.features, wanted)
    if "attention" in need and spec.has_attention:
        expected["attention"] = (output.attention, (rows, words, spec.tokens))
    if "hidden" in need:
        hidden = output.hidden or (None,) * len(spec.hidden_dims)
        for i, (vector, width) in enumerate(zip(hidden, spec.hidden_dims, strict=False)):
            expected[f"hidden[{i}]"] = (vector, (rows, words, width))
    for name, (tensor, shape) in expected.items():
        _require_shape(spec.name, name, tensor, shape)


def _require_shape(
    model: str, name: str, tensor: Tensor | None, shape: tuple[int | None, ...]
) -> None:
    given = None if tensor is None else tuple(tensor.shape)
    fits = given is not None and len(given) == len(shape)
    if not fits or any(w is not None and g != w for g, w in zip(given or (), shape, strict=False)):
        raise IncompatibleModels(
            f"'{model}' gives {name} of shape {given}, but a batch of 2 images with 2 captions "
            f"needs {shape}. Correct the model's forward, or its specification."
        )
