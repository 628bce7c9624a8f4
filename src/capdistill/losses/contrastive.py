"""Contrastive distillation: an image's features agree with the teacher's for the same image."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.errors import require_int, require_number
from capdistill.losses.base import DistillationLoss, Projector, not_built, same_pair
from capdistill.losses.distances import SHORTEST
from capdistill.losses.divergence import cross_entropy
from capdistill.losses.feature import feature_width, pooled_features
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

logger = logging.getLogger(__name__)


class ContrastiveKD(DistillationLoss):
    """Let the student find the teacher's vector of an image among those of the batch (InfoNCE).

    The mean over the visual tokens of each model is projected by one trained linear layer and
    scaled to length 1. An image adds the cross-entropy of its cosines with all the teacher's
    vectors, divided by tau, and its own as the answer. The other images of the batch are the
    negatives (`couples_batch`): with accumulation these are those of one micro-batch. An image that
    a curriculum repeats is no negative of itself. One image alone adds 0, which is logged once.

    Example:
        >>> spec = dict(tokens=4, prefix_tokens=0, grid=None, hidden_dims=(), vocabulary=("a",),
        ...             has_attention=False)
        >>> loss = ContrastiveKD(dim=16)
        >>> loss.build(ModelSpec(feature_dim=8, **spec), ModelSpec(feature_dim=32, **spec))
        >>> loss.student_projector, loss.teacher_projector.in_features
        (Projector(in_features=8, out_features=16, bias=True), 32)

    Args:
        dim: Width of the projected vectors.
        tau: Temperature > 0 of the cosines; a smaller one looks at the hardest negatives.

    Raises:
        ConfigError: `dim` or `tau` is not positive, or the loss is built for a second pair.
        IncompatibleModels: (in `build`) a model returns no features.

    Source:
        Tian, Krishnan, Isola (2020), Contrastive Representation Distillation, with the negatives
        of the batch in place of a memory; van den Oord et al. (2018), equation 4.
    """

    needs = frozenset({"features"})
    per = "image"
    couples_batch = True

    def __init__(self, dim: int = 128, tau: float = 0.07) -> None:
        super().__init__()
        self.dim = require_int("ContrastiveKD: dim", dim, 1)
        self.tau = require_number("ContrastiveKD: tau", tau, above=0)
        self.student_projector: Projector | None = None
        self.teacher_projector: Projector | None = None
        self._widths: tuple[int, int] | None = None
        self._warned = False

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Create both projections, once.

        Raises:
            ConfigError: the loss was built for other widths.
            IncompatibleModels: a model returns no features.
        """
        widths = (
            feature_width("ContrastiveKD", student, "student"),
            feature_width("ContrastiveKD", teacher, "teacher"),
        )
        if not same_pair("ContrastiveKD", self._widths, widths):
            self.student_projector = Projector(widths[0], self.dim)
            self.teacher_projector = Projector(widths[1], self.dim)
        self._widths = widths

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over images of -log p(its own image)."""
        if self.student_projector is None or self.teacher_projector is None:
            raise not_built("ContrastiveKD")
        if batch.num_images == 1 and not self._warned:
            self._warned = True
            logger.warning(
                "ContrastiveKD: a batch of one image has no other image to tell it from, and adds "
                "0. Use a larger batch_size."
            )
        mine = pooled_features("ContrastiveKD", student, "student")  # (I, D)
        theirs = pooled_features("ContrastiveKD", teacher, "teacher").detach()
        ours = _unit(self.student_projector(mine)), _unit(self.teacher_projector(theirs))
        with torch.autocast(mine.device.type, enabled=False):
            logits = ours[0] @ ours[1].T / self.tau  # (I, I)
        if len(set(batch.image_ids)) < batch.num_images:
            logits = logits.masked_fill(_repeated(batch.image_ids).to(logits.device), -torch.inf)
        own = torch.arange(len(logits), device=logits.device)
        every = torch.ones_like(own, dtype=torch.bool)
        return cross_entropy(logits[None], own[None], every[None])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"dim={self.dim}, tau={self.tau}"


def _repeated(ids: Sequence[str]) -> Tensor:
    """(I, I) True for two places that hold the same image."""
    same = torch.tensor([[one == other for other in ids] for one in ids])
    return same.fill_diagonal_(False)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1, eps=SHORTEST)
