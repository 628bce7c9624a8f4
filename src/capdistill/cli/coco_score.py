"""`capdistill score`: the COCO tool's scores from its own files, over `CaptionScorer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capdistill.cli.output import DONE, as_json, columns, give
from capdistill.errors import ConfigError

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
        help="another system's results of the same images: intervals, differences, p-values",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help=f"with --against: samples of the images to draw (default: {_SAMPLES})",
    )
    parser.add_argument("--per-image", action="store_true", help="the scores of each image as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to a file")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Score the images that have a result; say how many have none."""
    from capdistill.cli.score_files import score_files
    from capdistill.files import write_text

    files = options.references, options.results
    _require_other_file(options.out, *files, *filter(None, [options.against]))
    found = score_files(*files, options.metrics, options.against, _samples(options))
    if not options.per_image:
        for system in _systems(found).values():
            del system["per_image"]
    if options.out:
        write_text(options.out, as_json(found) + "\n")
    give(options, found, lambda: _table(found))
    return DONE


def _samples(options: argparse.Namespace) -> int:
    """How many to draw; refused before the work where it is none, or there is nothing to draw."""
    from capdistill.metrics.significance import check_samples

    if options.bootstrap is None:
        return _SAMPLES
    if not options.against:
        raise ConfigError("--bootstrap compares two systems; name the other with --against FILE.")
    check_samples(options.bootstrap)
    return int(options.bootstrap)


def _require_other_file(out: Path | None, *inputs: str) -> None:
    if out and out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise ConfigError(f"--out {out} is a file that is read; give another name.")


def _systems(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results and, where given, those they are set against."""
    return {"results": found, **({"against": found["against"]} if "against" in found else {})}


def _table(found: dict[str, Any]) -> str:
    systems = _systems(found)
    parts = [_scores(found) if len(systems) == 1 else _side_by_side(found)]
    if "per_image" in found:
        alone = len(systems) == 1
        parts += [
            _per_image("image" if alone else f"image, {name}", each["per_image"])
            for name, each in systems.items()
        ]
    return "\n\n".join([*parts, "\n".join(_remarks(found, systems))])


def _scores(found: Mapping[str, Any]) -> str:
    return columns([(name, _figure(v)) for name, v in found["scores"].items()], right=[1])


def _side_by_side(found: Mapping[str, Any]) -> str:
    """A score a line; every built-in one has its intervals."""
    from capdistill.metrics.significance import bracketed, changed

    scores = {"results": found["scores"], "against": found["against"]["scores"]}
    rows = [("", *scores, "results minus against")]
    for name, ends in found["intervals"].items():
        both = [f"{_figure(each[name])} {bracketed(ends[s])}" for s, each in scores.items()]
        rows.append((name, *both, changed(**found["differences"][name])))
    return columns(rows)


def _per_image(head: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    images = list(next(iter(scores.values()), {}))
    rows = [(image, *(_figure(each[image]) for each in scores.values())) for image in images]
    return columns([(head, *scores), *rows], right=range(1, len(scores) + 1))


def _remarks(found: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    from capdistill.metrics.significance import remark

    images, without = found["images"], found["images_without_result"]
    lines = [f"{images} of {images + without} images have a result and are scored."]
    whose = {"results": "The captions use", "against": "Those they are set against use"}
    lines += [f"{whose[name]} {health_line(each['health'])}" for name, each in systems.items()]
    drawn = found.get("bootstrap")
    if drawn:
        lines += [remark(drawn["samples"], drawn["confidence"]), *drawn["notes"]]
    return [*lines, *found["notes"]]


def health_line(health: Mapping[str, Any]) -> str:
    """The captions' health in one line for readers."""
    return (
        f"{health['vocabulary']} different words, {health['mean_length']:.1f} a "
        f"caption; {health['distinct_captions']:.1%} are distinct, {health['repeats']:.1%} repeat "
        f"a pair of words, {health['empty']:.1%} are empty."
    )


def _figure(value: float) -> str:
    return f"{value:.4f}"
