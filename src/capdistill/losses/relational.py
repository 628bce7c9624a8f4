"""Relational distillation: distances and angles between the images of a batch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from capdistill.losses.base import DistillationLoss, check_factors
from capdistill.losses.distances import SHORTEST, huber_distance
from capdistill.losses.feature import feature_width, pooled_features
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

logger = logging.getLogger(__name__)


class RelationalKD(DistillationLoss):
    """Give the images of a batch the distances and angles that they have for the teacher.

    One vector per image, the mean over its visual tokens. Distances of pairs of images are divided
    by their mean over the batch; angles are cosines at the middle one of three images. Both are
    compared by Huber's distance, so scale, position and rotation of the student's features are
    free and there is no projection.

    The sum is the number of images times the means over pairs and over triples. It relates the
    images of a batch (`couples_batch`): with accumulation it sees one micro-batch at a time, and
    large batches tell more. Two images have no angles and one distance, which is always 1: fewer
    than three images teach nothing, which is logged once. Time and memory grow with the cube of
    their number.

    Example:
        >>> loss = RelationalKD(angle=1.0)
        >>> sorted(loss.needs), loss.per, loss.couples_batch
        (['features'], 'image', True)

    Args:
        distance: Factor >= 0 of the distances.
        angle: Factor >= 0 of the angles. The paper weighs angles twice as much as distances.

    Raises:
        ConfigError: a factor is negative, or both are 0.
        IncompatibleModels: (in `build`) a model returns no features.

    Source:
        Park et al. (2019), Relational Knowledge Distillation, section 3.2.
    """

    needs = frozenset({"features"})
    per = "image"
    couples_batch = True

    def __init__(self, distance: float = 1.0, angle: float = 2.0) -> None:
        super().__init__()
        self._warned = False
        self.distance, self.angle = check_factors("RelationalKD", distance=distance, angle=angle)

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Check that both models return features.

        Raises:
            IncompatibleModels: one does not.
        """
        feature_width("RelationalKD", student, "student")
        feature_width("RelationalKD", teacher, "teacher")

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Number of images times the mean distances over pairs and triples of images."""
        if self.training and batch.num_images < 3 and not self._warned:
            self._warned = True
            logger.warning(
                "RelationalKD: a batch of fewer than three images has no angles, and its distances "
                "are all alike: it adds 0. Use a larger batch_size."
            )
        mine = pooled_features("RelationalKD", student, "student")  # (I, D)
        with torch.autocast(mine.device.type, enabled=False):
            ours = _relations(mine)
            with torch.no_grad():
                theirs = _relations(pooled_features("RelationalKD", teacher, "teacher"))
            means = [_mean(huber_distance(*pair)) for pair in zip(ours, theirs, strict=True)]
        return batch.num_images * (self.distance * means[0] + self.angle * means[1])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"distance={self.distance}, angle={self.angle}"


def _relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Relative distances of all pairs of images, and cosines (I, I, I) at the first of three.

    What involves an image twice is 0.
    """
    count = len(vectors)
    gaps = vectors[None] - vectors[:, None]  # (I, I, D), from the first to the second
    lengths = torch.linalg.vector_norm(gaps, dim=-1)  # (I, I)
    mean = lengths.sum() / max(count * (count - 1), 1)
    units = gaps / lengths.clamp(min=SHORTEST)[..., None]
    same = torch.eye(count, dtype=torch.bool, device=vectors.device)
    cosines = (units @ units.transpose(1, 2)).masked_fill(same, 0)  # (I, I, I)
    return lengths / mean.clamp(min=SHORTEST), cosines


def _mean(distances: Tensor) -> Tensor:
    """The mean over ordered pairs (I, I) or triples (I, I, I) of different images."""
    count, number = len(distances), 1
    for taken in range(distances.ndim):
        number *= count - taken
    return distances.sum() / max(number, 1)
