"""Comparisons and evaluations for readers: plain text tables, and a page that stands alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capdistill.report_page import PAGE, STYLE

if TYPE_CHECKING:
    from capdistill.comparison import Comparison, Row, Sample
    from capdistill.evaluation import Evaluation

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
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return {"share": f"{100 * value:.1f} %", "ms": f"{value:.1f} ms"}.get(unit, f"{value:.4f}")


def plain_table(found: Mapping[str, Evaluation]) -> str:
    """Evaluations as a plain text table, one column each."""
    from capdistill.comparison import figures

    models = {name: each.to_json() for name, each in found.items()}
    return "\n".join([*_grid(figures(found), list(found), judged=False), *_remarks(models)])


def text_table(comparison: Comparison) -> str:
    """A comparison as a plain text table."""
    lines = _grid(comparison.rows, list(comparison.models), judged=True)
    return "\n".join([*lines, *_remarks(comparison.models)])


def page(comparison: Comparison) -> str:
    """A comparison as one HTML page that fetches nothing."""
    models = comparison.models
    names = {role: models[role]["name"] for role in models}
    return PAGE.format(
        style=STYLE,
        summary=html.escape(_summary(comparison)),
        heads="".join(_head(role, names[role]) for role in models),
        rows="".join(_table_row(row, list(models)) for row in comparison.rows),
        remarks="".join(f"<li>{html.escape(remark)}</li>" for remark in _remarks(models)),
        samples="".join(_figure(sample) for sample in comparison.samples),
    )


def _grid(rows: Sequence[Row], roles: Sequence[str], judged: bool) -> list[str]:
    head = ["", *roles, *(["student against teacher", "expected", ""] if judged else [])]
    table = [head]
    for row in rows:
        cells = [row.label, *(figure(row.values.get(role), row.unit) for role in roles)]
        table.append(
            cells + ([row.relation, row.expected, _VERDICT[row.reached]] if judged else [])
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    last = len(roles)
    return [
        "  ".join(
            cell.rjust(width) if 0 < i <= last else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


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


def _summary(comparison: Comparison) -> str:
    judged = [row for row in comparison.rows if row.reached is not None]
    kept = sum(bool(row.reached) for row in judged)
    images = comparison.models["student"]["images"]
    return f"{images} images; {kept} of {len(judged)} expectations reached."


def _head(role: str, name: str) -> str:
    return f'<th scope="col">{html.escape(role)}<small>{html.escape(str(name))}</small></th>'


def _table_row(row: Row, roles: Sequence[str]) -> str:
    cells = "".join(f"<td>{html.escape(figure(row.values.get(r), row.unit))}</td>" for r in roles)
    verdict = _VERDICT[row.reached]
    mark = f'<span class="{verdict.replace(" ", "-")}">{verdict}</span>' if verdict else ""
    words = f"<td>{html.escape(row.relation)}</td><td>{html.escape(row.expected)}</td>"
    return f'<tr><th scope="row">{html.escape(row.label)}</th>{cells}{words}<td>{mark}</td></tr>\n'


def _figure(sample: Sample) -> str:
    said = "".join(
        f"<dt>{html.escape(role)}</dt><dd>{html.escape(text) or '<em>(empty)</em>'}</dd>"
        for role, text in sample.captions.items()
    )
    people = "".join(f"<li>{html.escape(text)}</li>" for text in sample.references)
    source, name = html.escape(sample.picture), html.escape(sample.image_id)
    return (
        f'<figure><img src="{source}" alt="The image {name}"><figcaption><h3>{name}</h3>'
        f"<dl>{said}</dl><details><summary>References</summary><ul>{people}</ul></details>"
        "</figcaption></figure>\n"
    )
