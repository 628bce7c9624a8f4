"""Caption metrics equal to the COCO tool's, without Java: tokeniser, scores, and the scorer.

>>> scorer = CaptionScorer({"1": ["a dog runs"], "2": ["a red car"]}, metrics=("bleu", "cider_d"))
>>> round(scorer({"1": "a dog runs", "2": "a car"})["bleu_1"], 3)
0.819
"""

from __future__ import annotations

from capdistill.metrics.base import Direction, Metric, Scores
from capdistill.metrics.bleu_rouge_meteor import Bleu, MeteorNltk, RougeL
from capdistill.metrics.bootstrap import PairedScore, PairedScores, paired_bootstrap
from capdistill.metrics.caption_diversity import Diversity, diversity
from capdistill.metrics.cider import CiderD, DocumentFrequencies
from capdistill.metrics.coco_files import CocoResults, coco_results, read_coco_results
from capdistill.metrics.ptb import ptb_tokenize
from capdistill.metrics.scorer import (
    DIRECTIONS,
    CaptionScorer,
    bleu,
    cider_d,
    meteor_1_5,
    meteor_nltk,
    rouge_l,
)

__all__ = [
    "DIRECTIONS",
    "Bleu",
    "CaptionScorer",
    "CiderD",
    "CocoResults",
    "Direction",
    "Diversity",
    "DocumentFrequencies",
    "MeteorNltk",
    "Metric",
    "PairedScore",
    "PairedScores",
    "RougeL",
    "Scores",
    "bleu",
    "cider_d",
    "coco_results",
    "diversity",
    "meteor_1_5",
    "meteor_nltk",
    "paired_bootstrap",
    "ptb_tokenize",
    "read_coco_results",
    "rouge_l",
]
