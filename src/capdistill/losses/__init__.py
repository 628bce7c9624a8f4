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
    from capdistill.losses.across_vocabularies import UniversalKD as UniversalKD
    from capdistill.losses.across_vocabularies import WordKD as WordKD
    from capdistill.losses.attention import AttentionKD as AttentionKD
    from capdistill.losses.contrastive import ContrastiveKD as ContrastiveKD
    from capdistill.losses.decoupled import DecoupledKD as DecoupledKD
    from capdistill.losses.dist import DistKD as DistKD
    from capdistill.losses.feature import FeatureKD as FeatureKD
    from capdistill.losses.generalised import JensenShannonKD as JensenShannonKD
    from capdistill.losses.generalised import ReverseKD as ReverseKD
    from capdistill.losses.hidden import HiddenKD as HiddenKD
    from capdistill.losses.relational import RelationalKD as RelationalKD
    from capdistill.losses.token import TokenKD as TokenKD
    from capdistill.losses.top_k import TopKD as TopKD
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "AttentionKD": "attention",
            "ContrastiveKD": "contrastive",
            "DecoupledKD": "decoupled",
            "DistKD": "dist",
            "FeatureKD": "feature",
            "HiddenKD": "hidden",
            "JensenShannonKD": "generalised",
            "RelationalKD": "relational",
            "ReverseKD": "generalised",
            "TokenKD": "token",
            "TopKD": "top_k",
            "UniversalKD": "across_vocabularies",
            "WordKD": "across_vocabularies",
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
        "attention": "capdistill.losses.attention:AttentionKD",
        "contrastive": "capdistill.losses.contrastive:ContrastiveKD",
        "decoupled": "capdistill.losses.decoupled:DecoupledKD",
        "dist": "capdistill.losses.dist:DistKD",
        "feature": "capdistill.losses.feature:FeatureKD",
        "hidden": "capdistill.losses.hidden:HiddenKD",
        "jsd": "capdistill.losses.generalised:JensenShannonKD",
        "relational": "capdistill.losses.relational:RelationalKD",
        "reverse_kl": "capdistill.losses.generalised:ReverseKD",
        "token": "capdistill.losses.token:TokenKD",
        "top_k": "capdistill.losses.top_k:TopKD",
        "universal": "capdistill.losses.across_vocabularies:UniversalKD",
        "word": "capdistill.losses.across_vocabularies:WordKD",
    },
)

register = registry.register
create = registry.create
get = registry.get
names = registry.names
describe = registry.describe
