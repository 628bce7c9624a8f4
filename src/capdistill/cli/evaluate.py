"""`capdistill evaluate` and `compare`, over the functions of the same names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.common import (
    DONE,
    add_data_options,
    add_generation_options,
    as_json,
    columns,
    data_values,
    generation_values,
    give,
    parse_data,
    require_writable,
    say,
)
from capdistill.errors import ConfigError, DataError, require_int
from capdistill.files import write_text
from capdistill.metrics import CaptionScorer, Scores, diversity, read_coco_results
from capdistill.metrics.base import first
from capdistill.metrics.bootstrap import paired

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
    from capdistill.evaluation.evaluation import evaluate
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
    from capdistill.evaluation.comparison import compare

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
    names = ("batch_size", "device", "precision", "num_workers", "measure")
    given = {name: getattr(options, name) for name in names}
    whole = "train" in data and options.limit is None  # a part cannot tell what is novel
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
    group.add_argument("--num-workers", type=int, default=0, metavar="N", help="reading processes")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    group.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    group.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="scores only, without time, memory and size",
    )
    add_generation_options(parser)


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
    pass
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
    if options.bootstrap is None:
        return _SAMPLES
    if not options.against:
        raise ConfigError("--bootstrap compares two systems; name the other with --against FILE.")
    return require_int("--bootstrap", options.bootstrap, minimum=1)


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
    from capdistill.metrics.bootstrap import bracketed, changed

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
    from capdistill.metrics.bootstrap import remark

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


SCHEMA = "capdistill.scores/1"


def score_files(
    references: str,
    results: str,
    metrics: Sequence[str] | None,
    against: str | None = None,
    samples: int = 1000,
) -> dict[str, Any]:
    """What the JSON says of the files, scores of each image included.

    Args:
        references: A COCO captions file.
        results: The captions to score.
        metrics: As for `CaptionScorer`.
        against: Another system's captions of the same images.
        samples: Of the images, for the intervals of the two systems.

    Raises:
        DataError: as `read_coco_results`; or the two results are not of the same images.
    """
    read = read_coco_results(references, results)
    other = read_coco_results(references, against).captions if against else None
    if other is not None:
        _require_same_images(results, read.captions, str(against), other)
    scorer = CaptionScorer(read.references, metrics=metrics)
    scores = scorer(read.captions)
    found = {
        "schema": SCHEMA,
        "images": len(read.captions),
        "images_without_result": len(read.without),
        "notes": list(scores.notes),
        **_system(read.captions, scores),
    }
    if other is not None:
        systems = {"results": scores, "against": scorer(other)}
        found["against"] = _system(other, systems["against"])
        found |= _differences(systems, samples)
    return found


def _system(captions: Mapping[str, str], scores: Scores) -> dict[str, Any]:
    return {
        "scores": dict(scores),
        "health": diversity(captions).to_json(),
        "per_image": {name: dict(each) for name, each in scores.per_image.items()},
    }


def _differences(systems: Mapping[str, Scores], samples: int) -> dict[str, Any]:
    """The results' scores minus the other's, in the words of a comparison's rows."""
    drawn = paired(systems, [("against", "results")], samples)[0]
    settings = drawn.to_json()
    return {
        "bootstrap": {key: settings[key] for key in ("samples", "seed", "confidence", "notes")},
        "intervals": {
            name: {"results": list(each.b_interval), "against": list(each.a_interval)}
            for name, each in drawn.items()
        },
        "differences": {
            name: {
                "difference": each.difference,
                "interval": list(each.interval),
                "p_value": each.p_value,
            }
            for name, each in drawn.items()
        },
    }


def _require_same_images(
    results: str, ours: Mapping[str, str], against: str, theirs: Mapping[str, str]
) -> None:
    here = [image for image in ours if image not in theirs]
    there = [image for image in theirs if image not in ours]
    if here or there:
        raise DataError(
            f"{results} and {against} are not of the same images, so their scores cannot be "
            f"compared. Only in the first: {first(here)}. Only in the second: {first(there)}. Give "
            "both one caption for each of the same images; '' is a caption."
        )
