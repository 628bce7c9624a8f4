"""Distillation losses by name. A new loss is a subclass of `DistillationLoss`.

>>> from capdistill import losses
>>> "token" in losses.names()
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.losses.base import DistillationLoss as DistillationLoss
from capdistill.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from capdistill.losses.feature import FeatureKD as FeatureKD
    from capdistill.losses.hidden import HiddenKD as HiddenKD
    from capdistill.losses.token import TokenKD as TokenKD
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "FeatureKD": "feature",
            "HiddenKD": "hidden",
            "TokenKD": "token",
        },
        "DistillationLoss",
        "create",
        "describe",
        "get",
        "names",
        "register",
        "registry",
    )

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
