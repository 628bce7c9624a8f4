"""`capdistill evaluate` and `compare`, over the functions of the same names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capdistill.cli.datasets import add_data_options, data_values, parse_data
from capdistill.cli.output import DONE, give, require_writable, say

if TYPE_CHECKING:
    from capdistill.data import CaptionData

_EVALUATE = """\
  capdistill evaluate runs/student/best --data flickr8k --split test
  capdistill evaluate runs/student/best --data flickr8k --json > scores.json"""
_COMPARE = """\
  capdistill compare runs/teacher/best runs/student/best --baseline runs/ce/best \\
      --data flickr8k --out runs/report"""


def evaluate_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `evaluate`."""
    parser = add(example=_EVALUATE)
    parser.add_argument("captioner", metavar="DIR", help="a saved captioner, e.g. RUN/best")
    _add_options(parser)
    parser.set_defaults(run=run_evaluate)
    return parser


def compare_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `compare`."""
    parser = add(example=_COMPARE)
    parser.add_argument("teacher", metavar="TEACHER", help="directory of the saved teacher")
    parser.add_argument("student", metavar="STUDENT", help="directory of the saved student")
    parser.add_argument(
        "--baseline", metavar="DIR", help="the same student trained by cross-entropy alone"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="of report.json, report.html")
    _add_options(parser)
    parser.set_defaults(run=run_compare)
    return parser


def run_evaluate(options: argparse.Namespace) -> int:
    """Score and measure one captioner."""
    from capdistill.captioner import Captioner
    from capdistill.evaluation import evaluate

    captioner = Captioner.load(options.captioner)
    found = evaluate(captioner, _data(options), **_evaluation_options(options))
    give(options, found.to_json(), lambda: str(found))
    return DONE


def run_compare(options: argparse.Namespace) -> int:
    """Set two or three captioners side by side and write the report."""
    from capdistill.captioner import Captioner
    from capdistill.comparison import compare

    require_writable(options.out)
    teacher, student = Captioner.load(options.teacher), Captioner.load(options.student)
    baseline = Captioner.load(options.baseline) if options.baseline else None
    found = compare(teacher, student, _data(options), baseline, **_evaluation_options(options))
    page = found.save(options.out)
    give(options, found.to_json(), lambda: str(found))
    say(f"The report is in {page}")
    return DONE


def _data(options: argparse.Namespace) -> CaptionData:
    data = parse_data(data_values(options)).load()
    say(data.summary())
    return data.get(options.split)


def _evaluation_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "device", "precision", "workers", "measure")
    return {name: getattr(options, name) for name in names}


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_data_options(parser)
    parser.add_argument("--split", default="val", help="of the data (default: %(default)s)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="reading processes")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    group.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    group.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="scores only, without time, memory and size",
    )
