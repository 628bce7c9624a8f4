"""Terminal output: tables that fit the width, and progress.

The tables read plain dicts in the documented schemas, those of `Evaluation.to_json` and
`Comparison.to_json`.
"""

from __future__ import annotations

import math
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capdistill.metrics.bootstrap import FLOOR, bracketed, changed, remark, text_columns
from capdistill.progress import on_terminal, report

Evaluated = Mapping[str, Any]  # an evaluation, as `Evaluation.to_json` gives it


@dataclass(frozen=True)
class TableRow:
    """One figure of every model, the relation of student and teacher, and the expectation.

    Without a teacher and a student there is no relation, expectation or verdict.

    Args:
        key: Its name in the JSON file.
        label: Its name in tables.
        unit: "score", "share", "words", "count", "bytes" or "ms".
        values: Model -> figure; None if it was not measured.
        relation: Student against teacher, in words; "" if they cannot be related.
        expected: What the published recipe expects, in words; "" if nothing.
        reached: Whether the student meets the expectation; None without a verdict.
        intervals: Model -> low and high end of the interval of its figure, if samples were drawn.
        differences: Model -> the student's figure minus that model's; without a student, that
            model's minus the first one's: "difference", "interval" and "p_value", as in
            `metrics.PairedScore`.
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

    @property
    def verdict(self) -> str:
        """ "reached", "not reached" or ""."""
        return {True: "reached", False: "not reached", None: ""}[self.reached]


@dataclass(frozen=True)
class _Expectation:
    """How a figure of the student is compared with the teacher's, and the expectation."""

    words: Callable[[float, float], str]  # (teacher, student)
    expected: str = ""
    met: Callable[[float, float], bool] | None = None
    floor: float = 0.0  # a teacher's score below it is near 0: no relation and no verdict


def _percent(teacher: float, student: float) -> str:
    return f"{100 * student / teacher:.1f} % of the teacher's"


def _times(less: str, more: str) -> Callable[[float, float], str]:
    def words(teacher: float, student: float) -> str:
        if student == teacher:
            return "equal"
        if student < teacher:
            return f"{teacher / student:.2f} times {less}"
        return f"{student / teacher:.2f} times {more}"

    return words


def _at_least(share: float) -> Callable[[float, float], bool]:
    return lambda teacher, student: student >= share * teacher


def _at_most(share: float) -> Callable[[float, float], bool]:
    return lambda teacher, student: student <= share * teacher


SCORE_FLOOR = 0.01
"""A teacher's score below it is near 0: the student is not compared with it."""

EXPECTED_FLOOR = 0.05
"""The same for the scores on which the published recipe expects something."""

_SCORE = _Expectation(_percent, floor=SCORE_FLOOR)
_NOTHING = _Expectation(lambda teacher, student: "")
_85 = _Expectation(_percent, "85-95 % of the teacher's", _at_least(0.85), EXPECTED_FLOOR)
_EXPECTATIONS = {
    "bleu_1": _85,
    "bleu_2": _Expectation(_percent, "80-90 % of the teacher's", _at_least(0.80), EXPECTED_FLOOR),
    "meteor_nltk": _85,
    "parameters": _Expectation(_times("smaller", "larger"), "3 times smaller", _at_most(1 / 3)),
    "disk_bytes": _Expectation(_times("smaller", "larger")),
    "latency_ms": _Expectation(_times("faster", "slower"), "2-3 times faster", _at_most(1 / 2)),
    "peak_memory_bytes": _Expectation(_percent, "half the teacher's", _at_most(1 / 2)),
}
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
_HEALTH = (
    ("vocabulary", "Different words", "words"),
    ("mean_length", "Words per caption", "words"),
    ("distinct_captions", "Distinct captions", "share"),
    ("novel", "Captions not in training data", "share"),
    ("repeats", "Captions repeating a word pair", "share"),
    ("cut_short", "Captions ending on a function word", "share"),
)
_COSTS = (
    ("success_rate", "Captions with an end token", "share", ("success_rate",)),
    ("parameters", "Parameters", "count", ("parameters",)),
    ("disk_bytes", "Size on disk", "bytes", ("disk_bytes",)),
    ("latency_ms", "Time per image, median", "ms", ("latency_ms", "median")),
    ("latency_p95_ms", "Time per image, 95 %", "ms", ("latency_ms", "p95")),
    ("preprocessing_ms", "Reading an image, median", "ms", ("preprocessing_ms", "median")),
    ("peak_memory_bytes", "Peak memory", "bytes", ("memory_bytes", "peak")),
)


def table_rows(models: Mapping[str, Evaluated]) -> list[TableRow]:
    """The rows of a table of evaluations, with relations if there are a teacher and a student.

    Args:
        models: Model -> its evaluation, as `Evaluation.to_json` gives it.
    """
    scores = dict.fromkeys(name for each in models.values() for name in each["scores"])
    rows = [_row(models, n, _LABELS.get(n, n), "score", ("scores", n)) for n in scores]
    health = [_row(models, k, label, unit, ("health", k)) for k, label, unit in _HEALTH]
    rows += [row for row in health if any(value is not None for value in row.values.values())]
    return rows + [_row(models, key, label, unit, path) for key, label, unit, path in _COSTS]


def _row(
    models: Mapping[str, Evaluated], key: str, label: str, unit: str, path: Sequence[str]
) -> TableRow:
    values = {role: _at(each, path) for role, each in models.items()}
    expectation = _EXPECTATIONS.get(key, _SCORE if unit == "score" else _NOTHING)
    relation, reached = _judge(models, unit, values, expectation)
    expected = expectation.expected if are_judged(models) else ""
    return TableRow(key, label, unit, values, relation, expected, reached)


def are_judged(models: Mapping[str, Evaluated]) -> bool:
    """Whether there are a teacher and a student, on whose relation something is expected."""
    return {"teacher", "student"} <= models.keys()


def compared_pairs(roles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Model, as in `differences` of a row -> the two models of the difference.

    Example:
        >>> compared_pairs(["teacher", "student"]), compared_pairs(["a", "b", "c"])
        ({'teacher': ('teacher', 'student')}, {'b': ('a', 'b'), 'c': ('a', 'c')})

    Returns:
        The second one's figure minus the first one's is the difference.
    """
    if "student" in roles:
        return {role: (role, "student") for role in roles if role != "student"}
    return {role: (roles[0], role) for role in roles[1:]}


def _at(found: Evaluated, path: Sequence[str]) -> float | None:
    value: Any = found
    for key in path:
        value = None if value is None else value.get(key)
    return value  # type: ignore[no-any-return]


def _judge(
    models: Mapping[str, Evaluated],
    unit: str,
    values: Mapping[str, float | None],
    expectation: _Expectation,
) -> tuple[str, bool | None]:
    """The student against the teacher in words, and the verdict, where they can be compared."""
    teacher, student = values.get("teacher"), values.get("student")
    if teacher is None or student is None or not math.isfinite(teacher * student):
        return "", None
    if unit == "score":
        if teacher < max(expectation.floor, FLOOR):
            return "the teacher's score is near 0", None
        if models["student"]["images"] == 1:
            return expectation.words(teacher, student), None
    elif not (teacher > 0 and student > 0):
        return "", None
    if unit == "ms":
        if not all(each.get("time_comparable", True) for each in models.values()):
            return "not comparable" if expectation.met else "", None
        if _at(models["student"], ("latency_ms", "n")) == 1:
            return expectation.words(teacher, student), None
    met = expectation.met(teacher, student) if expectation.met else None
    return expectation.words(teacher, student), met


_NONE = "—"


def format_value(value: float | None, unit: str) -> str:
    """A figure as text, with its unit.

    Example:
        >>> format_value(7_512_000, "count"), format_value(0.5, "share"), format_value(None, "ms")
        ('7.51 M', '50.0 %', '—')
    """
    if value is None or not math.isfinite(value):
        return _NONE
    if unit == "count":
        return f"{value / 1e6:.2f} M"
    if unit == "words":
        return f"{value:,.1f}".removesuffix(".0")
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return {"share": f"{100 * value:.1f} %", "ms": f"{value:.1f} ms"}.get(unit, f"{value:.4f}")


def evaluation_table(models: Mapping[str, Evaluated], width: int | None = None) -> str:
    """Evaluations as a plain text table, one column each.

    Args:
        models: Name -> evaluation, as `Evaluation.to_json` gives it.
        width: Columns of text; the terminal's unless given.
    """
    width = terminal_width() if width is None else width
    rows = ([row.label, *figures_of(row, list(models))] for row in table_rows(models))
    cells = [["", *models], *rows]
    table = text_columns(cells, right=range(1, len(models) + 1), width=width)
    return "\n".join([table, *_wrapped(remarks(models, None), width)])


def comparison_table(content: Mapping[str, Any], width: int | None = None) -> str:
    """A comparison as plain text: figures, verdicts, differences, remarks.

    Args:
        content: As `Comparison.to_json` gives it.
        width: Columns of text; the terminal's unless given. A wide table is cut into several
            below each other, never within a cell.
    """
    width = terminal_width() if width is None else width
    rows, roles = [TableRow(**row) for row in content["rows"]], list(content["models"])
    judged = are_judged(content["models"])
    head = ["", *roles]
    head += ["student against teacher", "published recipe expects", "verdict"] * judged
    numbers, right = [figures_of(row, roles) for row in rows], range(1, len(roles) + 1)
    label = max(len(row.label) for row in rows)
    apart = label + sum(2 + max(map(len, column)) for column in zip(*numbers, strict=True)) > width
    if apart:  # figures of the models stay side by side; their intervals follow
        numbers = [[format_value(row.values.get(role), row.unit) for role in roles] for row in rows]
    words = [[row.relation, row.expected, row.verdict] * judged for row in rows]
    cells = [[r.label, *n, *w] for r, n, w in zip(rows, numbers, words, strict=True)]
    parts = [text_columns([head, *cells], right=right, width=width)]
    drawn = [row for row in rows if row.intervals]
    if apart and drawn:
        intervals = [[r.label, *(bracketed(r.intervals[m]) for m in roles)] for r in drawn]
        parts.append(text_columns([["interval", *roles], *intervals], right=right, width=width))
    against = compared_with(rows)
    if against:
        differences = [
            [row.label, *(difference_of(row, role) for role in against)]
            for row in rows
            if row.differences
        ]
        begin = "student minus" if "student" in roles else f"difference from {roles[0]}"
        table = [[begin, *against], *differences]
        parts.append(text_columns(table, right=range(1, len(against) + 1), width=width))
    lines = _wrapped(remarks(content["models"], content.get("bootstrap")), width)
    return "\n\n".join([*parts, "\n".join(lines)])


def terminal_width() -> int:
    """Columns of the terminal, or of the environment's COLUMNS; 80 if there is neither."""
    return shutil.get_terminal_size().columns


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    ]


def compared_with(rows: Sequence[TableRow]) -> list[str]:
    """The models with a known difference from the student, or from the first model."""
    return list(dict.fromkeys(role for row in rows for role in row.differences))


def figures_of(row: TableRow, roles: Sequence[str]) -> list[str]:
    """The cell of each model: its figure and, if there is one, its interval."""
    return [" ".join(cell_of(row, role)) for role in roles]


def cell_of(row: TableRow, role: str) -> list[str]:
    """A model's figure and, if there is one, its interval."""
    interval = [bracketed(row.intervals[role])] if role in row.intervals else []
    return [format_value(row.values.get(role), row.unit), *interval]


def difference_of(row: TableRow, role: str) -> str:
    """The difference in `differences`, with interval and p-value; "" if it is not known."""
    found = row.differences.get(role)
    return changed(found["difference"], found["interval"], found["p_value"]) if found else ""


def remarks(models: Mapping[str, Evaluated], bootstrap: Mapping[str, Any] | None) -> list[str]:
    """How it was measured, what was skipped, and the notes, each once."""
    lines: dict[str, None] = {}
    for role, found in models.items():
        where = f"{role}: {found['images']} images on {found['device']} in {found['precision']}"
        lines[f"{where}; {len(found['skipped'])} skipped"] = None
    for role, found in models.items():
        lines.update(dict.fromkeys(f"skipped: {name}" for name in found["skipped"][:5]))
        lines.update(dict.fromkeys(found["notes"]))
        if found["latency_ms"]:
            lines[_TIME] = None
            if not found.get("time_comparable", True):
                lines[_NOT_COMPARABLE.format(role=role)] = None
        if found["memory_bytes"] and found["memory_bytes"]["baseline"]:
            lines[_MEMORY] = None
    if len(models) > 1 and any(found["images"] == 1 for found in models.values()):
        lines[_ONE_IMAGE] = None
    if bootstrap:
        lines[remark(bootstrap["samples"], bootstrap["confidence"])] = None
        lines.update(dict.fromkeys(bootstrap["notes"]))
    return list(lines)


_TIME = (
    "Times are for one image at a time, the models taking turns, after warm-up; reading the image "
    "is timed separately."
)
_NOT_COMPARABLE = (
    "The time of {role} is not comparable: it is a wrapped model, which runs completely again for "
    "every word, because `wrap` has no faster way to decode with it."
)
_ONE_IMAGE = "A single image: there is no verdict on scores and times."
_MEMORY = (
    "Peak memory is that of a separate process for each model: the highest resident memory while "
    "loading and captioning, minus that after its imports and a first small operation."
)


class Progress:
    """A bar on a terminal, and elsewhere a line every `EVERY` seconds, on stderr.

    Args:
        name: What the lines begin with.
        show: False is silent.
    """

    EVERY = 10.0

    def __init__(self, name: str, show: bool = True) -> None:
        self.name, self.show = name, show
        self.last = time.monotonic()

    def over(self, batches: Iterator[Any], total: int | None) -> Iterator[Any]:
        """The batches, while they are counted in images."""
        if self.show and on_terminal():
            yield from self._with_bar(batches, total)
            return
        done = 0
        for batch in batches:
            yield batch
            done += batch.num_images
            self.say(f"{done:,} of {total:,} images" if total else f"{done:,} images")

    def _with_bar(self, batches: Iterator[Any], total: int | None) -> Iterator[Any]:
        from tqdm import tqdm

        with tqdm(total=total, desc=self.name, unit=" images", dynamic_ncols=True) as bar:
            for batch in batches:
                yield batch
                bar.update(batch.num_images)

    def say(self, text: str) -> None:
        """Print a line; off a terminal, only if there was none for a while."""
        now = time.monotonic()
        if self.show and (on_terminal() or now - self.last >= self.EVERY):
            report(f"{self.name}: {text}")
            self.last = now
