"""METEOR 1.5 in Python, equal to the Java tool: words matched by form, stem, synonym, paraphrase.

`Meteor15` is the metric; the other modules follow its path: words are normalised
(`normalizer`), prepared (`sentence`: `stemmer`, `synonyms`), matched (`matching`,
`paraphrases`), aligned (`aligner`) and scored (`metric`).
"""

from capdistill.metrics.meteor15.metric import Meteor15
from capdistill.metrics.meteor15.tables import find_paraphrases

__all__ = ["Meteor15", "find_paraphrases"]
