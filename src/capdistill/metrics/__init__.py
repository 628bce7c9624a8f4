"""Caption metrics equal to the COCO tool's, without Java: tokeniser, scores, and the scorer.

>>> scorer = CaptionScorer({"1": ["a dog runs"], "2": ["a red car"]}, metrics=("bleu", "cider_d"))
>>> round(scorer({"1": "a dog runs", "2": "a car"})["bleu_1"], 3)
0.819
"""

from __future__ import annotations

from capdistill.metrics.bleu import Bleu
from capdistill.metrics.cider import CiderD
from capdistill.metrics.meteor import MeteorNltk
from capdistill.metrics.ptb import ptb_tokenize
from capdistill.metrics.results import Direction, Metric, Scores
from capdistill.metrics.rouge import RougeL
from capdistill.metrics.scorer import DIRECTIONS, CaptionScorer

__all__ = [
    "DIRECTIONS",
    "Bleu",
    "CaptionScorer",
    "CiderD",
    "Direction",
    "MeteorNltk",
    "Metric",
    "RougeL",
    "Scores",
    "ptb_tokenize",
]
