"""The loss. capdistill imports this module only when someone asks for "similarity"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class SimilarityKD(DistillationLoss):
    """Let the student find those images of a batch similar that the teacher finds similar.

    Visual tokens are averaged and scaled to length 1. Each image adds the KL divergence between the
    softmax of the teacher's cosines with the other images and the student's, divided by `tau`. A
    batch of fewer than three images teaches nothing, and splitting a batch changes the loss
    (`couples_batch`).

    Example:
        >>> loss = SimilarityKD(tau=0.1)
        >>> sorted(loss.needs), loss.per, loss.couples_batch
        (['features'], 'image', True)

    Args:
        tau: Temperature > 0 of the similarities; smaller is stricter.

    Raises:
        ConfigError: tau is not positive.
        IncompatibleModels: a model shows no features.

    Source:
        Fang et al. (2021), SEED, with the batch in place of a queue.
    """

    needs = frozenset({"features"})
    per = "image"
    couples_batch = True

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        if tau <= 0:
            raise ConfigError(f"SimilarityKD: tau is {tau}; it must be positive, e.g. 0.1.")
        self.tau = tau

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Check that both models have features; a loss with a projection creates it here."""
        for model in (student, teacher):
            if model.feature_dim is None:
                raise IncompatibleModels(
                    f"SimilarityKD: '{model.name}' shows no features, and they are compared. "
                    "Leave the loss out, or let the adapter return features."
                )

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over images of KL(teacher || student)."""
        assert student.features is not None  # asked for in `needs`
        assert teacher.features is not None
        ours = self._similarities(student.features)
        theirs = self._similarities(teacher.features.detach())
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)

    def _similarities(self, features: Tensor) -> Tensor:
        """(I, N, D) features to log-probabilities (I, I - 1) over the other images."""
        with torch.autocast(features.device.type, enabled=False):  # losses stay in float32
            vectors = F.normalize(features.float().mean(1), dim=-1)
            similar = vectors @ vectors.T / self.tau  # (I, I)
        count = len(similar)
        others = ~torch.eye(count, dtype=torch.bool, device=similar.device)
        return similar[others].view(count, count - 1).log_softmax(-1)
