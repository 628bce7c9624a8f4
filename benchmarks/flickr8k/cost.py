"""Size, time of one image and peak memory: the ensemble against the student distilled from it.

    python benchmarks/flickr8k/cost.py --data flickr8k --out runs/table

The models caption the images one at a time and in turn; each one's memory is measured in a process
of its own. The rows must have been trained (`run.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rows import ROWS, TUNED, Run

import capdistill as cd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a Flickr8k directory")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="that of run.py")
    parser.add_argument("--student", choices=list(ROWS), default="student-best")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--beam-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = cd.data.Flickr8k(options.data)
    run = Run(data, None, options.out, options.student, 0, {})
    student, images = run.load(options.student), data.val.subset(options.images)
    print(cd.compare(run.teacher(TUNED), student, images, beam_size=options.beam_size))


if __name__ == "__main__":
    main()
