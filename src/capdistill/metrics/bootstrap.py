"""Whether one system scores better than another, or by chance: the paired bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.metrics.base import (
    ORDER,
    Captions,
    Metric,
    References,
    Scores,
    Tokens,
    align,
    prepare,
    tokens_of,
)
from capdistill.metrics.bleu_rouge_meteor import Bleu, BleuMatches
from capdistill.metrics.ngram_counts import Floats
from capdistill.metrics.scorer import SCORES, CaptionScorer, make

_TIE = 1e-12  # differences below it are rounding
_LEAST_P = 0.001  # of those that are shown
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedScore:
    """One score of two systems, and how sure their difference is.

    Args:
        a: The first system's score, of all images.
        b: The second system's.
        difference: b - a.
        a_interval: Low and high end of the interval of `a`.
        b_interval: Of `b`.
        interval: Of `difference`.
        p_value: Two-sided, of no difference; from 2 / (samples + 1) to 1.
    """

    a: float
    b: float
    difference: float
    a_interval: Interval
    b_interval: Interval
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class PairedScores(Mapping[str, PairedScore]):
    """What `paired_bootstrap` found, a mapping by score; `print` shows it as a table.

    Args:
        found: Score -> what was found.
        images: How many images there are.
        samples: How many samples of them were drawn.
        seed: What the samples depend on.
        confidence: Of the intervals.
        notes: Scores that have no interval, and why.
    """

    found: Mapping[str, PairedScore]
    images: int
    samples: int
    seed: int
    confidence: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> PairedScore:
        if name not in self.found:
            notes = " ".join(["", *self.notes])
            raise UnknownName(f"No interval for '{name}'. {suggest(name, self.found)}{notes}")
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __contains__(self, name: object) -> bool:
        return name in self.found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts and lists."""
        return {
            "scores": {name: asdict(each) for name, each in self.items()},
            "images": self.images,
            "samples": self.samples,
            "seed": self.seed,
            "confidence": self.confidence,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{'':17}  {'a':>24}  {'b':>24}  b - a"]
        for name, each in self.items():
            a = f"{each.a:.4f} {bracketed(each.a_interval)}"
            b = f"{each.b:.4f} {bracketed(each.b_interval)}"
            change = changed(each.difference, each.interval, each.p_value)
            lines.append(f"{name:17}  {a:>24}  {b:>24}  {change}")
        return "\n".join([*lines, remark(self.samples, self.confidence), *self.notes])


def paired_bootstrap(
    references: References,
    a: Captions,
    b: Captions,
    metrics: Iterable[str | Metric] | None = None,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedScores:
    """Set two systems side by side on the same images: scores, intervals, p-values.

    The images are drawn anew, with replacement, `samples` times, and both systems scored on each
    sample. An interval is that of the percentiles of the sampled scores or differences. The
    p-value is twice the share of the samples in which the difference is not above, or not below,
    0, whichever is rarer, where one more sample is counted: `min(1, 2 * (rarer + 1) /
    (samples + 1))`. So p < 0.05 goes with a 95 % interval without 0, and equal systems have p = 1.

    BLEU and METEOR 1.5 of a sample come from the summed counts of its images. ROUGE-L, METEOR
    (NLTK) and CIDEr-D are means over its images; CIDEr-D's document frequencies stay those of all
    images. A metric of your own is resampled where its corpus score is the mean of its scores of
    the images.

    Example:
        >>> references = [["a dog runs"], ["a red car"], ["two children play"]]
        >>> a, b = ["a dog", "a car", "children"], ["a dog runs", "a red car", "two children"]
        >>> found = paired_bootstrap(references, a, b, metrics=["rouge_l"])
        >>> round(found["rouge_l"].difference, 4), found["rouge_l"].p_value < 0.05
        (0.2564, True)

    Args:
        references: As for `CaptionScorer`.
        a: The first system's captions, one an image.
        b: The second system's.
        metrics: As for `CaptionScorer`.
        samples: How many samples to draw. 1,000 place a p-value of 0.05 to about 0.01.
        seed: The same seed draws the same samples.
        confidence: Of the intervals, between 0 and 1.

    Raises:
        ConfigError: samples or confidence out of range.
        DataError: as `CaptionScorer`.

    Source:
        Koehn (2004), "Statistical significance tests for machine translation evaluation", for the
        paired samples; Efron and Tibshirani (1993), chapters 13 (percentile intervals) and 15.4
        (the test that belongs to an interval); Davison and Hinkley (1997), chapter 4, for the
        sample that is added.
    """
    check_samples(samples)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r} was given; expected a share such as 0.95.")
    scorer = CaptionScorer(references, metrics=metrics)
    systems = {"a": (a, scorer(a)), "b": (b, scorer(b))}
    return paired(references, systems, [("a", "b")], samples, seed, confidence)[0]


def paired(
    references: References,
    systems: Mapping[str, tuple[Captions, Scores]],
    pairs: Iterable[tuple[str, str]],
    samples: int,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[PairedScores]:
    """As `paired_bootstrap`, for pairs of systems that are scored already, all on the same samples.

    Args:
        references: Those they were scored against.
        systems: Name -> its captions and their scores.
        pairs: Names of the two systems of each comparison.
        samples: How many samples to draw.
        seed: The same seed draws the same samples.
        confidence: Of the intervals.
    """
    ready, others = statistics(references, systems)
    drawn = resample(ready, samples, seed)
    names = [name for each in next(iter(ready.values())) for name in each.names]
    columns = {name: n for n, name in enumerate(names)}
    settings = len(references), samples, seed, confidence
    notes = tuple(map(_without, others)) + (_ONE_IMAGE,) * (len(references) == 1)
    results = []
    for a, b in pairs:
        both = systems[a][1], systems[b][1]
        found = {
            name: _pair(*both, name, drawn[a][:, n], drawn[b][:, n], confidence)
            for name in both[0]
            if (n := columns.get(name)) is not None
        }
        results.append(PairedScores(found, *settings, notes))
    return results


def check_samples(samples: int) -> None:
    """Refuse what is no number of samples.

    Raises:
        ConfigError: not a whole number, or less than one.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigError(
            f"A bootstrap of {samples!r} samples was asked for; expected a number from 1 on. Use "
            "1000 or more."
        )


def bracketed(interval: Sequence[float]) -> str:
    """An interval for readers.

    Example:
        >>> bracketed((0.25, 0.5))
        '[0.2500, 0.5000]'
    """
    low, high = interval
    return f"[{low:.4f}, {high:.4f}]"


def changed(difference: float, interval: Sequence[float], p_value: float) -> str:
    """A difference for readers.

    Example:
        >>> changed(0.05, (0.01, 0.09), 0.0123)
        '+0.0500 [0.0100, 0.0900], p = 0.012'
    """
    sure = f"p = {p_value:.3f}" if p_value >= _LEAST_P else f"p < {_LEAST_P}"
    return f"{difference:+.4f} {bracketed(interval)}, {sure}"


def remark(samples: int, confidence: float) -> str:
    """What intervals and p-values are, for readers."""
    return (
        f"In brackets: {100 * confidence:g} % intervals from {samples:,} paired bootstrap samples "
        "of the images, CIDEr-D with the document frequencies of all images; p is two-sided."
    )


_ONE_IMAGE = "With a single image every sample is the same: the intervals mean nothing."


def _without(name: str) -> str:
    return f"{name} has no interval: it is not the mean of its scores of the images."


def _pair(
    a: Scores, b: Scores, name: str, ours: Floats, theirs: Floats, sure: float
) -> PairedScore:
    differences = theirs - ours
    differences[np.abs(differences) <= _TIE] = 0.0
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return PairedScore(
        a=a[name],
        b=b[name],
        difference=b[name] - a[name],
        a_interval=_interval(ours, sure),
        b_interval=_interval(theirs, sure),
        interval=_interval(differences, sure),
        p_value=min(1.0, 2 * (int(rarer) + 1) / (len(differences) + 1)),
    )


def _interval(drawn: Floats, confidence: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return low, high


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
