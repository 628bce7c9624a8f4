"""Scores of resampled corpora, from figures of each image that add up: no sample is scored anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capdistill.metrics.bleu_scores import Bleu, BleuMatches
from capdistill.metrics.built_in import SCORES, make
from capdistill.metrics.captions import Captions, References, align, prepare, tokens_of
from capdistill.metrics.ngram_ids import Floats
from capdistill.metrics.ngrams import ORDER, Tokens
from capdistill.metrics.results import Scores

_CELLS = 1 << 20  # of a matrix of samples x images at a time: 8 MB
_METEORS = ("meteor_1_5", "meteor_1_5_nopara")
_MEAN = 1e-9  # how far a mean of the scores of images may be from the score of the corpus


@dataclass(frozen=True)
class Statistics:
    """Figures of each image whose sums over a sample of the images give the sample's scores.

    Args:
        names: The scores.
        rows: The figures, (I, S).
        score: From their sums, (n, S), to the scores of n samples, (n, names).
    """

    names: tuple[str, ...]
    rows: Floats
    score: Callable[[Floats], Floats]


def statistics(
    references: References, systems: Mapping[str, tuple[Captions, Scores]]
) -> tuple[dict[str, list[Statistics]], tuple[str, ...]]:
    """Every system -> its statistics, and the names of the scores that have none.

    Those of BLEU and METEOR 1.5 are counts. Another score has them where it is the mean of its
    images' scores in all systems.
    """
    prepared = prepare(references)
    scored = [scores for _, scores in systems.values()]
    bleu = tuple(name for name in scored[0] if name in SCORES["bleu"])
    meteor = [name for name in scored[0] if name in _METEORS]
    rest = [name for name in scored[0] if name not in (*bleu, *meteor)]
    means, others = _means(rest, scored)
    found: dict[str, list[Statistics]] = {system: [] for system in systems}
    said = {
        system: [tokens_of(caption) for caption in align(captions, prepared)]
        for system, (captions, _) in systems.items()
        if bleu or meteor
    }
    tokens = [[tokens_of(caption) for caption in image] for image in prepared.values() if said]
    if bleu:
        counted = Bleu(tokens)
        for system, captions in said.items():
            found[system].append(_of_bleu(bleu, counted.matches(captions)))
    for name in meteor:
        aligned: Any = make(name, tokens, None, None)
        for system, captions in said.items():
            found[system].append(_of_meteor(name, aligned, captions))
    if means:
        for system, (_, scores) in systems.items():
            found[system].append(_of_means(means, scores, list(prepared)))
    return found, others


def resample(
    systems: Mapping[str, Sequence[Statistics]], samples: int, seed: int
) -> dict[str, Floats]:
    """Every system -> the scores, (samples, names), of the same samples of the images."""
    images = next((len(each.rows) for found in systems.values() for each in found), 0)
    drawn: dict[str, list[Floats]] = {system: [] for system in systems}
    for weights in _weights(images, samples, seed):
        for system, found in systems.items():
            scores = [each.score(weights @ each.rows) for each in found]
            drawn[system].append(np.concatenate(scores, -1))
    return {system: np.concatenate(chunks) for system, chunks in drawn.items() if chunks}


def _weights(images: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each sample has each image, some samples at a time: (n, I)."""
    chance = np.random.default_rng(seed)
    step = max(1, _CELLS // max(images, 1))
    for start in range(0, samples if images else 0, step):
        rows = min(step, samples - start)
        cells = chance.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * images)
        yield counts.reshape(rows, images).astype(np.float64)


def _of_bleu(names: tuple[str, ...], matches: BleuMatches) -> Statistics:
    wanted = [SCORES["bleu"].index(name) for name in names]

    def score(sums: Floats) -> Floats:
        whole = sums.astype(np.int64)  # sums of whole numbers are exact
        correct, guessed = whole[:, :ORDER], whole[:, ORDER : 2 * ORDER]
        return BleuMatches(correct, guessed, whole[:, -2], whole[:, -1]).scores()[:, wanted]

    rows = np.column_stack(matches).astype(np.float64)
    return Statistics(names, rows, score)


def _of_meteor(name: str, metric: Any, captions: Sequence[Tokens]) -> Statistics:
    rows = np.array(metric.statistics(captions), np.float64)

    def score(sums: Floats) -> Floats:
        whole = sums.astype(np.int64).tolist()
        return np.array([[metric.score(each)] for each in whole])

    return Statistics((name,), rows, score)


def _of_means(names: tuple[str, ...], scores: Scores, images: Sequence[Any]) -> Statistics:
    columns = [[scores.per_image[name][image] for image in images] for name in names]
    rows = np.array(columns, np.float64).T.copy()  # (I, names)
    return Statistics(names, rows, lambda sums: sums / len(images))


def _means(
    names: Sequence[str], scored: Sequence[Scores]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The scores that are means of the images' scores, and the others."""
    mean = {name: all(_is_mean(scores, name) for scores in scored) for name in names}
    return tuple(n for n in names if mean[n]), tuple(n for n in names if not mean[n])


def _is_mean(scores: Scores, name: str) -> bool:
    each = scores.per_image[name]
    mean = sum(each.values()) / len(each)
    return abs(mean - scores[name]) <= _MEAN * max(1.0, abs(mean))  # False for NaN
