"""A comparison as a self-contained HTML page, and the images that it shows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from capdistill.evaluation.table import (
    TableRow,
    are_judged,
    cell_of,
    compared_pairs,
    compared_with,
    difference_of,
    remarks,
)
from capdistill.generation.hypotheses import thumbnail


def page(content: Mapping[str, Any]) -> str:
    """A comparison as one HTML page that fetches nothing.

    Args:
        content: As `Comparison.to_json` gives it.
    """
    lines = remarks(content["models"], content.get("bootstrap"))
    judged = are_judged(content["models"])
    return PAGE.format(
        style=STYLE,
        title="Teacher and student, compared" if judged else "Captioners, compared",
        summary=html.escape(summary(content)),
        table=_table(content),
        remarks="".join(f"<li>{html.escape(text)}</li>" for text in lines),
        samples="".join(map(_figure, content["samples"])),
        pictures=_pictures(content["pictures"]),
    )


def fragment(content: Mapping[str, Any]) -> str:
    """A comparison as HTML for a notebook: its summary and its table, without styles."""
    return f"<p>{html.escape(summary(content))}</p>\n<table>{_table(content)}</table>"


def summary(content: Mapping[str, Any]) -> str:
    """One sentence: how many images, and how many expectations are reached, if there are any."""
    models = content["models"]
    images = next(iter(models.values()))["images"]
    if not are_judged(models):
        return f"{images} images; {len(models)} models."
    judged = [row for row in content["rows"] if row["reached"] is not None]
    reached = sum(bool(row["reached"]) for row in judged)
    return f"{images} images; {reached} of {len(judged)} expectations reached."


def _table(content: Mapping[str, Any]) -> str:
    rows = [TableRow(**row) for row in content["rows"]]
    models, against = content["models"], compared_with(rows)
    heads = [_head(role, str(found["name"])) for role, found in models.items()]
    pairs, judged = compared_pairs(list(models)), are_judged(models)
    heads += [_head("{1} minus {0}".format(*pairs[role])) for role in against]
    if judged:
        names = ("Student against teacher", "Published recipe expects", "Verdict")
        heads += [_head(name, words=True) for name in names]
    body = "".join(_table_row(row, list(models), against, judged) for row in rows)
    return (
        f'<thead><tr><th scope="col">Figure</th>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>"
    )


def _head(role: str, name: str = "", words: bool = False) -> str:
    kind = ' class="words"' * words
    return f'<th scope="col"{kind}>{_with_small([role, name] if name else [role])}</th>'


def _table_row(row: TableRow, roles: Sequence[str], against: Sequence[str], judged: bool) -> str:
    cells = "".join(f"<td>{_with_small(cell_of(row, role))}</td>" for role in roles)
    for role in against:
        difference, _, certainty = difference_of(row, role).partition(" ")
        cells += f"<td>{_with_small([difference, certainty] if certainty else [difference])}</td>"
    if judged:
        mark = row.verdict
        if mark:
            mark = f'<span class="{mark.replace(" ", "-")}">{mark}</span>'
        words = (html.escape(row.relation), html.escape(row.expected), mark)
        cells += "".join(f'<td class="words">{each}</td>' for each in words)
    return f'<tr><th scope="row">{html.escape(row.label)}</th>{cells}</tr>\n'


def _with_small(parts: Sequence[str]) -> str:
    """The first part in normal size, the others small below it."""
    first, *others = map(html.escape, parts)
    return first + "".join(f"<small>{other}</small>" for other in others)


def _pictures(pictures: Mapping[str, str]) -> str:
    """The section of pictures; "" without any."""
    shown = "".join(
        f'<figure class="whole"><img src="{html.escape(source)}" alt="{html.escape(title)}">'
        f"<figcaption><h3>{html.escape(title)}</h3></figcaption></figure>\n"
        for title, source in pictures.items()
    )
    return f"<h2>Pictures</h2>\n{shown}" if shown else ""


def _figure(sample: Mapping[str, Any]) -> str:
    captions = "".join(
        f"<dt>{html.escape(role)}</dt><dd>{html.escape(text) or '<em>(empty)</em>'}</dd>"
        for role, text in sample["captions"].items()
    )
    references = "".join(f"<li>{html.escape(text)}</li>" for text in sample["references"])
    source, name = html.escape(sample["picture"]), html.escape(sample["image_id"])
    return (
        f'<figure><img src="{source}" alt="The image {name}"><figcaption><h3>{name}</h3>'
        f"<dl>{captions}</dl><details><summary>References</summary><ul>{references}</ul></details>"
        "</figcaption></figure>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6777; --paper: #f6f7f9;
  --card: #ffffff; --line: #dde2e9; --accent: #2457c5; --good: #17703a; --bad: #a3341f; }
@media screen and (prefers-color-scheme: dark) { :root {
  --ink: #e7ebf1; --soft: #9aa6b6; --paper: #12161d;
  --card: #1a202a; --line: #2c3544; --accent: #8ab0ff; --good: #6fd394; --bad: #ff9d87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .85rem; margin: 0 0 .5rem; color: var(--soft); overflow-wrap: anywhere; }
.summary { color: var(--soft); margin: 0; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .75rem 1rem; color: var(--soft); }
th, td { padding: .55rem .7rem; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
th[scope=row], th[scope=col]:first-child { text-align: left; font-weight: 600; }
td.words, th.words { text-align: left; white-space: normal; }
th small, td small { display: block; font-weight: 400; color: var(--soft); }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 7%, transparent); }
.reached, .not-reached { font-weight: 600; border: 1px solid currentColor; border-radius: 1rem;
  padding: .1rem .6rem; font-size: .85rem; white-space: nowrap; }
.reached { color: var(--good); } .not-reached { color: var(--bad); }
.samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  overflow: hidden; }
figure img { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: cover; }
figure.whole { margin: 1rem 0; }
figure.whole img { aspect-ratio: auto; background: #fff; }
figcaption { padding: .9rem 1rem 1rem; }
dl { margin: 0; } dt { font-size: .75rem; text-transform: uppercase; letter-spacing: .05em;
  color: var(--accent); } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); } ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.remarks { color: var(--soft); font-size: .92rem; overflow-wrap: anywhere; }
@media print {
  @page { margin: 12mm; }
  :root { color-scheme: light; --paper: #ffffff; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; border: 0; border-radius: 0; }
  table { font-size: 7.5pt; }
  th, td { white-space: normal; overflow-wrap: break-word; padding: .15rem .25rem; }
  .reached, .not-reached { white-space: normal; border: 0; padding: 0; font-size: 1em; }
  thead { display: table-header-group; }
  tr, figure, li { break-inside: avoid; }
  h1, h2, h3, caption, .summary { break-after: avoid; }
  h2 { margin-top: 1.2rem; }
  .samples { grid-template-columns: repeat(3, 1fr); gap: .6rem; }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
<h2 id="figures">Figures</h2>
<div class="wide" role="region" aria-labelledby="figures" tabindex="0">
<table>
<caption>Scores on the same images; costs at one image at a time.</caption>
{table}
</table>
</div>
<h2>How it was measured</h2>
<ul class="remarks">{remarks}</ul>
<h2>Captions</h2>
<p class="summary">Images spread evenly over the data, not chosen by quality.</p>
<div class="samples">
{samples}</div>
{pictures}</main>
</body>
</html>
"""


class Gallery:
    """Keeps between `wanted` and twice as many of the images offered to it, evenly spread.

    Example:
        >>> import torch
        >>> gallery = Gallery(wanted=2)
        >>> for i in range(9):
        ...     gallery.offer(str(i), torch.zeros(3, 4, 4, dtype=torch.uint8))
        >>> list(gallery.pictures())
        ['0', '8']

    Args:
        wanted: Number of images that `pictures` gives if there are enough.
    """

    def __init__(self, wanted: int = 12) -> None:
        self.wanted = wanted
        self._kept: list[tuple[str, Tensor]] = []
        self._stride, self._seen = 1, 0

    def offer(self, image: str, pixels: Tensor) -> None:
        """Keep an image, (3, H, W) uint8, or not."""
        if self._seen % self._stride == 0:
            self._kept.append((image, pixels.cpu().clone()))
        self._seen += 1
        if len(self._kept) > 2 * self.wanted:
            self._kept = self._kept[::2]
            self._stride *= 2

    def pictures(self) -> dict[str, str]:
        """Image id -> its thumbnail as a `data:` address."""
        spread = (len(self._kept) - 1) / max(1, self.wanted - 1)
        chosen = sorted({round(i * max(spread, 1.0)) for i in range(self.wanted)})
        kept = [self._kept[i] for i in chosen if i < len(self._kept)]
        return {image: thumbnail(pixels) for image, pixels in kept}
