"""BLEU, ROUGE-L and NLTK's METEOR, with references that are prepared once."""

from __future__ import annotations

import gzip
from bisect import bisect_left
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capdistill.metrics.base import ORDER, Results, Tokens, of_images, words
from capdistill.metrics.ngram_counts import (
    Floats,
    HypothesisNgrams,
    Ints,
    ReferenceNgrams,
    reference_ngrams,
)

_SMALL, _TINY = 1e-9, 1e-15  # the COCO tool's constants; they affect the tenth digit


class Bleu:
    """BLEU-1..4 against references that are counted once.

    Example:
        >>> bleu = Bleu([[["a", "dog", "runs"], ["the", "dog", "runs"]]])
        >>> corpus, per_image = bleu([["a", "dog"]])["bleu_1"]
        >>> round(corpus, 4)
        0.6065

    Args:
        references: One list of tokenised references per image, or these counted.

    Source:
        Papineni et al. (2002); constants and the closest length as in pycocoevalcap.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]] | ReferenceNgrams) -> None:
        self._references = reference_ngrams(references)

    def __call__(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> Results:
        """Corpus and single scores of one tokenised caption per image, or of counted ones."""
        return self.scores(self.counts(hypotheses))

    def counts(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> Ints:
        """Whole numbers of each image, (I, 10), whose sums over images give their BLEU.

        For n = 1 to 4 the matched n-grams, then the n-grams of the caption; its length; that of
        the closest reference.
        """
        if not isinstance(hypotheses, HypothesisNgrams):
            hypotheses = self._references.count(hypotheses)
        lengths = hypotheses.lengths
        guessed = np.maximum(0, lengths[:, None] - np.arange(ORDER))  # (I, 4)
        return np.column_stack(
            [self._correct(hypotheses), guessed, lengths, self._closest(hypotheses)]
        )

    def scores(self, counts: Ints) -> Results:
        """Corpus and per-image scores from `counts`."""
        corpus = self.scores_of_sums(counts.sum(0)).tolist()
        images = self.scores_of_sums(counts).T.tolist()
        return {f"bleu_{n + 1}": (corpus[n], images[n]) for n in range(ORDER)}

    @staticmethod
    def scores_of_sums(sums: Ints) -> Floats:
        """BLEU-1..4, (..., 4), of samples of images from the sums, (..., 10), of their counts."""
        correct, guessed = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
        shares = (correct + _TINY) / (guessed + _SMALL)
        means = np.cumprod(shares, -1) ** (1.0 / np.arange(1, ORDER + 1))
        ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
        penalty = np.where(ratio < 1.0, np.exp(1.0 - 1.0 / ratio), 1.0)
        scores: Floats = means * penalty[..., None]
        return scores

    def _correct(self, hypotheses: HypothesisNgrams) -> Ints:
        correct = np.zeros((len(hypotheses.lengths), ORDER), np.int64)
        for n, (table, ours) in enumerate(
            zip(self._references.tables, hypotheses.counted, strict=True)
        ):
            found, groups = table.find(ours, hypotheses.images)
            clipped = np.minimum(ours.counts[found], table.most[groups])
            np.add.at(correct[:, n], ours.rows[found], clipped)
        return correct

    def _closest(self, hypotheses: HypothesisNgrams) -> Ints:
        """The length of the reference that is closest in length, the shorter of two."""
        theirs = self._references.lengths[hypotheses.reference]
        away = np.abs(theirs - hypotheses.lengths[hypotheses.caption])
        unit = int(theirs.max()) + 1
        best: Ints = np.minimum.reduceat(away * unit + theirs, hypotheses.first) % unit
        return best


_RECALL_WEIGHT = 1.2  # beta of the COCO tool's F-score


class RougeL:
    """F-score of the longest common subsequence; the corpus score is the mean over images.

    Example:
        >>> rouge = RougeL([[["a", "dog", "runs"]]])
        >>> round(rouge([["a", "dog"]])["rouge_l"][0], 4)
        0.7722

    Args:
        references: One list of tokenised references per image.

    Source:
        Lin (2004); beta and the maxima as in pycocoevalcap, but a caption without words scores 0
        even if a reference has no words either (pycocoevalcap gives 1).
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._references = references

    def __call__(self, hypotheses: Sequence[Tokens], images: Ints | None = None) -> Results:
        """Corpus and single scores of tokenised captions: one per image, or of these images."""
        pairs = zip(hypotheses, of_images(self._references, images), strict=True)
        scores = [_f_score(tokens, references) for tokens, references in pairs]
        return {"rouge_l": (sum(scores) / max(len(scores), 1), scores)}


def _f_score(tokens: Tokens, references: Sequence[Tokens]) -> float:
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    common = [_common(places, len(tokens), reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(tokens)
    recall = max(c / len(ref) for c, ref in zip(common, references, strict=True) if c)
    beta2 = _RECALL_WEIGHT**2
    return (1 + beta2) * precision * recall / (recall + beta2 * precision)


def _common(places: Mapping[str, int], length: int, reference: Tokens) -> int:
    """Length of the longest common subsequence, one step per token (Hyyrö 2004, bit-parallel)."""
    open_places = full = (1 << length) - 1
    for token in reference:
        matched = open_places & places.get(token, 0)
        open_places = (open_places + matched | open_places - matched) & full
    return length - open_places.bit_count()


_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5  # NLTK's defaults, those of Lavie and Agarwal (2007)
Match = tuple[int, int]  # a place in the caption, a place in the reference


class MeteorNltk:
    """NLTK's METEOR: the mean over images of the best reference's score.

    It is named after NLTK because it differs from METEOR 1.5 and is about twice as high. Scores are
    those of `nltk.translate.meteor_score` with all of WordNet 3.0, and nothing is fetched.

    Example:
        >>> meteor = MeteorNltk([[["a", "dog", "runs"]]])
        >>> round(meteor([["a", "dog", "runs"]])["meteor_nltk"][0], 2)
        0.98

    Args:
        references: One list of tokenised references per image.

    Source:
        Banerjee, Lavie (2005); `nltk.translate.meteor_score` with its defaults.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._references = [[_Sentence.of(tokens) for tokens in image] for image in references]

    def __call__(self, hypotheses: Sequence[Tokens], images: Ints | None = None) -> Results:
        """Corpus and single scores of tokenised captions: one per image, or of these images."""
        pairs = zip(map(_Sentence.of, hypotheses), of_images(self._references, images), strict=True)
        scores = [max(_score(ours, theirs) for theirs in image) for ours, image in pairs]
        return {"meteor_nltk": (sum(scores) / max(len(scores), 1), scores)}


class _Sentence(NamedTuple):
    words: list[str]
    stems: list[str]

    @classmethod
    def of(cls, tokens: Tokens) -> _Sentence:
        lowered = [token.lower() for token in words(tokens)]
        return cls(lowered, [_stem(word) for word in lowered])


def _score(ours: _Sentence, theirs: _Sentence) -> float:
    matches = _align(ours, theirs)
    if not matches:
        return 0.0
    precision = len(matches) / len(ours.words)
    recall = len(matches) / len(theirs.words)
    mean = (precision * recall) / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty: float = _GAMMA * (_chunks(matches) / len(matches)) ** _BETA
    return (1 - penalty) * mean


def _align(ours: _Sentence, theirs: _Sentence) -> list[Match]:
    """Words are matched by form, the rest by stem, the rest by synonyms of their stems."""
    matches: list[Match] = []
    left, free = list(range(len(ours.words))), list(range(len(theirs.words)))
    for our_keys, their_keys in zip(ours, theirs, strict=True):
        found = list(_equal(left, our_keys, free, their_keys))
        matches += found
        left = _without(left, {i for i, _ in found})
        free = _without(free, {j for _, j in found})
    matches += _synonymous(left, ours.stems, free, theirs.stems)
    return sorted(matches)


def _equal(
    left: Sequence[int], ours: Sequence[str], free: Sequence[int], theirs: Sequence[str]
) -> Iterator[Match]:
    """Each word, from the last on, with the last free one that is equal."""
    places: dict[str, list[int]] = {}
    for j in free:
        places.setdefault(theirs[j], []).append(j)
    for i in reversed(left):
        if equal := places.get(ours[i]):
            yield i, equal.pop()


def _synonymous(
    left: Sequence[int], ours: Sequence[str], free: Sequence[int], theirs: Sequence[str]
) -> Iterator[Match]:
    """Each word, from the last on, with the last free one that is a synonym."""
    free = list(free)
    for i in reversed(left) if free else ():
        same = synonyms(ours[i])
        last = next((j for j in reversed(free) if theirs[j] in same), None)
        if last is not None:
            free.remove(last)
            yield i, last


def _without(places: list[int], taken: Container[int]) -> list[int]:
    return [place for place in places if place not in taken] if taken else places


def _chunks(matches: Sequence[Match]) -> int:
    """Number of chunks: runs of matched words that are adjacent in both sentences."""
    following = pairwise(matches)
    return 1 + sum(i + 1 != k or j + 1 != m for (i, j), (k, m) in following)


# Porter's stemmer as NLTK extends it; NLTK itself cannot be imported without a home directory.
_KEPT = "sky news inning outing canning howe proceed exceed succeed"
_IRREGULAR = {word: word for word in _KEPT.split()}
_IRREGULAR |= {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"}
_IRREGULAR |= {word + "s": word for word in ("inning", "outing", "canning")}


def _rules(text: str) -> tuple[tuple[str, str], ...]:
    """'ational:ate ness:' as (suffix, replacement); the first suffix that a word has counts."""
    return tuple((old, new) for old, _, new in (pair.partition(":") for pair in text.split()))


_STEP_2 = _rules(
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e "
    "ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
    "aliti:al iviti:ive biliti:ble fulli:ful logi:log"
)
_STEP_3 = _rules("icate:ic ative: alize:al iciti:ic ical:ic ful: ness:")
_STEP_4 = _rules(
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: "
    "ive: ize:"
)


@cache
def _stem(word: str) -> str:
    """The stem of a lower-case word, as `nltk.stem.PorterStemmer` gives it.

    Source:
        Porter (1980), "An algorithm for suffix stripping"; extensions and order as in NLTK.
    """
    if word in _IRREGULAR or len(word) <= 2:
        return _IRREGULAR.get(word, word)
    word = _past(_singular(word))
    if word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c":
        word = word[:-1] + "i"
    while word.endswith("alli") and _measure(word[:-4]):
        word = word[:-2]
    word = _replace(_replace(word, _STEP_2, least=1), _STEP_3, least=1)
    word = _replace(word, _STEP_4, least=2)
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _is_short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _shape(word: str) -> str:
    """A c for each consonant, a v for each vowel; y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(word: str) -> int:
    return _shape(word).count("vc")


def _is_short(word: str) -> bool:
    shape = _shape(word)
    return (shape.endswith("cvc") and word[-1] not in "wxy") or shape == "vc"


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    rest = next((word[: -len(end)] for end in ("ed", "ing") if word.endswith(end)), "")
    shape = _shape(rest)
    if "v" not in shape:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and shape[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _is_short(rest) else rest


def _replace(word: str, rules: Sequence[tuple[str, str]], least: int) -> str:
    """Replace a suffix if what stands before it has the least measure."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            before = word[:-3] if suffix == "logi" else rest
            allowed = _measure(before) >= least and (suffix != "ion" or rest[-1] in "st")
            return rest + replacement if allowed else word
    return word


_TABLE = Path(__file__).with_name("wordnet") / "synonyms.txt.gz"

# Inflections that NLTK undoes, by part of speech: noun, verb, adjective, adverb.
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "N": (
        *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch")),
        *(("shes", "sh"), ("men", "man"), ("ies", "y")),
    ),
    "V": (
        *(("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", "")),
        *(("ing", "e"), ("ing", "")),
    ),
    "A": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "R": (),
}


@cache
def synonyms(word: str) -> frozenset[str]:
    """The word and the single words that share a meaning with it or with a base form of it.

    Example:
        >>> sorted(synonyms("sofas"))
        ['couch', 'lounge', 'sofa', 'sofas']

    Args:
        word: In lower case.

    Source:
        Fellbaum (1998), WordNet 3.0; forms as `WordNetCorpusReader.synsets` of NLTK finds them.
    """
    found, entry = {word}, _entry(word)
    for pos, endings in _ENDINGS.items():
        bases = entry.get(f"={pos}")
        forms = _without_ending(word, endings) if bases is None else bases
        for form in (word, *forms):
            found.update(_answers(form, pos))
    return frozenset(found)


def _without_ending(word: str, endings: tuple[tuple[str, str], ...]) -> Iterator[str]:
    return (word[: -len(old)] + new for old, new in endings if word.endswith(old))


def _answers(form: str, pos: str) -> list[str]:
    entry = _entry(form)
    if pos in entry:
        return [form, *entry[pos]]
    return entry.get(f"-{pos}", [])


def _entry(word: str) -> dict[str, list[str]]:
    """The line of a word: a mark such as N, -N or =N -> the words after it."""
    lines, start = _lines(), f"{word} "
    place = bisect_left(lines, start)
    entry: dict[str, list[str]] = {}
    if place == len(lines) or not lines[place].startswith(start):
        return entry
    for field in lines[place][len(start) :].split(" "):
        if field.isupper():  # marks alone have capitals
            entry[field] = words = []
        else:
            words.append(field)
    return entry


@cache
def _lines() -> list[str]:
    return gzip.decompress(_TABLE.read_bytes()).decode("ascii").split("\n")
