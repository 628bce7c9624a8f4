"""Caption metrics equal to the COCO tool's, without Java: tokeniser, scores, and the scorer.

>>> scorer = CaptionScorer({"1": ["a dog runs"], "2": ["a red car"]}, metrics=("bleu", "cider_d"))
>>> round(scorer({"1": "a dog runs", "2": "a car"})["bleu_1"], 3)
0.819
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.metrics.base import Direction as Direction
    from capdistill.metrics.base import Metric as Metric
    from capdistill.metrics.base import Scores as Scores
    from capdistill.metrics.bleu_rouge_meteor import Bleu as Bleu
    from capdistill.metrics.bleu_rouge_meteor import MeteorNltk as MeteorNltk
    from capdistill.metrics.bleu_rouge_meteor import RougeL as RougeL
    from capdistill.metrics.bootstrap import PairedScore as PairedScore
    from capdistill.metrics.bootstrap import PairedScores as PairedScores
    from capdistill.metrics.bootstrap import paired_bootstrap as paired_bootstrap
    from capdistill.metrics.caption_diversity import Diversity as Diversity
    from capdistill.metrics.caption_diversity import diversity as diversity
    from capdistill.metrics.cider import CiderD as CiderD
    from capdistill.metrics.cider import DocumentFrequencies as DocumentFrequencies
    from capdistill.metrics.coco_files import CocoResults as CocoResults
    from capdistill.metrics.coco_files import coco_results as coco_results
    from capdistill.metrics.coco_files import read_coco_results as read_coco_results
    from capdistill.metrics.ptb import ptb_tokenize as ptb_tokenize
    from capdistill.metrics.scorer import DIRECTIONS as DIRECTIONS
    from capdistill.metrics.scorer import CaptionScorer as CaptionScorer
    from capdistill.metrics.scorer import bleu as bleu
    from capdistill.metrics.scorer import cider_d as cider_d
    from capdistill.metrics.scorer import meteor_1_5 as meteor_1_5
    from capdistill.metrics.scorer import meteor_nltk as meteor_nltk
    from capdistill.metrics.scorer import rouge_l as rouge_l
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "Bleu": "bleu_rouge_meteor",
            "CaptionScorer": "scorer",
            "CiderD": "cider",
            "CocoResults": "coco_files",
            "DIRECTIONS": "scorer",
            "Direction": "base",
            "Diversity": "caption_diversity",
            "DocumentFrequencies": "cider",
            "MeteorNltk": "bleu_rouge_meteor",
            "Metric": "base",
            "PairedScore": "bootstrap",
            "PairedScores": "bootstrap",
            "RougeL": "bleu_rouge_meteor",
            "Scores": "base",
            "bleu": "scorer",
            "cider_d": "scorer",
            "coco_results": "coco_files",
            "diversity": "caption_diversity",
            "meteor_1_5": "scorer",
            "meteor_nltk": "scorer",
            "paired_bootstrap": "bootstrap",
            "ptb_tokenize": "ptb",
            "read_coco_results": "coco_files",
            "rouge_l": "scorer",
        },
    )
