"""All the ways in which words and phrases of a hypothesis and a reference can be matched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from capdistill.metrics.meteor15.paraphrases import Rewrites
from capdistill.metrics.meteor15.sentence import Sentence

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)


class Match(NamedTuple):
    """A run of words in the reference and one in the hypothesis that mean the same."""

    stage: int
    reference: int  # where it starts there
    reference_length: int
    hypothesis: int
    hypothesis_length: int


def find_matches(
    hypothesis: Sentence, reference: Sentence, rewrites: Rewrites | None = None
) -> list[list[Match]]:
    """For each word of the reference the matches that start there, stage by stage.

    Example:
        >>> [match] = find_matches(Sentence(["two", "dogs"]), Sentence(["dog"]))[0][:1]
        >>> match.stage == STEM, match.hypothesis
        (True, 1)

    Args:
        hypothesis: The caption to score.
        reference: A caption by a person.
        rewrites: The paraphrases that `reference` can need, or None for no such stage.
    """
    matches: list[list[Match]] = [[] for _ in reference.words]
    same = hypothesis.words == reference.words  # then the tool matches equal words alone
    for place, word in enumerate(reference.words):
        equal = hypothesis.word_places.get(word, 0)
        matches[place] += _word_matches(EXACT, place, equal)
        if not same:
            stems = hypothesis.stem_places.get(reference.stems[place], 0)
            matches[place] += _word_matches(STEM, place, stems & ~equal)
            synonyms = 0
            for sense in reference.senses[place]:
                synonyms |= hypothesis.sense_places.get(sense, 0)
            matches[place] += _word_matches(SYNONYM, place, synonyms & ~equal)
    if rewrites and not same:
        for match in _paraphrases(hypothesis, reference, rewrites):
            matches[match.reference].append(match)
    return matches


def _word_matches(stage: int, reference: int, places: int) -> Iterator[Match]:
    while places:
        lowest = places & -places
        yield Match(stage, reference, 1, lowest.bit_length() - 1, 1)
        places ^= lowest


def _paraphrases(hypothesis: Sentence, reference: Sentence, rewrites: Rewrites) -> Iterator[Match]:
    """Rows of the table from reference to hypothesis, then those the other way round.

    Their order (place, length, row) is the tool's: it decides between equal alignments.
    """
    for start, length, other, other_length in _rewritings(reference, hypothesis, rewrites):
        yield Match(PARAPHRASE, start, length, other, other_length)
    for start, length, other, other_length in _rewritings(hypothesis, reference, rewrites):
        yield Match(PARAPHRASE, other, other_length, start, length)


def _rewritings(
    source: Sentence, target: Sentence, rewrites: Rewrites
) -> list[tuple[int, int, int, int]]:
    found = []
    for phrase, starts in source.phrases.items():
        if phrase in rewrites:
            rows = rewrites[phrase]
            length = phrase.count(" ") + 1
            for other in rows.keys() & target.phrases.keys():
                places = (length, rows[other], other.count(" ") + 1, target.phrases[other])
                found += [(start, *places) for start in starts]
    found.sort(key=lambda each: each[:3])
    return [
        (start, length, place, other_length)
        for start, length, _, other_length, places in found
        for place in places
    ]
