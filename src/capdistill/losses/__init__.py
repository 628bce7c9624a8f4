"""Losses by name: where the student learns. A new one is a subclass of `DistillationLoss`.

>>> from capdistill import losses
>>> "token" in losses.names()
True
"""

from __future__ import annotations

from capdistill.losses.base import DistillationLoss
from capdistill.registry import Registry

registry: Registry[DistillationLoss] = Registry(
    "loss",
    "capdistill.losses",
    DistillationLoss,
    {
        "feature": "capdistill.losses.feature:FeatureKD",
        "hidden": "capdistill.losses.hidden:HiddenKD",
        "token": "capdistill.losses.token:TokenKD",
    },
)

register = registry.register
create = registry.create
get = registry.get
names = registry.names
describe = registry.describe

__all__ = ["DistillationLoss", "create", "describe", "get", "names", "register", "registry"]
