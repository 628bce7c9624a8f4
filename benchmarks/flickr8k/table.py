"""The table of docs/results.md from the results of `run.py`.

    python benchmarks/flickr8k/table.py runs/table                         # Markdown
    python benchmarks/flickr8k/table.py runs/table --picture results.svg   # needs the extra ui

A row with several seeds shows the mean and, in brackets, the lowest and the highest seed. The last
column is the difference to the student by cross-entropy of the same seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from rows import ROWS, SWEEPS

Result = dict[str, Any]
BASE = "student-ce"
SCORES = {"BLEU-1": "bleu_1", "BLEU-4": "bleu_4", "CIDEr-D": "cider_d"}
HEALTH = {
    "words": "vocabulary",
    "distinct": "distinct_captions",
    "repeats": "repeats",
    "cut short": "cut_short",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the directory of run.py")
    parser.add_argument("--picture", type=Path, help="write a picture of the table to this file")
    options = parser.parse_args()
    found = read(options.out)
    sweeps = {name: each for name, each in found.items() if name in SWEEPS}
    results = {name: each for name, each in found.items() if name not in SWEEPS}
    for search in ("greedy", "beam 5"):
        print(f"\n**{search}**\n\n{table(results, search)}")
    print(f"\n**Short runs**\n\n{short_runs(sweeps)}")
    if options.picture:
        picture(results, options.picture)


def read(out: Path) -> dict[str, list[Result]]:
    """The results of every row, in the order of the rows."""
    found = {name: [out / name / f"seed{s}" / "result.json" for s in row.seeds]
             for name, row in ROWS.items()}  # fmt: skip
    read_ = {n: [json.loads(p.read_text()) for p in paths if p.exists()]
             for n, paths in found.items()}  # fmt: skip
    return {name: each for name, each in read_.items() if each}


def table(results: dict[str, list[Result]], search: str) -> str:
    """A Markdown table of one search."""
    base = {each["seed"]: each[search]["scores"]["cider_d"] for each in results.get(BASE, [])}
    header = ["row", "seeds", "M parameters", *SCORES, "minus cross-entropy", *HEALTH, "minutes"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, each in results.items():
        gains = [
            r[search]["scores"]["cider_d"] - base[r["seed"]]
            for r in each
            if name.startswith("student") and name != BASE and r["seed"] in base
        ]
        cells = [
            ROWS[name].title,
            str(len(each)),
            f"{each[0]['parameters'] / 1e6:.2f}",
            *(spread([r[search]["scores"][key] for r in each], three) for key in SCORES.values()),
            spread(gains, signed) if gains else "",
            *(spread([r[search]["health"][k] for r in each], plain) for k in HEALTH.values()),
            f"{fmean(r['minutes'] for r in each):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_runs(results: dict[str, list[Result]]) -> str:
    """A Markdown table of the runs that differ in one thing, both searches."""
    header = ["run", "CIDEr-D, greedy", "five beams", "words", "distinct", "repeats"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, (each,) in results.items():
        health = each["greedy"]["health"]
        cells = [
            ROWS[name].title,
            *(three(each[search]["scores"]["cider_d"]) for search in ("greedy", "beam 5")),
            *(plain(health[key]) for key in ("vocabulary", "distinct_captions", "repeats")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: dict[str, list[Result]], path: Path) -> None:
    """Score and variety of every row, both searches; small dots are seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 0.32 * len(results)), layout="constrained")
    score, variety = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for search, colour in (("greedy", "tab:blue"), ("beam 5", "tab:orange")):
        for place, each in enumerate(results.values()):
            found = [r[search] for r in each]
            scores = [r["scores"]["cider_d"] for r in found]
            distinct = [r["health"]["distinct_captions"] * 100 for r in found]
            for axes, values in ((score, scores), (variety, distinct)):
                axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.5, markersize=4)
                label = search if place == 0 else None
                axes.plot(fmean(values), place, "o", color=colour, markersize=7, label=label)
    score.set_yticks(range(len(results)), [ROWS[name].title for name in results], size=8)
    score.invert_yaxis()
    score.set_xlabel("CIDEr-D")
    score.legend(loc="lower left")
    variety.set_xlabel("distinct captions, %")
    for axes in (score, variety):
        axes.grid(axis="x", alpha=0.3)
        axes.grid(axis="y", alpha=0.15)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "results"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def spread(values: list[float], show: Callable[[float], str]) -> str:
    """The mean, and the lowest and highest of several."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(fmean(values))} [{show(min(values))}, {show(max(values))}]"


def three(value: float) -> str:
    return f"{value:.3f}"[1:] if 0 <= value < 1 else f"{value:.3f}"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def plain(value: float) -> str:
    return f"{value:.0f}" if value > 1 else f"{value:.1%}"


if __name__ == "__main__":
    main()
