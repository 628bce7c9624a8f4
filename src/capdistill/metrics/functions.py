"""The built-in metrics as functions, for scoring once."""

from __future__ import annotations

from capdistill.metrics.captions import Captions, References
from capdistill.metrics.frequencies import DocumentFrequencies
from capdistill.metrics.results import Scores
from capdistill.metrics.scorer import CaptionScorer


def bleu(references: References, hypotheses: Captions) -> Scores:
    """BLEU-1 to 4 of one caption an image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(bleu({"1": ["a dog runs"]}, {"1": "a dog ran"})["bleu_2"], 4)
        0.5774
    """
    return CaptionScorer(references, metrics=["bleu"])(hypotheses)


def rouge_l(references: References, hypotheses: Captions) -> Scores:
    """ROUGE-L of one caption an image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(rouge_l([["a dog runs"]], ["a dog"])["rouge_l"], 4)
        0.7722
    """
    return CaptionScorer(references, metrics=["rouge_l"])(hypotheses)


def cider_d(
    references: References,
    hypotheses: Captions,
    *,
    document_frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """CIDEr-D of one caption an image; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(cider_d([["a dog runs"], ["a red car"]], ["a dog runs", "a red"])["cider_d"], 3)
        5.493
    """
    scorer = CaptionScorer(
        references, metrics=["cider_d"], document_frequencies=document_frequencies
    )
    return scorer(hypotheses)


def meteor_nltk(references: References, hypotheses: Captions) -> Scores:
    """METEOR as NLTK computes it; arguments and errors as `CaptionScorer`'s.

    Example:
        >>> round(meteor_nltk([["a dog runs"]], ["a dog runs"])["meteor_nltk"], 4)
        0.9815
    """
    return CaptionScorer(references, metrics=["meteor_nltk"])(hypotheses)


def meteor_1_5(references: References, hypotheses: Captions, *, paraphrases: bool = True) -> Scores:
    """METEOR 1.5 of one caption an image; arguments and errors as `CaptionScorer`'s.

    Without paraphrases, or where there is no table of them, the score is "meteor_1_5_nopara".

    Example:
        >>> dict(meteor_1_5([["a dog runs"]], ["a dog runs"], paraphrases=False))
        {'meteor_1_5_nopara': 1.0}
    """
    name = "meteor_1_5" if paraphrases else "meteor_1_5_nopara"
    return CaptionScorer(references, metrics=[name])(hypotheses)
