"""Caption metrics equal to the COCO tool's, without Java: tokeniser, scores, and the scorer.

>>> scorer = CaptionScorer({"1": ["a dog runs"], "2": ["a red car"]}, metrics=("bleu", "cider_d"))
>>> round(scorer({"1": "a dog runs", "2": "a car"})["bleu_1"], 3)
0.819
"""

from __future__ import annotations

from capdistill.metrics.bleu_scores import Bleu
from capdistill.metrics.built_in import DIRECTIONS
from capdistill.metrics.cider import CiderD
from capdistill.metrics.coco_files import CocoResults, coco_results, read_coco_results
from capdistill.metrics.diversity import Diversity, diversity
from capdistill.metrics.frequencies import DocumentFrequencies
from capdistill.metrics.functions import bleu, cider_d, meteor_1_5, meteor_nltk, rouge_l
from capdistill.metrics.meteor import MeteorNltk
from capdistill.metrics.ptb import ptb_tokenize
from capdistill.metrics.results import Direction, Metric, Scores
from capdistill.metrics.rouge import RougeL
from capdistill.metrics.scorer import CaptionScorer
from capdistill.metrics.significance import PairedScore, PairedScores, paired_bootstrap

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
