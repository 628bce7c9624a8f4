"""METEOR's alignment: of all matches that fit together those that cover most in fewest chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from capdistill.metrics.meteor15.sentence import Sentence
from capdistill.metrics.meteor15.tables import Rewrites


class Match(NamedTuple):
    """A run of words in the reference and one in the hypothesis that mean the same."""

    stage: int
    reference: int  # where it starts there
    reference_length: int
    hypothesis: int
    hypothesis_length: int


_BEAM = 40

# One integer ranks the paths, the lower the better: words covered, then chunks, then distance.
_WORD, _CHUNK = 1 << 48, 1 << 32
_rank = itemgetter(0)


class _Option(NamedTuple):
    """A match and the effect of taking it."""

    match: Match
    there: int  # its words in the reference, as bits
    here: int  # its words in the hypothesis, as bits
    gain: int  # an exact match covers its words whole, any other half of them, rounded down
    distance: int  # between its places in the two captions


# An alignment of the first words of the reference. A plain tuple: very many are made.
_Path = tuple[
    int,  # rank
    int,  # used words of the hypothesis, as bits
    int,  # where the open chunk ends in the hypothesis, -1 if none is open
    int,  # the first word of the reference that is not decided yet
    tuple[Match, ...],
]


def align(matches: Sequence[Sequence[Match]]) -> tuple[Match, ...]:
    """The matches that METEOR 1.5 keeps, in the reference's order.

    A beam search over the words of the reference: each path takes one of the matches that start
    at the word and are still free, or none. A match without a rival is always taken. Between
    equal paths the earlier one stands. A path's distance counts the matches that it took
    without a rival and those that it was offered before it took, or refused, one: so does the
    tool, and some alignments depend on it.

    Args:
        matches: For each word of the reference the matches that start there.
    """
    options = [[_option(match) for match in each] for each in matches]
    shared = _shared(options)
    paths: list[_Path] = [(0, 0, -1, 0, ())]
    for place, offered in enumerate(options):
        if len(offered) == 1 and not _has_rival(offered[0], shared):
            distance = offered[0].distance
            paths = [_take(path, offered[0], path[0] + distance) for path in paths]
        else:
            paths = [new for path in paths for new in _extend(path, place, offered)]
        paths.sort(key=_rank)
        del paths[_BEAM:]
    return min(paths, key=_closed_rank)[-1]


def _option(match: Match) -> _Option:
    stage, there, there_length, here, here_length = match
    whole = there_length + here_length
    return _Option(
        match,
        there=((1 << there_length) - 1) << there,
        here=((1 << here_length) - 1) << here,
        gain=(whole if stage == EXACT else there_length // 2 + here_length // 2) * _WORD,
        distance=abs(there - here),
    )


def _shared(options: Sequence[Sequence[_Option]]) -> tuple[int, int]:
    """The words of the reference, and of the hypothesis, that more than one match covers."""
    there = here = shared_there = shared_here = 0
    for offered in options:
        for option in offered:
            shared_there |= there & option.there
            shared_here |= here & option.here
            there |= option.there
            here |= option.here
    return shared_there, shared_here


def _has_rival(option: _Option, shared: tuple[int, int]) -> bool:
    return bool(option.there & shared[0] or option.here & shared[1])


def _extend(path: _Path, place: int, offered: Sequence[_Option]) -> Iterator[_Path]:
    rank, used, end, undecided, matches = path
    if place < undecided:  # within the last match
        yield path
        return
    for option in offered:
        if not used & option.here:
            yield _take(path, option, rank)
            rank += option.distance
    yield rank + _CHUNK if end >= 0 else rank, used, -1, place + 1, matches


def _take(path: _Path, option: _Option, rank: int) -> _Path:
    _, used, end, _, matches = path
    match = option.match
    if end >= 0 and end != match.hypothesis:
        rank += _CHUNK
    return (
        rank - option.gain,
        used | option.here,
        match.hypothesis + match.hypothesis_length,
        match.reference + match.reference_length,
        (*matches, match),
    )


def _closed_rank(path: _Path) -> int:
    """The rank when the open chunk, if any, is counted."""
    return path[0] + _CHUNK if path[2] >= 0 else path[0]


EXACT, STEM, SYNONYM, PARAPHRASE = range(4)


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
    same = hypothesis.words == reference.words  # then the tool matches only equal words
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
