"""The loss. capdistill imports this module when somebody asks for "contrastive", not before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class ContrastiveKD(DistillationLoss):
    """Let the student pick the teacher's vector of its own image among those of the batch.

    Both sides are pooled over their visual tokens and scaled to length 1; the student's is
    projected to the teacher's width. The term is the cross-entropy of the similarities divided by
    `tau`, one an image: the batch's other images are what tells them apart, so that a batch of
    one image teaches nothing, and splitting a batch changes the loss (`couples_batch`).

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
            ours = self.project(student.features.mean(1).float())
            theirs = teacher.features.mean(1).detach().float()
            similar = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).T / self.tau  # (I, I)
        own = torch.arange(len(similar), device=similar.device)
        return F.cross_entropy(similar, own, reduction="sum")


def _width(model: ModelSpec) -> int:
    if model.feature_dim is None:
        raise IncompatibleModels(
            f"ContrastiveKD: '{model.name}' shows no features, and they are compared. "
            "Leave the loss out, or let the adapter return features."
        )
    return model.feature_dim
