"""The rows of a comparison: every figure, and what the reference recipe promises of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capdistill.evaluation.measure import Latency
from capdistill.metrics.bootstrap import bracketed, changed, remark

if TYPE_CHECKING:
    from capdistill.evaluation.comparison import Comparison
    from capdistill.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class Row:
    """One figure of every model, the student's relation to the teacher's, and what was promised.

    Args:
        key: Its name in the JSON file.
        label: Its name for readers.
        unit: "score", "share", "words", "count", "bytes" or "ms".
        values: Model -> figure, or None where there is none.
        relation: Student against teacher, in words; "" where it cannot be formed.
        expected: What the reference recipe promises, in words; "" where nothing.
        reached: Whether the student keeps the promise; None where there is none to keep.
        intervals: Model -> low and high end of the interval of its figure, where samples were
            drawn.
        differences: "teacher" and, where given, "baseline" -> the student's figure minus that
            model's: "difference", "interval" and "p_value", as in `metrics.PairedScore`.
    """

    key: str
    label: str
    unit: str
    values: Mapping[str, float | None]
    relation: str
    expected: str
    reached: bool | None
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Promise:
    """How a figure of the student stands to the teacher's, and what the recipe promises."""

    words: Callable[[float, float], str]  # (teacher, student)
    expected: str = ""
    kept: Callable[[float, float], bool] | None = None


def _percent(teacher: float, student: float) -> str:
    return f"{100 * student / teacher:.1f} % of the teacher's"


def _times(less: str, more: str) -> Callable[[float, float], str]:
    def words(teacher: float, student: float) -> str:
        if student <= teacher:
            return f"{teacher / student:.2f} times {less}"
        return f"{student / teacher:.2f} times {more}"

    return words


def _at_least(share: float) -> Callable[[float, float], bool]:
    return lambda teacher, student: student >= share * teacher


def _at_most(share: float) -> Callable[[float, float], bool]:
    return lambda teacher, student: student <= share * teacher


_SCORE = _Promise(_percent)
_PROMISES = {
    "bleu_1": _Promise(_percent, "85-95 % of the teacher's", _at_least(0.85)),
    "bleu_2": _Promise(_percent, "80-90 % of the teacher's", _at_least(0.80)),
    "meteor_nltk": _Promise(_percent, "85-95 % of the teacher's", _at_least(0.85)),
    "parameters": _Promise(_times("smaller", "larger"), "3 times smaller", _at_most(1 / 3)),
    "disk_bytes": _Promise(_times("smaller", "larger")),
    "latency_ms": _Promise(_times("faster", "slower"), "2-3 times faster", _at_most(1 / 2)),
    "peak_memory_bytes": _Promise(_percent, "half the teacher's", _at_most(1 / 2)),
}
_LEAST = 1e-3  # below it a score is the smoothing of a metric that found nothing
_LABELS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor_nltk": "METEOR (NLTK)",
    "meteor_1_5": "METEOR 1.5",
    "meteor_1_5_nopara": "METEOR 1.5, no paraphrases",
}


def _median(latency: Latency | None) -> float | None:
    return latency.median if latency else None


_COSTS: tuple[tuple[str, str, str, Callable[[Evaluation], float | None]], ...] = (
    ("success_rate", "Captions that end by themselves", "share", lambda e: e.success_rate),
    ("parameters", "Parameters", "count", lambda e: e.parameters),
    ("disk_bytes", "Size on disk", "bytes", lambda e: e.disk_bytes),
    ("latency_ms", "Time an image, median", "ms", lambda e: _median(e.latency_ms)),
    (
        "latency_p95_ms",
        "Time an image, 95 %",
        "ms",
        lambda e: e.latency_ms.p95 if e.latency_ms else None,
    ),
    (
        "preprocessing_ms",
        "Reading an image, median",
        "ms",
        lambda e: _median(e.preprocessing_ms),
    ),
    ("peak_memory_bytes", "Peak memory", "bytes", lambda e: e.peak_memory_bytes),
)

_HEALTH = (
    ("vocabulary", "Different words", "words"),
    ("mean_length", "Words a caption", "words"),
    ("distinct_captions", "Distinct captions", "share"),
    ("novel", "Captions not in the training data", "share"),
    ("repeats", "Captions that repeat a word pair", "share"),
)


def figures(found: Mapping[str, Evaluation]) -> list[Row]:
    """The rows of a table of evaluations; relations where there is a teacher and a student."""
    scores = list(dict.fromkeys(name for each in found.values() for name in each.scores))
    rows = [
        _row(
            name,
            _LABELS.get(name, name),
            "score",
            {r: e.scores.get(name) for r, e in found.items()},
        )
        for name in scores
    ]
    for key, label, unit in _HEALTH:
        values = {role: getattr(each.health, key, None) for role, each in found.items()}
        if any(value is not None for value in values.values()):
            rows.append(_row(key, label, unit, values))
    for key, label, unit, read in _COSTS:
        rows.append(_row(key, label, unit, {role: read(each) for role, each in found.items()}))
    return rows


def _row(key: str, label: str, unit: str, values: Mapping[str, float | None]) -> Row:
    teacher, student = values.get("teacher"), values.get("student")
    promise = _PROMISES.get(key, _SCORE if unit == "score" else _Promise(lambda t, s: ""))
    if teacher is None or student is None or not math.isfinite(teacher * student):
        return Row(key, label, unit, values, "", promise.expected, None)
    if unit == "score" and teacher < _LEAST:
        return Row(key, label, unit, values, "the teacher scores 0", promise.expected, None)
    relation = promise.words(teacher, student) if unit == "score" or (teacher and student) else ""
    reached = promise.kept(teacher, student) if promise.kept else None
    return Row(key, label, unit, values, relation, promise.expected, reached)


_NONE = "—"
_VERDICT = {True: "reached", False: "not reached", None: ""}


def figure(value: float | None, unit: str) -> str:
    """A figure as a reader wants it.

    Example:
        >>> figure(7_512_000, "count"), figure(0.5, "share"), figure(None, "ms")
        ('7.51 M', '50.0 %', '—')
    """
    if value is None:
        return _NONE
    if unit == "count":
        return f"{value / 1e6:.2f} M"
    if unit == "words":
        return f"{value:,.1f}".removesuffix(".0")
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return {"share": f"{100 * value:.1f} %", "ms": f"{value:.1f} ms"}.get(unit, f"{value:.4f}")


def plain_table(found: Mapping[str, Evaluation]) -> str:
    """Evaluations as a plain text table, one column each."""

    models = {name: each.to_json() for name, each in found.items()}
    return "\n".join([*_grid(figures(found), list(found), judged=False), *_remarks(models)])


def text_table(comparison: Comparison) -> str:
    """A comparison as a plain text table."""
    lines = _grid(comparison.rows, list(comparison.models), judged=True)
    return "\n".join([*lines, *_differences(comparison.rows), *_all_remarks(comparison)])


def _grid(rows: Sequence[Row], roles: Sequence[str], judged: bool) -> list[str]:
    head = ["", *roles, *(["student against teacher", "expected", ""] if judged else [])]
    table = [head]
    for row in rows:
        cells = [row.label, *(" ".join(_cell(row, role)) for role in roles)]
        table.append(
            cells + ([row.relation, row.expected, _VERDICT[row.reached]] if judged else [])
        )
    return _aligned(table, len(roles))


def _differences(rows: Sequence[Row]) -> list[str]:
    """The student's differences as a table of their own, where samples were drawn."""
    against = _against(rows)
    table = [["student minus", *against]]
    table += [[r.label, *(_difference(r, role) for role in against)] for r in rows if r.differences]
    return ["", *_aligned(table, len(against)), ""] if against else []


def _aligned(table: Sequence[Sequence[str]], figures: int) -> list[str]:
    """Lines whose cells stand under each other; those of the figures to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < i <= figures else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _against(rows: Sequence[Row]) -> list[str]:
    """The models from which the student's difference is known."""
    return list(dict.fromkeys(role for row in rows for role in row.differences))


def _cell(row: Row, role: str) -> list[str]:
    """A model's figure and, where there is one, its interval."""
    interval = [bracketed(row.intervals[role])] if role in row.intervals else []
    return [figure(row.values.get(role), row.unit), *interval]


def _difference(row: Row, role: str) -> str:
    found = row.differences.get(role)
    return changed(found["difference"], found["interval"], found["p_value"]) if found else ""


def _all_remarks(comparison: Comparison) -> list[str]:
    """The remarks on the models, and on their intervals."""
    drawn = comparison.bootstrap
    if not drawn:
        return _remarks(comparison.models)
    intervals = [remark(drawn["samples"], drawn["confidence"]), *drawn["notes"]]
    return [*_remarks(comparison.models), *intervals]


def _remarks(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where and on what it was measured, what was skipped, and the notes, each once."""
    remarks: dict[str, None] = {}
    for role, found in models.items():
        where = f"{role}: {found['images']} images on {found['device']} in {found['precision']}"
        remarks[f"{where}; {len(found['skipped'])} skipped"] = None
    for found in models.values():
        remarks.update(dict.fromkeys(f"skipped: {name}" for name in found["skipped"][:5]))
        remarks.update(dict.fromkeys(found["notes"]))
        if found["latency_ms"]:
            remarks[_TIME] = None
        if found["memory_bytes"] and found["memory_bytes"]["baseline"]:
            remarks[_MEMORY] = None
    return list(remarks)


_TIME = "Times are of one image at a time, the models in turn, after warm-up; reading it apart."
_MEMORY = (
    "Peak memory is of a process of its own for each model: highest resident memory while loading "
    "and captioning, minus that after its imports and a first small operation."
)
