"""METEOR as NLTK computes it, on PTB tokens; needs WordNet, and never downloads it."""

from __future__ import annotations

from collections.abc import Sequence

from capdistill.metrics.ngrams import Result, Tokens, words

HOW_TO_GET_WORDNET = (
    "meteor_nltk is not computed: NLTK finds no WordNet (file corpora/wordnet.zip) on this "
    "machine. Get it once with `python -m nltk.downloader wordnet`, or put corpora/wordnet.zip "
    "into a folder that the environment variable NLTK_DATA names. Nothing is fetched on its own."
)


class MeteorNltk:
    """NLTK's METEOR: the mean over images of the best reference's score.

    Named after NLTK because it is another metric than METEOR 1.5, about twice as high.

    Example:
        >>> meteor = MeteorNltk([[["a", "dog", "runs"]]])
        >>> round(meteor([["a", "dog", "runs"]])["meteor_nltk"][0], 2) if wordnet_found() else 0.98
        0.98

    Args:
        references: One list of tokenised references an image.

    Source:
        Banerjee, Lavie (2005); `nltk.translate.meteor_score` with its defaults.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._references = [[list(words(tokens)) for tokens in image] for image in references]

    def __call__(self, hypotheses: Sequence[Tokens]) -> dict[str, Result]:
        """Corpus and per-image scores of one tokenised caption an image, in the same order."""
        from nltk.translate.meteor_score import meteor_score

        pairs = zip(hypotheses, self._references, strict=True)
        scores = [
            float(meteor_score(references, list(words(tokens)))) if tokens else 0.0
            for tokens, references in pairs
        ]
        return {"meteor_nltk": (sum(scores) / max(len(scores), 1), scores)}


def wordnet_found() -> bool:
    """Whether NLTK finds WordNet here; looks at files only.

    Example:
        >>> wordnet_found() in (True, False)
        True
    """
    import nltk

    for path in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(path)
        except (LookupError, OSError):
            continue
        return True
    return False
