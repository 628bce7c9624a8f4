"""Distillation of the decoder's hidden states, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.losses.base import (
    DistillationLoss,
    Projector,
    given,
    not_built,
    require_specs,
    same_pair,
)
from capdistill.losses.distances import cosine_distance, squared_distance
from capdistill.losses.divergence import valid_rows
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

Pairs = list[tuple[int, int]]
_DISTANCES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    "mse+cosine": (squared_distance, cosine_distance),
    "mse": (squared_distance,),
    "cosine": (cosine_distance,),
}


class HiddenKD(DistillationLoss):
    """Match the student's decoder states to the teacher's: squared difference plus 1 - cosine.

    Example:
        >>> spec = dict(feature_dim=None, tokens=None, prefix_tokens=0, grid=None,
        ...             vocabulary=("a",), has_attention=False)
        >>> loss = HiddenKD(layers="uniform")
        >>> loss.build(ModelSpec(hidden_dims=(8, 8), **spec),
        ...            ModelSpec(hidden_dims=(16, 16, 16, 16), **spec))
        >>> loss.pairs  # entries are the layers, then the vector before the vocabulary projection
        [(0, 2), (1, 3)]

    Args:
        layers: Pairs of entries of the student's and the teacher's `hidden`; the term is the mean
            over the pairs. "last": the vectors before the vocabulary projection. "uniform": these,
            and each layer of the student with the teacher's layer at the same relative depth (the
            "skip" of patient distillation). "last_k": these, and the last k layers of both in
            order, with the smaller depth as k. Or {student: teacher}, indices that may be negative.
        project: Map the student's states to the teacher's width with one linear layer per pair.
            This also helps if the widths are equal, because an LSTM's output is bounded and a layer
            norm's is not.
        distance: "mse+cosine", "mse" (as TinyBERT) or "cosine" (as DistilBERT). The squared
            difference of vectors of length 1 of patient distillation is twice the "cosine".

    Raises:
        ConfigError: `layers` or `distance` is none of these, or the loss is built for a second pair
            of models.
        IncompatibleModels: (in `build`) a layer does not exist, or widths differ and
            `project` is False.

    Source:
        Sanh et al. (2019), DistilBERT, for the cosine; Jiao et al. (2020), TinyBERT, section 3,
        for the projected regression and the uniform mapping; Sun et al. (2019), Patient Knowledge
        Distillation for BERT, for the last k layers.
    """

    needs = frozenset({"hidden"})
    per = "token"

    def __init__(
        self,
        layers: str | Mapping[int, int] | Mapping[str, int] = "last",
        project: bool = True,
        distance: Literal["mse+cosine", "mse", "cosine"] = "mse+cosine",
    ) -> None:
        super().__init__()
        self.layers = layers if isinstance(layers, str) else _indices(layers)
        if isinstance(layers, str) and layers not in ("last", "uniform", "last_k"):
            raise ConfigError(_wrong_layers(layers))
        if distance not in tuple(_DISTANCES):  # it may not be hashable
            known = suggest(str(distance), _DISTANCES)
            raise ConfigError(f"HiddenKD: distance={distance!r} is unknown. {known}")
        self.project = project
        self.distance = distance
        self.pairs: Pairs = []
        self.widths: Pairs = []
        self.projectors = nn.ModuleList()

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Pair the layers and create one projection per pair, once.

        Raises:
            ConfigError: the loss was built for other widths.
            IncompatibleModels: a layer does not exist, or widths differ and `project` is False.
        """
        require_specs("HiddenKD", student=student, teacher=teacher)
        pairs = self._pair(student, teacher)
        widths = [
            (student.hidden_dims[mine], teacher.hidden_dims[theirs]) for mine, theirs in pairs
        ]
        if not self.project:
            _require_equal(pairs, widths, student, teacher)
        if not same_pair("HiddenKD", self.widths or None, widths):
            self.projectors.extend(
                Projector(*pair) if self.project else nn.Identity() for pair in widths
            )
        self.pairs, self.widths = pairs, widths

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over valid tokens of the distances, averaged over the pairs of layers."""
        if not self.pairs:
            raise not_built("HiddenKD")
        mine = given("HiddenKD", "hidden", "student", student.hidden)
        theirs = given("HiddenKD", "hidden", "teacher", teacher.hidden)
        terms = []
        for (layer, target), projector in zip(self.pairs, self.projectors, strict=True):
            rows = projector(valid_rows(mine[layer], batch.target_mask))  # (n, H of the teacher)
            goal = valid_rows(theirs[target], batch.target_mask)
            distances = [function(rows, goal).sum() for function in _DISTANCES[self.distance]]
            terms.append(torch.stack(distances).sum())
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"layers={self.layers!r}, project={self.project}, distance={self.distance!r}"

    def _pair(self, student: ModelSpec, teacher: ModelSpec) -> Pairs:
        mine, theirs = _depth(student, "student"), _depth(teacher, "teacher")
        if isinstance(self.layers, str):
            if self.layers == "uniform":
                return uniform_pairs(mine, theirs)
            count = 1 if self.layers == "last" else min(mine, theirs)
            return [(mine - i, theirs - i) for i in range(count, 0, -1)]
        return [
            (_place(s, student, "student"), _place(t, teacher, "teacher"))
            for s, t in self.layers.items()
        ]


def uniform_pairs(student: int, teacher: int) -> Pairs:
    """Pair entries of `hidden` at the same relative depth; the last entry goes with the last.

    Layer i of n goes with layer i * m / n of m, rounded to the nearest, at least the first.

    Example:
        >>> uniform_pairs(3, 7)  # 2 layers against 6, then the vectors before the vocabulary
        [(0, 2), (1, 5), (2, 6)]
        >>> uniform_pairs(4, 2)
        [(0, 0), (1, 0), (2, 0), (3, 1)]

    Args:
        student: Number of entries, layers + 1.
        teacher: Number of entries, layers + 1.

    Source:
        Jiao et al. (2020), TinyBERT, section 3.1.
    """
    layers, targets = student - 1, teacher - 1
    if targets == 0:
        return [(layers, 0)]
    at = [max(1, (2 * i * targets + layers) // (2 * layers)) for i in range(1, layers + 1)]
    return [*((i, target - 1) for i, target in enumerate(at)), (layers, targets)]


def _indices(layers: object) -> dict[int, int]:
    """An explicit mapping with int keys: JSON has only string keys."""
    if not isinstance(layers, Mapping) or not layers:
        raise ConfigError(_wrong_layers(layers))
    try:
        return {int(mine): int(theirs) for mine, theirs in layers.items()}
    except (TypeError, ValueError):
        raise ConfigError(_wrong_layers(layers)) from None


def _wrong_layers(layers: object) -> str:
    return (
        f"HiddenKD: layers={layers!r} is invalid. "
        'Use "last", "uniform", "last_k", or {student layer: teacher layer} such as {0: 2, -1: -1}.'
    )


def _depth(spec: ModelSpec, role: str) -> int:
    if not spec.hidden_dims:
        raise IncompatibleModels(
            f"HiddenKD: the {role} '{spec.name}' returns no hidden states to compare.\n"
            "Return them in CaptionerOutput.hidden, (B, T - 1, H) each, or remove this loss."
        )
    return len(spec.hidden_dims)


def _place(index: int, spec: ModelSpec, role: str) -> int:
    size = len(spec.hidden_dims)
    if not -size <= index < size:
        raise IncompatibleModels(
            f"HiddenKD: the {role} '{spec.name}' has no layer {index}; its {size} entries (layers, "
            f"then the vector before the vocabulary) are 0 to {size - 1}, or -{size} to -1."
        )
    return index % size


def _require_equal(pairs: Pairs, widths: Pairs, student: ModelSpec, teacher: ModelSpec) -> None:
    for (layer, target), (mine, theirs) in zip(pairs, widths, strict=True):
        if mine != theirs:
            raise IncompatibleModels(
                f"HiddenKD: layer {layer} of '{student.name}' has width {mine} but layer {target} "
                f"of '{teacher.name}' has {theirs}, and project=False compares them as they are.\n"
                "Use HiddenKD(project=True), or pair layers of equal width."
            )
