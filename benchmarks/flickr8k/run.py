"""Train and evaluate one row of the table of docs/results.md.

    python benchmarks/flickr8k/run.py student-token --data flickr8k --out runs/table --seed 1

Rows that it needs are trained first. A run that was stopped goes on; a row that is complete is not
trained again. `--weights DIR` reads the encoders' weights from files instead of timm's hub.
`--list` names the rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rows import ROWS, Run, seed_of

import capdistill as cd

SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "beam 5": {"beam_size": 5}}


def main() -> None:
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{name:24s} {row.title}, seeds {row.seeds}" for name, row in ROWS.items()))
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    data = cd.data.Flickr8k(options.data)
    found = make(options.row, options.seed, data, options)
    print(json.dumps(found), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", nargs="?", choices=list(ROWS))
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--data", type=Path, help="a Flickr8k directory")
    parser.add_argument("--weights", type=Path, help="directory of encoder weights")
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--seed", type=int, help="a seed of the row (default: its first)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="JSON, training options")
    options = parser.parse_args()
    if not options.list and (options.row is None or options.data is None):
        parser.error("give a row and --data, or --list")
    return options


def make(name: str, seed: int | None, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a row; trains and evaluates what is missing."""
    row = ROWS[name]
    seed = row.seeds[0] if seed is None else seed
    run = Run(data, options.weights, options.out, name, seed, options.set)
    result = run.directory / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    for needed in row.needs:
        make(needed, seed_of(needed, seed), data, options)
    print(f"== {name}, seed {seed}: {row.title}", flush=True)
    model = row.make(run)
    found = {
        "row": name,
        "title": row.title,
        "seed": seed,
        "minutes": minutes(run.directory),
        "parameters": model.num_parameters(),
        **{search: evaluated(model, data, how) for search, how in SEARCHES.items()},
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(found, indent=1))
    return found


def minutes(directory: Path) -> float:
    """Minutes of all epochs below a directory, in however many sessions they were trained."""
    histories = map(cd.training.History.load, directory.rglob("history.jsonl"))
    return sum(epoch["seconds"] for history in histories for epoch in history.epochs) / 60


def evaluated(model: Any, data: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Scores and health of the captions of the development images."""
    found = cd.evaluate(
        model,
        data.val,
        metrics=["bleu", "rouge_l", "cider_d"],
        measure=False,
        training_captions=data.train.captions,
        **how,
    )
    assert found.health is not None
    return {"scores": dict(found.scores), "health": found.health.to_json()}


if __name__ == "__main__":
    main()
