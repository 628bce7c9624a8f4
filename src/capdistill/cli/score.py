"""`capdistill evaluate` and `compare`, over the functions of the same names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.datasets import add_data_options, data_values, parse_data
from capdistill.cli.decoding import add_generation_options, generation_values
from capdistill.cli.output import DONE, give, require_writable, say
from capdistill.files import write_text

if TYPE_CHECKING:
    from capdistill.data import Splits

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
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="also write the captions as COCO results"
    )
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
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="draw N samples of the images, e.g. 1000, for intervals and p-values",
    )
    parser.add_argument(
        "--attention",
        type=int,
        default=0,
        metavar="N",
        help="draw where the models looked in the first N images (extra ui)",
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="draw the training curves of the runs that the directories lie in (extra ui)",
    )
    _add_options(parser)
    parser.set_defaults(run=run_compare)
    return parser


def run_evaluate(options: argparse.Namespace) -> int:
    """Score and measure one captioner."""
    from capdistill.captioner import Captioner
    from capdistill.evaluation import evaluate
    from capdistill.metrics import coco_results

    if options.captions:
        require_writable(options.captions.parent)
    captioner = Captioner.load(options.captioner)
    data = _data(options)
    found = evaluate(captioner, data.get(options.split), **_evaluation_options(options, data))
    if options.captions:
        write_text(options.captions, json.dumps(coco_results(found.captions)))
    give(options, found.to_json(), lambda: str(found))
    return DONE


def run_compare(options: argparse.Namespace) -> int:
    """Set two or three captioners side by side and write the report."""
    from capdistill.captioner import Captioner
    from capdistill.comparison import compare

    require_writable(options.out)
    teacher, student = Captioner.load(options.teacher), Captioner.load(options.student)
    baseline = Captioner.load(options.baseline) if options.baseline else None
    data = _data(options)
    split = data.get(options.split)
    how = {"bootstrap": options.bootstrap, **_evaluation_options(options, data)}
    how |= {"attention": options.attention, "histories": _histories(options)}
    found = compare(teacher, student, split, baseline, **how)
    page = found.save(options.out)
    give(options, found.to_json(), lambda: str(found))
    say(f"The report is in {page}")
    return DONE


def _histories(options: argparse.Namespace) -> dict[str, Path]:
    """Model -> the run that its directory lies in, where there is one."""
    if not options.curves:
        return {}
    runs = {role: getattr(options, role) for role in ("teacher", "student", "baseline")}
    found = {role: Path(given).parent for role, given in runs.items() if given}
    return {role: run for role, run in found.items() if (run / "history.jsonl").exists()}


def _data(options: argparse.Namespace) -> Splits:
    data = parse_data(data_values(options)).load()
    say(data.summary())
    return data


def _evaluation_options(options: argparse.Namespace, data: Splits) -> dict[str, Any]:
    names = ("batch_size", "device", "precision", "workers", "measure")
    given = {name: getattr(options, name) for name in names}
    whole = "train" in data and options.limit is None  # a part can not tell what is novel
    return {
        **given,
        "generation": generation_values(options) or None,
        "training_captions": data.train.captions if whole else None,
    }


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
    add_generation_options(parser)
