"""Distil large image captioners into small, fast ones.

>>> import capdistill as cd
>>> cd.losses.create("token", temperature=2.0).temperature
2.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill import data as data
    from capdistill import decoders as decoders
    from capdistill import deploy as deploy
    from capdistill import encoders as encoders
    from capdistill import errors as errors
    from capdistill import losses as losses
    from capdistill import metrics as metrics
    from capdistill import plots as plots
    from capdistill import presets as presets
    from capdistill import teachers as teachers
    from capdistill import tokenizers as tokenizers
    from capdistill import training as training
    from capdistill.captioner import Captioner as Captioner
    from capdistill.decoders.base import Decoder as Decoder
    from capdistill.decoders.base import DecoderState as DecoderState
    from capdistill.encoders.base import Encoder as Encoder
    from capdistill.evaluation.comparison import compare as compare
    from capdistill.evaluation.evaluation import evaluate as evaluate
    from capdistill.generation.config import GenerationConfig as GenerationConfig
    from capdistill.losses.base import DistillationLoss as DistillationLoss
    from capdistill.losses.feature import FeatureKD as FeatureKD
    from capdistill.losses.hidden import HiddenKD as HiddenKD
    from capdistill.losses.token import TokenKD as TokenKD
    from capdistill.outputs import Batch as Batch
    from capdistill.outputs import CaptionerOutput as CaptionerOutput
    from capdistill.outputs import DecoderOutput as DecoderOutput
    from capdistill.outputs import ModelSpec as ModelSpec
    from capdistill.tokenizer import WordTokenizer as WordTokenizer
    from capdistill.training.chain import distill_chain as distill_chain
    from capdistill.training.distiller import Distiller as Distiller
    from capdistill.training.self_critical import SelfCritical as SelfCritical
    from capdistill.training.trainer import Trainer as Trainer
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "Batch": "outputs",
            "Captioner": "captioner",
            "CaptionerOutput": "outputs",
            "Decoder": "decoders.base",
            "DecoderOutput": "outputs",
            "DecoderState": "decoders.base",
            "DistillationLoss": "losses.base",
            "Distiller": "training.distiller",
            "Encoder": "encoders.base",
            "FeatureKD": "losses.feature",
            "GenerationConfig": "generation.config",
            "HiddenKD": "losses.hidden",
            "ModelSpec": "outputs",
            "SelfCritical": "training.self_critical",
            "TokenKD": "losses.token",
            "Trainer": "training.trainer",
            "WordTokenizer": "tokenizer",
            "compare": "evaluation.comparison",
            "data": "",
            "decoders": "",
            "deploy": "",
            "distill_chain": "training.chain",
            "encoders": "",
            "errors": "",
            "evaluate": "evaluation.evaluation",
            "losses": "",
            "metrics": "",
            "plots": "",
            "presets": "",
            "teachers": "",
            "tokenizers": "",
            "training": "",
        },
        unlisted=("DecoderOutput", "plots"),
    )

__version__ = "0.1.0"
