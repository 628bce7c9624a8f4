"""Training: `Trainer` for cross-entropy alone, `Distiller` for a student with a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.training.callbacks import Callback as Callback
    from capdistill.training.chain import ChainTable as ChainTable
    from capdistill.training.chain import distill_chain as distill_chain
    from capdistill.training.config import DistillConfig as DistillConfig
    from capdistill.training.config import SelfCriticalConfig as SelfCriticalConfig
    from capdistill.training.config import TrainConfig as TrainConfig
    from capdistill.training.difficulty import model_difficulty as model_difficulty
    from capdistill.training.distiller import Distiller as Distiller
    from capdistill.training.failed_step import replay_step as replay_step
    from capdistill.training.gradnorm import GradNorm as GradNorm
    from capdistill.training.history import History as History
    from capdistill.training.loggers import CSVLogger as CSVLogger
    from capdistill.training.loggers import TensorBoardLogger as TensorBoardLogger
    from capdistill.training.loggers import WandBLogger as WandBLogger
    from capdistill.training.recipes import recipe as recipe
    from capdistill.training.self_critical import SelfCritical as SelfCritical
    from capdistill.training.sources import cache_features as cache_features
    from capdistill.training.stages import run_stages as run_stages
    from capdistill.training.trainer import Trainer as Trainer
    from capdistill.training.weighting import LossRatio as LossRatio
    from capdistill.training.weighting import Uncertainty as Uncertainty
    from capdistill.training.weighting import Weighting as Weighting
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "CSVLogger": "loggers",
            "Callback": "callbacks",
            "ChainTable": "chain",
            "DistillConfig": "config",
            "Distiller": "distiller",
            "GradNorm": "gradnorm",
            "History": "history",
            "LossRatio": "weighting",
            "SelfCritical": "self_critical",
            "SelfCriticalConfig": "config",
            "TensorBoardLogger": "loggers",
            "TrainConfig": "config",
            "Trainer": "trainer",
            "Uncertainty": "weighting",
            "WandBLogger": "loggers",
            "Weighting": "weighting",
            "cache_features": "sources",
            "distill_chain": "chain",
            "model_difficulty": "difficulty",
            "recipe": "recipes",
            "replay_step": "failed_step",
            "run_stages": "stages",
        },
    )
