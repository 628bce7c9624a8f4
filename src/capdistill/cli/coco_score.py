"""`capdistill score`: the COCO tool's scores from its own files, over `CaptionScorer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capdistill.cli.output import DONE, as_json, columns, give
from capdistill.errors import ConfigError

SCHEMA = "capdistill.scores/1"
_SAMPLES = 1000
_EXAMPLE = """\
  capdistill score captions_val2017.json results.json
  capdistill score captions_val2017.json results.json --metrics bleu cider_d
  capdistill score captions_val2017.json student.json --against teacher.json
  capdistill score captions_val2017.json results.json --json --per-image > scores.json"""


def score_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `score`."""
    parser = add(example=_EXAMPLE)
    parser.add_argument("references", metavar="REFERENCES", help="a COCO captions file")
    parser.add_argument(
        "results", metavar="RESULTS", help='a list of {"image_id": ..., "caption": ...}'
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="such as bleu cider_d (default: all)"
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="another system's results of the same images: differences, intervals, p-values",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help=f"samples of the images that these are drawn from (default: {_SAMPLES})",
    )
    parser.add_argument("--per-image", action="store_true", help="the scores of each image as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to a file")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Score the images that have a result; say how many have none."""
    from capdistill.files import write_text

    read = [options.references, options.results, *filter(None, [options.against])]
    _require_other_file(options.out, *read)
    samples = _samples(options)
    found = score_files(*read[:2], options.metrics, options.against, samples)
    if not options.per_image:
        _drop_per_image(found)
    if options.out:
        write_text(options.out, as_json(found) + "\n")
    give(options, found, lambda: _table(found, options.against))
    return DONE


def score_files(
    references: str,
    results: str,
    metrics: Sequence[str] | None,
    against: str | None = None,
    samples: int = _SAMPLES,
) -> dict[str, Any]:
    """What the JSON says of two files, or of three, scores of each image included."""
    from capdistill.cli.coco_against import set_against
    from capdistill.metrics import CaptionScorer, read_coco_results

    read = read_coco_results(references, results)
    other = read_coco_results(references, against) if against else None
    scorer = CaptionScorer(read.references, metrics=metrics)
    scores = scorer(read.captions)
    found = {
        "schema": SCHEMA,
        "images": len(read.captions),
        "images_without_result": len(read.without),
        **scored(read.captions, scores),
        "notes": list(scores.notes),
    }
    if other:
        _require_same_images(results, read.captions, str(against), other.captions)
        both = (read.captions, scores), (other.captions, scorer(other.captions))
        found["against"] = set_against(read.references, *both, samples)
    return found


def scored(captions: Mapping[str, str], scores: Any) -> dict[str, Any]:
    """One system's scores and health as plain data."""
    from capdistill.metrics import diversity

    return {
        "scores": dict(scores),
        "health": diversity(captions).to_json(),
        "per_image": {name: dict(each) for name, each in scores.per_image.items()},
    }
