"""The paired bootstrap: whether one system scores significantly better than another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from capdistill.errors import UnknownName, require_int, require_number, suggest
from capdistill.metrics.base import Captions, Metrics, References, Scores
from capdistill.metrics.bleu_rouge_meteor import Bleu
from capdistill.metrics.meteor15 import Meteor15
from capdistill.metrics.ngram_counts import Floats, Ints
from capdistill.metrics.scorer import DIRECTIONS, SCORES, CaptionScorer

FLOOR = 1e-3
"""Below it a score means that hardly anything matched: it is noise, or the smoothing of BLEU."""

_TIE = 1e-9  # score differences up to this size are rounding
_LEAST_P = 0.001  # smaller p-values are shown as "p < 0.001"
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedScore:
    """One score of two systems, with intervals and the p-value of their difference.

    Args:
        a: The first system's score, of all images.
        b: The second system's.
        difference: b - a.
        a_interval: Low and high end of the interval of `a`.
        b_interval: The interval of `b`.
        interval: The interval of `difference`.
        p_value: Two-sided p-value of no difference; from 2 / (samples + 1) to 1.
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
    """The result of `paired_bootstrap`, a mapping by score; `print` shows it as a table.

    Args:
        found: Score -> its values, intervals and p-value.
        images: Number of images.
        samples: Number of samples drawn from them.
        seed: Seed of the samples.
        confidence: Share of the samples that the intervals hold.
        notes: Scores without an interval, and why.
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
        table = [["", "a", "b", "b - a"]]
        for name, each in self.items():
            a = f"{each.a:.4f} {bracketed(each.a_interval)}"
            b = f"{each.b:.4f} {bracketed(each.b_interval)}"
            table.append([name, a, b, changed(each.difference, each.interval, each.p_value)])
        width = shutil.get_terminal_size().columns
        lines = [text_columns(table, right=range(1, 4), width=width)]
        return "\n".join([*lines, remark(self.samples, self.confidence), *self.notes])

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={each.difference:+.4f}" for n, each in self.items())
        return f"PairedScores(b - a: {shown}; {self.images} images, {self.samples} samples)"


def paired_bootstrap(
    references: References,
    a: Captions,
    b: Captions,
    metrics: Metrics | None = None,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedScores:
    """Compare two systems on the same images: scores, intervals, p-values.

    The images are resampled with replacement, `samples` times, and both systems are scored on each
    sample. The ends of an interval are percentiles of the sampled scores or differences. The
    p-value is `min(1, 2 * (rarer + 1) / (samples + 1))`, where `rarer` is the number of samples
    whose difference is not above 0, or not below 0, whichever is smaller. So p < 0.05 goes with a
    95 % interval without 0, and equal systems have p = 1. Differences up to 1e-9 count as 0, and so
    do those between two built-in scores below 0.001, where hardly anything matched.

    BLEU and METEOR 1.5 of a sample come from the summed counts of its images. ROUGE-L, METEOR
    (NLTK) and CIDEr-D are means over its images; CIDEr-D keeps the document frequencies of all
    images. Your own metric is resampled if its corpus score is the mean of its per-image scores.

    Example:
        >>> references = [["a dog runs"], ["a red car"], ["two children play"]]
        >>> a, b = ["a dog", "a car", "children"], ["a dog runs", "a red car", "two children"]
        >>> found = paired_bootstrap(references, a, b, metrics=["rouge_l"])
        >>> round(found["rouge_l"].difference, 4), found["rouge_l"].p_value < 0.05
        (0.2564, True)

    Args:
        references: As for `CaptionScorer`.
        a: The first system's captions, one per image.
        b: The second system's.
        metrics: As for `CaptionScorer`.
        samples: Number of samples. 1,000 determine a p-value of 0.05 to about 0.01.
        seed: The same seed draws the same samples.
        confidence: Share of the samples that an interval holds, between 0 and 1.

    Raises:
        ConfigError: samples, seed or confidence are not numbers in range.
        DataError: as `CaptionScorer`.

    Source:
        Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation", for the
        paired samples; Efron and Tibshirani (1993), "An Introduction to the Bootstrap", for
        percentile intervals and the test that belongs to them; Davison and Hinkley (1997),
        "Bootstrap Methods and their Application", for the sample that is added to the count.
    """
    require_int("paired_bootstrap: samples", samples, minimum=1)
    require_int("paired_bootstrap: seed", seed, minimum=0)
    require_number("paired_bootstrap: confidence", confidence, above=0, below=1)
    scorer = CaptionScorer(references, metrics=metrics)
    return paired({"a": scorer(a), "b": scorer(b)}, [("a", "b")], samples, seed, confidence)[0]


def paired(
    systems: Mapping[str, Scores],
    pairs: Iterable[tuple[str, str]],
    samples: int,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[PairedScores]:
    """As `paired_bootstrap`, for pairs of systems that are scored already, all on the same samples.

    Args:
        systems: Name -> its scores; all of the same images and metrics.
        pairs: Names of the two systems of each comparison.
        samples: Number of samples.
        seed: The same seed draws the same samples.
        confidence: Share of the samples that an interval holds.
    """
    images, ready, others = _statistics(systems)
    drawn = _resample(ready, len(images), samples, seed)
    names = [name for each in next(iter(ready.values())) for name in each.names]
    columns = {name: n for n, name in enumerate(names)}
    settings = len(images), samples, seed, confidence
    notes = [
        f"{name} has no interval: it is not the mean of its per-image scores." for name in others
    ]
    notes += [_ONE_IMAGE] * (len(images) == 1)
    results = []
    for a, b in pairs:
        both = systems[a], systems[b]
        found = {
            name: _pair(*both, name, drawn[a][:, n], drawn[b][:, n], confidence)
            for name in both[0]
            if (n := columns.get(name)) is not None
        }
        results.append(PairedScores(found, *settings, tuple(notes)))
    return results


def text_columns(
    rows: Sequence[Sequence[str]], right: Collection[int] = (), width: int | None = None
) -> str:
    """Rows of text as aligned columns; a table wider than `width` is cut into several.

    The first column stands in each of them. Lines that would hold nothing else are left out.

    Example:
        >>> print(text_columns([("name", "a", "b"), ("x", "1.50", "2.25")], right=[1, 2], width=12))
        name     a
        x     1.50
        <BLANKLINE>
        name     b
        x     2.25

    Args:
        rows: The head, then the lines; as many cells each.
        right: Columns that are set to the right.
        width: Columns of text; None has no limit. A single column may be wider.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    tables, room = [[0]], 0
    for n in range(1, len(widths)):
        if len(tables[-1]) > 1 and width is not None and widths[n] + 2 > room:
            tables.append([0])
        if len(tables[-1]) == 1:
            room = (width or 0) - widths[0]
        tables[-1].append(n)
        room -= widths[n] + 2
    texts = []
    for columns in tables:
        filled = [
            line for line in rows[1:] if len(columns) == 1 or any(line[n] for n in columns[1:])
        ]
        lines = [
            "  ".join(
                line[n].rjust(widths[n]) if n in right else line[n].ljust(widths[n])
                for n in columns
            ).rstrip()
            for line in [rows[0], *filled]
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def bracketed(interval: Sequence[float]) -> str:
    """An interval as text.

    Example:
        >>> bracketed((0.25, 0.5))
        '[0.2500, 0.5000]'
    """
    low, high = (round(end, 4) + 0.0 for end in interval)  # no -0.0000
    return f"[{low:.4f}, {high:.4f}]"


def changed(difference: float, interval: Sequence[float], p_value: float) -> str:
    """A difference as text.

    Example:
        >>> changed(0.05, (0.01, 0.09), 0.0123)
        '+0.0500 [0.0100, 0.0900], p = 0.012'
    """
    sure = f"p = {p_value:.3f}" if p_value >= _LEAST_P else f"p < {_LEAST_P}"
    return f"{round(difference, 4) + 0.0:+.4f} {bracketed(interval)}, {sure}"


def remark(samples: int, confidence: float) -> str:
    """The sentence that explains intervals and p-values below a table."""
    return (
        f"In brackets: {100 * confidence:g} % intervals from {samples:,} paired bootstrap samples "
        "of the images, CIDEr-D with the document frequencies of all images; p is two-sided."
    )


_ONE_IMAGE = "With a single image every sample is the same: the intervals mean nothing."


def _pair(
    a: Scores, b: Scores, name: str, ours: Floats, theirs: Floats, sure: float
) -> PairedScore:
    differences = theirs - ours
    differences[np.abs(differences) <= _TIE] = 0.0
    if name in DIRECTIONS:
        differences[(ours < FLOOR) & (theirs < FLOOR)] = 0.0
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
_MEAN = 1e-9  # how far a mean of per-image scores may be from the corpus score
_FROM_COUNTS: dict[str, Callable[[Ints], Floats]] = {
    "bleu": Bleu.scores_of_sums,
    "meteor_1_5": Meteor15.scores_of_sums,
    "meteor_1_5_nopara": Meteor15.scores_of_sums,
}


@dataclass(frozen=True)
class _Statistics:
    """Numbers of each image whose sums over a sample of the images give the sample's scores.

    Args:
        names: The scores.
        rows: The numbers, (I, S).
        score: From their sums, (n, S), to the scores of n samples, (n, names).
    """

    names: tuple[str, ...]
    rows: Floats
    score: Callable[[Floats], Floats]


def _statistics(
    systems: Mapping[str, Scores],
) -> tuple[list[Any], dict[str, list[_Statistics]], list[str]]:
    """The images, each system's statistics, and the names of the scores that have none.

    Those of BLEU and METEOR 1.5 are counts. Another score has them if it is the mean of its
    per-image scores in all systems.
    """
    scored = list(systems.values())
    images = list(next(iter(scored[0].per_image.values()), {}))
    counted = {metric: _wanted(metric, scored[0]) for metric in scored[0].counts}
    rest = [n for n in scored[0] if not any(n in names for names in counted.values())]
    means = tuple(name for name in rest if all(_is_mean(scores, name) for scores in scored))
    found: dict[str, list[_Statistics]] = {}
    for system, scores in systems.items():
        found[system] = [_of_counts(m, names, scores, images) for m, names in counted.items()]
        if means:
            found[system].append(_of_means(means, scores, images))
    return images, found, [name for name in rest if name not in means]


def _wanted(metric: str, scores: Scores) -> tuple[str, ...]:
    return tuple(name for name in SCORES[metric] if name in scores)


def _of_counts(
    metric: str, names: tuple[str, ...], scores: Scores, images: Sequence[Any]
) -> _Statistics:
    columns = [SCORES[metric].index(name) for name in names]
    order = {image: row for row, image in enumerate(next(iter(scores.per_image.values())))}
    rows = scores.counts[metric][[order[image] for image in images]].astype(np.float64)

    def score(sums: Floats) -> Floats:
        whole = sums.astype(np.int64)  # sums of whole numbers are exact
        return _FROM_COUNTS[metric](whole)[:, columns]

    return _Statistics(names, rows, score)


def _of_means(names: tuple[str, ...], scores: Scores, images: Sequence[Any]) -> _Statistics:
    columns = [[scores.per_image[name][image] for image in images] for name in names]
    rows = np.array(columns, np.float64).T.copy()  # (I, names)
    return _Statistics(names, rows, lambda sums: sums / len(images))


def _is_mean(scores: Scores, name: str) -> bool:
    each = scores.per_image[name]
    mean = sum(each.values()) / len(each)
    return abs(mean - scores[name]) <= _MEAN * max(1.0, abs(mean))  # False for NaN


def _resample(
    systems: Mapping[str, Sequence[_Statistics]], images: int, samples: int, seed: int
) -> dict[str, Floats]:
    """Every system -> the scores, (samples, names), of the same samples of the images."""
    drawn: dict[str, list[Floats]] = {system: [] for system, found in systems.items() if found}
    for weights in _weights(images, samples, seed):
        for system, chunks in drawn.items():
            scores = [each.score(weights @ each.rows) for each in systems[system]]
            chunks.append(np.concatenate(scores, -1))
    return {system: np.concatenate(chunks) for system, chunks in drawn.items() if chunks}


def _weights(images: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each sample has each image, some samples at a time: (n, I)."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(images, 1))
    for start in range(0, samples if images else 0, step):
        rows = min(step, samples - start)
        cells = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * images)
        yield counts.reshape(rows, images).astype(np.float64)
