"""Comparisons and evaluations for readers: plain text tables, and a page that stands alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from capdistill.evaluation.table import (
    _VERDICT,
    _against,
    _all_remarks,
    _cell,
    _difference,
)

if TYPE_CHECKING:
    from capdistill.evaluation.comparison import Comparison, Sample
    from capdistill.evaluation.table import Row


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


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6777; --paper: #f6f7f9;
  --card: #ffffff; --line: #dde2e9; --accent: #2457c5; --good: #17703a; --bad: #a3341f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf1; --soft: #9aa6b6; --paper: #12161d;
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
td:nth-last-child(-n+3), th:nth-last-child(-n+3) { text-align: left; white-space: normal; }
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
@media print { .wide, figure { break-inside: avoid; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Teacher and student, compared</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Teacher and student, compared</h1>
<p class="summary">{summary}</p>
<h2 id="figures">Figures</h2>
<div class="wide" role="region" aria-labelledby="figures" tabindex="0">
<table>
<caption>Scores on the same images; costs at one image at a time.</caption>
<thead><tr><th scope="col">Figure</th>{heads}<th scope="col">Student against teacher</th>
<th scope="col">Expected</th><th scope="col">Outcome</th></tr></thead>
<tbody>
{rows}</tbody>
</table>
</div>
<h2>How it was measured</h2>
<ul class="remarks">{remarks}</ul>
<h2>Captions</h2>
<p class="summary">Images spread evenly over the data, not chosen by how well they did.</p>
<div class="samples">
{samples}</div>
{pictures}</main>
</body>
</html>
"""

_SIDE = 192  # pixels


class Gallery:
    """Keeps between `wanted` and twice as many of the images it is offered, evenly spread.

    Example:
        >>> import torch
        >>> gallery = Gallery(wanted=2)
        >>> for i in range(9):
        ...     gallery.offer(str(i), torch.zeros(3, 4, 4, dtype=torch.uint8))
        >>> list(gallery.pictures())
        ['0', '8']

    Args:
        wanted: How many images `pictures` gives where there are enough.
    """

    def __init__(self, wanted: int = 12) -> None:
        self.wanted = wanted
        self._kept: list[tuple[str, Tensor]] = []
        self._stride, self._seen = 1, 0

    def offer(self, image: str, pixels: Tensor) -> None:
        """Keep this image or not. (3, H, W) uint8."""
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


def thumbnail(pixels: Tensor) -> str:
    """(3, H, W) uint8 pixels as a small JPEG in a `data:` address.

    Example:
        >>> import torch
        >>> thumbnail(torch.zeros(3, 8, 8, dtype=torch.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
