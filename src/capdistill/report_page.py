"""The frame and the style of the report's page; `report` fills it."""

from __future__ import annotations

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
