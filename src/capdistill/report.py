"""Comparisons and evaluations for readers: plain text tables, and a page that stands alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capdistill.metrics.significance import bracketed, changed, remark
from capdistill.report_page import PAGE, STYLE

if TYPE_CHECKING:
    from capdistill.comparison import Comparison, Sample
    from capdistill.evaluation import Evaluation
    from capdistill.figures import Row

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
    from capdistill.figures import figures

    models = {name: each.to_json() for name, each in found.items()}
    return "\n".join([*_grid(figures(found), list(found), judged=False), *_remarks(models)])


def text_table(comparison: Comparison) -> str:
    """A comparison as a plain text table."""
    lines = _grid(comparison.rows, list(comparison.models), judged=True)
    return "\n".join([*lines, *_differences(comparison.rows), *_all_remarks(comparison)])


def page(comparison: Comparison) -> str:
    """A comparison as one HTML page that fetches nothing."""
    models = comparison.models
    names = {role: models[role]["name"] for role in models}
    against = _against(comparison.rows)
    heads = [_head(role, names[role]) for role in models]
    heads += [_head(f"student minus {role}") for role in against]
    return PAGE.format(
        style=STYLE,
        summary=html.escape(_summary(comparison)),
        heads="".join(heads),
        rows="".join(_table_row(row, list(models), against) for row in comparison.rows),
        remarks="".join(f"<li>{html.escape(text)}</li>" for text in _all_remarks(comparison)),
        samples="".join(_figure(sample) for sample in comparison.samples),
        pictures=_pictures(comparison.pictures),
    )


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


def _summary(comparison: Comparison) -> str:
    judged = [row for row in comparison.rows if row.reached is not None]
    kept = sum(bool(row.reached) for row in judged)
    images = comparison.models["student"]["images"]
    return f"{images} images; {kept} of {len(judged)} expectations reached."


def _head(role: str, name: str = "") -> str:
    return f'<th scope="col">{_with_small([role, str(name)] if name else [role])}</th>'


def _table_row(row: Row, roles: Sequence[str], against: Sequence[str]) -> str:
    cells = "".join(f"<td>{_with_small(_cell(row, role))}</td>" for role in roles)
    for role in against:
        whole, _, sure = _difference(row, role).partition(" ")
        cells += f"<td>{_with_small([whole, sure] if sure else [whole])}</td>"
    verdict = _VERDICT[row.reached]
    mark = f'<span class="{verdict.replace(" ", "-")}">{verdict}</span>' if verdict else ""
    words = f"<td>{html.escape(row.relation)}</td><td>{html.escape(row.expected)}</td>"
    return f'<tr><th scope="row">{html.escape(row.label)}</th>{cells}{words}<td>{mark}</td></tr>\n'


def _with_small(parts: Sequence[str]) -> str:
    """The first as it is, the others small below it."""
    first, *others = map(html.escape, parts)
    return first + "".join(f"<small>{other}</small>" for other in others)


def _pictures(pictures: Mapping[str, str]) -> str:
    """A section of its own, where there are any."""
    shown = "".join(
        f'<figure class="whole"><img src="{html.escape(source)}" alt="{html.escape(title)}">'
        f"<figcaption><h3>{html.escape(title)}</h3></figcaption></figure>\n"
        for title, source in pictures.items()
    )
    return f"<h2>Pictures</h2>\n{shown}" if shown else ""


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
