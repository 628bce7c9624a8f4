"""Thousands of damaged files for every reader: our errors only, in bounded time and memory.

    python benchmarks/fuzz.py                     # 2,000 cases of each kind, about an hour
    python benchmarks/fuzz.py --cases 300 --only "run file" coco

A case that fails is made as small as possible, shown, and kept in `.hypothesis`, where the next run
tries it first. The table shows how many files were read and refused, and the slowest case.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capdistill import encoders
from tests.fuzz_targets import attempt, targets
from tests.toy_captioner import Patches


def run(name: str, target: Any, ways: Any, cases: int, folder: Path) -> bool:
    """Try one kind of file, and print a row of the table; whether all cases were fine."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    seeds = target.seeds()

    def tried(content: bytes) -> None:
        nonlocal slowest
        began = time.process_time()
        outcomes[attempt(target, folder, content)] += 1
        slowest = max(slowest, time.process_time() - began)

    tried.__qualname__ = f"fuzz.{name}"  # the key of its examples
    search = settings(
        max_examples=cases,
        deadline=None,
        database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
        suppress_health_check=list(HealthCheck),
    )(given(st.one_of([way(seeds) for way in ways]))(tried))
    try:
        search()
        fine = True
    except Exception:
        traceback.print_exc()
        fine = False
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    shown = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(
        f"{name:<22} {'ok ' if fine else 'BAD'} {slowest:7.2f} s {peak:6} MB  {shown}", flush=True
    )
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--only", nargs="+", default=[], help="names of kinds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    encoders.register("toy-patches")(Patches)
    with tempfile.TemporaryDirectory() as folder:
        every = targets(Path(folder) / "beside")
        chosen = {name: each for name, each in every.items() if name in (options.only or every)}
        results = []
        for number, (name, (target, ways)) in enumerate(chosen.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            results.append(run(name, target, ways, options.cases, place))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
