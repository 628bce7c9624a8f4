"""METEOR 1.5 in Python, equal to the Java tool: words matched by form, stem, synonym, paraphrase.

`Meteor15` is the metric (`metric`). A caption becomes a `Sentence` (`sentence`: words, stems), its
words are matched with a reference's and the matches aligned (`alignment`), with the synonyms and
paraphrases of `tables`.
"""

from capdistill.metrics.meteor15.metric import Meteor15
from capdistill.metrics.meteor15.tables import find_paraphrases

__all__ = ["Meteor15", "find_paraphrases"]
