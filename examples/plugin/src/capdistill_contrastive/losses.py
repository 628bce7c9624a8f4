"""The loss. capdistill imports this module only when someone asks for "contrastive"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class ContrastiveKD(DistillationLoss):
    """Let the student find the teacher's vector of the same image among those of the batch.

    Visual tokens are averaged, the student's are projected to the teacher's width, and both vectors
    are scaled to length 1. Each image adds the cross-entropy of its similarities divided by `tau`.
    The other images of the batch are the wrong answers: a batch of one image teaches nothing, and
    splitting a batch changes the loss (`couples_batch`).

    Example:
        >>> loss = ContrastiveKD(tau=0.1)
        >>> sorted(loss.needs), loss.per, loss.couples_batch
        (['features'], 'image', True)

    Args:
        tau: Temperature > 0 of the similarities; smaller is stricter.

    Raises:
        ConfigError: tau is not positive.
        IncompatibleModels: a model shows no features.

    Source:
        van den Oord, Li, Vinyals (2018), equation 4; Tian, Krishnan, Isola (2020).
    """

    needs = frozenset({"features"})
    per = "image"
    couples_batch = True

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        if tau <= 0:
            raise ConfigError(f"ContrastiveKD: tau is {tau}; it must be positive, e.g. 0.1.")
        self.tau = tau

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Create the projection from the student's width to the teacher's."""
        self.project = nn.Linear(_width(student), _width(teacher))

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over images of -log p(own image)."""
        assert student.features is not None  # asked for in `needs`
        assert teacher.features is not None
        with torch.autocast(student.features.device.type, enabled=False):  # losses stay in float32
            student_vectors = self.project(student.features.mean(1).float())
            teacher_vectors = teacher.features.mean(1).detach().float()
            normal = (F.normalize(each, dim=-1) for each in (student_vectors, teacher_vectors))
            similar = torch.einsum("id,jd->ij", *normal) / self.tau  # (I, I)
        own = torch.arange(len(similar), device=similar.device)
        return F.cross_entropy(similar, own, reduction="sum")


def _width(model: ModelSpec) -> int:
    if model.feature_dim is None:
        raise IncompatibleModels(
            f"ContrastiveKD: '{model.name}' shows no features, and they are compared. "
            "Leave the loss out, or let the adapter return features."
        )
    return model.feature_dim
