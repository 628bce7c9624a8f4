"""Whether what a foreign model returned has our layout; `wrap` checks every output here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from capdistill.errors import IncompatibleModels
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

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
