"""`capdistill score`: the COCO tool's scores from its own files, over `CaptionScorer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capdistill.cli.output import DONE, as_json, columns, give
from capdistill.errors import ConfigError

SCHEMA = "capdistill.scores/1"
_EXAMPLE = """\
  capdistill score captions_val2017.json results.json
  capdistill score captions_val2017.json results.json --metrics bleu cider_d
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
    parser.add_argument("--per-image", action="store_true", help="the scores of each image as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to a file")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Score the images that have a result; say how many have none."""
    from capdistill.files import write_text

    _require_other_file(options.out, options.references, options.results)
    found = score_files(options.references, options.results, options.metrics)
    if not options.per_image:
        del found["per_image"]
    if options.out:
        write_text(options.out, as_json(found) + "\n")
    give(options, found, lambda: _table(found))
    return DONE


def score_files(references: str, results: str, metrics: Sequence[str] | None) -> dict[str, Any]:
    """What the JSON says of two files, scores of each image included."""
    from capdistill.metrics import CaptionScorer, diversity
    from capdistill.metrics.coco_files import read_coco_results

    read = read_coco_results(references, results)
    scores = CaptionScorer(read.references, metrics=metrics)(read.captions)
    return {
        "schema": SCHEMA,
        "images": len(read.captions),
        "images_without_result": len(read.without),
        "scores": dict(scores),
        "health": diversity(read.captions).to_json(),
        "notes": list(scores.notes),
        "per_image": {name: dict(each) for name, each in scores.per_image.items()},
    }


def _require_other_file(out: Path | None, *inputs: str) -> None:
    if out and out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise ConfigError(f"--out {out} is a file that is read; give another name.")


def _table(found: Mapping[str, Any]) -> str:
    scores = [(name, _figure(value)) for name, value in found["scores"].items()]
    images, without = found["images"], found["images_without_result"]
    parts = [columns(scores, right=[1])]
    if "per_image" in found:
        parts.append(_per_image(found["per_image"]))
    counted = f"{images} of {images + without} images have a result and are scored."
    parts.append("\n".join([counted, health_line(found["health"]), *found["notes"]]))
    return "\n\n".join(parts)


def _per_image(scores: Mapping[str, Mapping[str, float]]) -> str:
    images = list(next(iter(scores.values()), {}))
    rows = [(image, *(_figure(each[image]) for each in scores.values())) for image in images]
    return columns([("image", *scores), *rows], right=range(1, len(scores) + 1))


def health_line(health: Mapping[str, Any]) -> str:
    """The captions' health in one line for readers."""
    return (
        f"The captions use {health['vocabulary']} different words, {health['mean_length']:.1f} a "
        f"caption; {health['distinct_captions']:.1%} are distinct, {health['repeats']:.1%} repeat "
        f"a pair of words, {health['empty']:.1%} are empty."
    )


def _figure(value: float) -> str:
    return f"{value:.4f}"
