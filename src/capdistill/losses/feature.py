"""Distillation of visual features: one vector per image, or one per grid cell."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.losses.base import (
    DistillationLoss,
    Projector,
    given,
    not_built,
    require_specs,
    same_pair,
)
from capdistill.losses.distances import normalised_distance
from capdistill.losses.divergence import full
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

logger = logging.getLogger(__name__)

MATCHES = ("attention", "auto", "grid", "pooled")


class FeatureKD(DistillationLoss):
    """Match the student's visual features to the teacher's, projected and layer-normalised.

    Example:
        >>> spec = dict(tokens=5, prefix_tokens=1, grid=(2, 2), hidden_dims=(), vocabulary=("a",))
        >>> loss = FeatureKD(match="pooled")
        >>> loss.build(ModelSpec(feature_dim=8, has_attention=True, **spec),
        ...            ModelSpec(feature_dim=16, has_attention=True, **spec))
        >>> loss.projector, sorted(loss.needs), loss.per
        (Projector(in_features=8, out_features=16, bias=True), ['features'], 'image')

    Args:
        match: The vectors to compare, by the squared difference averaged over the teacher's width.
            "pooled": the mean over all tokens (CLS included), one vector per image. "attention":
            tokens weighted by each model's own decoder attention, averaged over the valid tokens of
            all captions of the image, one vector per image; the weights carry no gradient, and an
            image without a valid token adds nothing. "auto": the sum of both if both models return
            attention, otherwise "pooled" (logged once). "grid": one vector per cell, averaged over
            the cells; prefix tokens are dropped and both grids are pooled to the smaller height and
            width.

    Raises:
        ConfigError: `match` is none of these, or the loss is built for a second pair of models.
        IncompatibleModels: (in `build`) a model does not return the features, attention or grid
            that `match` needs.

    Source:
        Romero et al. (2015), FitNets, for the projected regression; Ba, Kiros, Hinton (2016) for
        the normalisation, which makes widths and scales comparable.
    """

    per = "image"

    def __init__(self, match: str = "auto") -> None:
        super().__init__()
        if match not in MATCHES:
            raise ConfigError(f"FeatureKD: match={match!r} is unknown. {suggest(match, MATCHES)}")
        self.match = match
        self.projector: Projector | None = None
        self.specs: dict[str, ModelSpec] = {}
        self._compare(("pooled", "attention") if match == "auto" else (match,))

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Choose the vectors to compare, and create the projection once.

        Raises:
            ConfigError: the loss was built for other widths.
            IncompatibleModels: a model lacks what `match` needs.
        """
        specs = {"student": student, "teacher": teacher}
        widths = (
            feature_width("FeatureKD", student, "student"),
            feature_width("FeatureKD", teacher, "teacher"),
        )
        self._compare(self._possible(specs))
        built = self.projector and (self.projector.in_features, self.projector.out_features)
        if not same_pair("FeatureKD", built, widths):
            self.projector = Projector(*widths)
        self.specs = specs

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over images of the mean over the width, added over the compared vectors."""
        if self.projector is None:
            raise not_built("FeatureKD")
        outputs = {"student": student, "teacher": teacher}
        distances = []
        for view in self.views:
            mine, theirs = (self._see(view, out, role, batch) for role, out in outputs.items())
            distance = normalised_distance(self.projector(mine), theirs).mean(1)  # (I,)
            if view == "attention":
                distance = distance.masked_fill(~_has_tokens(batch), 0)
            distances.append(distance.sum())
        return torch.stack(distances).sum()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"match={self.match!r}"

    def _compare(self, views: tuple[str, ...]) -> None:
        self.views = views
        extra = {"attention"} if "attention" in views else set()
        self.needs = frozenset({"features", *extra})

    def _possible(self, specs: dict[str, ModelSpec]) -> tuple[str, ...]:
        """The views that `match` selects for these models."""
        blind = [role for role, spec in specs.items() if not spec.has_attention]
        if self.match == "grid":
            for role, spec in specs.items():
                require_grid("FeatureKD", spec, role, spec.tokens)
        if self.match == "attention" and blind:
            raise IncompatibleModels(
                f"FeatureKD: the {blind[0]} '{specs[blind[0]].name}' returns no attention over "
                "visual tokens but attention matching was asked for.\n"
                'Use FeatureKD(match="pooled"), or a decoder with attention.'
            )
        if self.match != "auto":
            return (self.match,)
        if not blind:
            return ("pooled", "attention")
        if self.projector is None:  # logged once
            names = " and ".join(f"the {role} '{specs[role].name}'" for role in blind)
            logger.warning('FeatureKD(match="auto"): no attention in %s; pooled alone.', names)
        return ("pooled",)

    def _see(self, view: str, output: CaptionerOutput, role: str, batch: Batch) -> Tensor:
        """(I, cells, D) the compared vectors of one model, in full precision."""
        features = full(given("FeatureKD", "features", role, output.features))  # (I, N, D)
        if view == "pooled":
            return features.mean(1, keepdim=True)
        if view == "attention":
            attention = given("FeatureKD", "attention", role, output.attention)  # (B, T, N)
            return (_caption_weights(attention, batch) * features).sum(1, keepdim=True)
        size = smaller_grid(*self.specs.values())
        return grid_cells("FeatureKD", features, self.specs[role], role, size)


def _caption_weights(attention: Tensor, batch: Batch) -> Tensor:
    """(I, N, 1) attention averaged over the valid tokens of all captions of an image, detached."""
    mask = batch.target_mask
    seen = full(attention.detach()).masked_fill(~mask[..., None], 0)  # (B, T, N)
    total = seen.reshape(batch.num_images, -1, seen.shape[-1]).sum(1)  # (I, N)
    count = mask.reshape(batch.num_images, -1).sum(1)  # (I,)
    return (total / count.clamp(min=1)[:, None])[..., None]


def _has_tokens(batch: Batch) -> Tensor:
    """(I,) whether any caption of the image has a valid token."""
    return batch.target_mask.reshape(batch.num_images, -1).any(1)


def smaller_grid(*specs: ModelSpec) -> tuple[int, int]:
    """The smaller height and the smaller width of the models' grids."""
    sizes = [spec.grid or (1, 1) for spec in specs]
    return min(h for h, _ in sizes), min(w for _, w in sizes)


def grid_cells(
    loss: str, features: Tensor, spec: ModelSpec, role: str, size: tuple[int, int]
) -> Tensor:
    """(I, N, D) tokens to (I, h * w, D) cells of a grid averaged down to `size`.

    Prefix tokens are dropped.

    Raises:
        IncompatibleModels: the tokens form no grid; the message names loss, model and role.
    """
    height, width = require_grid(loss, spec, role, features.shape[1])
    places = features[:, spec.prefix_tokens :].transpose(1, 2)  # (I, D, H * W)
    places = places.reshape(*places.shape[:2], height, width)
    pooled = F.adaptive_avg_pool2d(places, size)  # (I, D, h, w)
    return pooled.flatten(2).transpose(1, 2)


def require_grid(loss: str, spec: ModelSpec, role: str, tokens: int | None) -> tuple[int, int]:
    """The grid of a model, (h, w).

    Raises:
        IncompatibleModels: it has none, or one that does not fit the number of tokens.
    """
    if spec.grid and tokens == spec.prefix_tokens + spec.grid[0] * spec.grid[1]:
        return spec.grid
    shape = f"({tokens} tokens x {spec.feature_dim})"
    claim = f"a grid of {spec.grid} after {spec.prefix_tokens} tokens" if spec.grid else "no grid"
    fix = "an encoder with a grid, or remove this loss"
    if loss == "FeatureKD":
        fix = 'FeatureKD(match="pooled"), or an encoder with a grid'
    raise IncompatibleModels(
        f"{loss}: the {role} '{spec.name}' gives {claim} {shape} but grid matching was asked for.\n"
        f"Use {fix}."
    )


def pooled_features(loss: str, output: CaptionerOutput, role: str) -> Tensor:
    """(I, D) the mean over the visual tokens of each image, in full precision."""
    return full(given(loss, "features", role, output.features)).mean(1)


def feature_width(loss: str, spec: ModelSpec, role: str) -> int:
    """D of a model's features.

    Raises:
        IncompatibleModels: it returns none.
    """
    require_specs(loss, **{role: spec})
    if spec.feature_dim is None:
        raise IncompatibleModels(
            f"{loss}: the {role} '{spec.name}' returns no features to compare.\n"
            "Return them in CaptionerOutput.features, (I, N, D), or remove this loss."
        )
    return spec.feature_dim
