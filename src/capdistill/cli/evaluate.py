"""`capdistill evaluate`, `compare` and `score`: scores of models and of caption files."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, as_json, columns, print_result, print_status
from capdistill.cli.common import (
    add_data_options,
    add_generation_options,
    add_metrics_option,
    captioner_directory,
    data_values,
    generation_values,
    metric_names,
    named_directories,
    require_writable,
)
from capdistill.cli.data import parse_data
from capdistill.errors import ConfigError, DataError, require_int
from capdistill.files import user_path, write_text

if TYPE_CHECKING:
    from capdistill.data import Splits
    from capdistill.metrics import Scores

_EVALUATE = """\
example:
  capdistill evaluate runs/student --data flickr8k --split test
  capdistill evaluate runs/student --data flickr8k --metrics bleu,cider_d,meteor_1_5
  capdistill evaluate runs/student --data flickr8k --json > scores.json"""
_COMPARE = """\
example:
  capdistill compare runs/teacher runs/student --data flickr8k --out runs/report
  capdistill compare runs/teacher runs/student --baseline runs/ce --data flickr8k --out runs/report
  capdistill compare runs/teacher runs/a runs/b c=runs/old --data flickr8k --out runs/report"""
_SCORE = """\
example:
  capdistill score captions_val2017.json results.json
  capdistill score captions_val2017.json results.json --metrics bleu,cider_d
  capdistill score captions_val2017.json student.json --against teacher.json
  capdistill score captions_val2017.json results.json --json --per-image > scores.json"""
SCHEMA = "capdistill.scores/1"
_SAMPLES = 1000


def evaluate_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.description = _EVALUATE
    parser.usage = "capdistill evaluate DIR --data PATH [options]"
    parser.add_argument("captioner", metavar="DIR", help="a run's or a saved captioner's directory")
    parser.add_argument(
        "--captions", metavar="FILE", help="also write the captions as a COCO results file"
    )
    _add_options(parser)
    parser.set_defaults(run=run_evaluate)


def compare_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.description = _COMPARE
    parser.usage = "capdistill compare TEACHER STUDENT ... --data PATH --out DIR [options]"
    text = "the teacher: a run's or a saved captioner's directory"
    parser.add_argument("teacher", metavar="TEACHER", help=text)
    text = "the student, or several; NAME=DIR names one"
    parser.add_argument("students", metavar="STUDENT", nargs="+", help=text)
    parser.add_argument(
        "--baseline", metavar="DIR", help="the same student trained by cross-entropy alone"
    )
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="the folder for report.json and report.html"
    )
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
        help="draw attention maps for N images (needs the extra ui)",
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="draw the training curves of the models' runs (needs the extra ui)",
    )
    _add_options(parser)
    parser.set_defaults(run=run_compare)


def run_evaluate(options: argparse.Namespace) -> int:
    """Score and measure one captioner."""
    from capdistill.evaluation.evaluation import evaluate
    from capdistill.metrics import coco_results
    from capdistill.teachers.ensemble import load

    captions = user_path(options.captions) if options.captions else None
    if captions:
        require_writable(captions.parent)
    directory, metrics = captioner_directory(options.captioner), metric_names(options)
    captioner = load(directory)
    data = _data(options)
    result = evaluate(
        captioner, data.get(options.split), metrics=metrics, **_evaluation_options(options, data)
    )
    if captions:
        write_text(captions, json.dumps(coco_results(result.captions)))
    print_result(options, result.to_json(), lambda: str(result))
    return DONE


def run_compare(options: argparse.Namespace) -> int:
    """Compare captioners and write the report."""
    from capdistill.evaluation.comparison import compare
    from capdistill.teachers.ensemble import load

    out, metrics = user_path(options.out), metric_names(options)
    require_writable(out)
    given = {"teacher": options.teacher, **named_directories(options.students)}
    given |= {"baseline": options.baseline} if options.baseline else {}
    directories = {role: captioner_directory(each) for role, each in given.items()}
    histories = _histories(directories) if options.curves else {}
    models = {role: load(directory) for role, directory in directories.items()}
    data = _data(options)
    teacher, baseline = models.pop("teacher"), models.pop("baseline", None)
    result = compare(
        teacher,
        models,
        data.get(options.split),
        baseline,
        bootstrap=options.bootstrap,
        attention=options.attention,
        histories=histories,
        metrics=metrics,
        **_evaluation_options(options, data),
    )
    page = result.save(out)
    print_result(options, result.to_json(), lambda: str(result))
    print_status(f"The report is in {page}")
    return DONE


def _histories(directories: Mapping[str, Path]) -> dict[str, Path]:
    """Model -> the run that its directory lies in, where there is one."""
    runs = {role: directory.absolute().parent for role, directory in directories.items()}
    found = {role: run for role, run in runs.items() if (run / "history.jsonl").exists()}
    if not found:
        raise ConfigError(
            "--curves: no captioner lies in the directory of a run with its history.jsonl. Give "
            "the directory of the run, RUN or RUN/best, or leave --curves out."
        )
    return found


def _data(options: argparse.Namespace) -> Splits:
    data = parse_data(data_values(options)).load()
    print_status(data.summary())
    return data


def _evaluation_options(options: argparse.Namespace, data: Splits) -> dict[str, Any]:
    names = ("batch_size", "device", "precision", "num_workers", "measure")
    given = {name: getattr(options, name) for name in names}
    whole = "train" in data and options.limit is None  # novelty needs all training captions
    return {
        **given,
        "generation": generation_values(options) or None,
        "training_captions": data.train.captions if whole else None,
    }


def _add_options(parser: argparse.ArgumentParser) -> None:
    data = add_data_options(parser)
    data.add_argument(
        "--split", metavar="NAME", default="val", help="the split to use (default: %(default)s)"
    )
    group = parser.add_argument_group("evaluation")
    add_metrics_option(group, "all")
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)"
    )
    group.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read images"
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, ...")
    group.add_argument(
        "--precision", metavar="NAME", default="auto", help="auto, bf16, fp16 or fp32"
    )
    group.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="compute scores only: no time, memory and size",
    )
    add_generation_options(parser)


def score_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `score`."""
    parser.description = _SCORE
    parser.usage = "capdistill score REFERENCES RESULTS [options]"
    parser.add_argument("references", metavar="REFERENCES", help="a COCO captions file")
    parser.add_argument(
        "results", metavar="RESULTS", help='a JSON list of {"image_id": ..., "caption": ...}'
    )
    add_metrics_option(parser, "all")
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="another system's results for the same images: adds intervals, differences and "
        "p-values",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help=f"with --against: number of samples of the images (default: {_SAMPLES})",
    )
    parser.add_argument(
        "--per-image", action="store_true", help="also show the scores of every image"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the JSON to a file")
    parser.set_defaults(run=run_score)


def run_score(options: argparse.Namespace) -> int:
    """Score the images that have a result, and report how many have none."""
    files = [options.references, options.results, *filter(None, [options.against])]
    references, results, *against = (str(user_path(file, DataError)) for file in files)
    out = user_path(options.out) if options.out else None
    _require_other_file(out, [references, results, *against])
    names, samples = metric_names(options), _samples(options)
    scored = score_files(references, results, names, next(iter(against), None), samples)
    if not options.per_image:
        for system in _systems(scored).values():
            del system["per_image"]
    if out:
        write_text(out, as_json(scored) + "\n")
    print_result(options, scored, lambda: _table(scored))
    return DONE


def _samples(options: argparse.Namespace) -> int:
    """The number of bootstrap samples, checked before the work."""
    if options.bootstrap is None:
        return _SAMPLES
    if not options.against:
        raise ConfigError("--bootstrap compares two systems; name the other with --against FILE.")
    return require_int("--bootstrap", options.bootstrap, minimum=1)


def _require_other_file(out: Path | None, inputs: Sequence[str]) -> None:
    if out and out.exists() and any(Path(p).exists() and out.samefile(p) for p in inputs):
        raise ConfigError(f"--out {out} is one of the files to score; give another name.")


def _systems(scored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results and, with --against, those of the other system."""
    return {"results": scored, **({"against": scored["against"]} if "against" in scored else {})}


def _table(scored: dict[str, Any]) -> str:
    systems = _systems(scored)
    parts = [_scores(scored) if len(systems) == 1 else _side_by_side(scored)]
    if "per_image" in scored:
        alone = len(systems) == 1
        parts += [
            _per_image("image" if alone else f"image, {name}", each["per_image"])
            for name, each in systems.items()
        ]
    return "\n\n".join([*parts, "\n".join(_remarks(scored, systems))])


def _scores(scored: Mapping[str, Any]) -> str:
    return columns([(name, _figure(v)) for name, v in scored["scores"].items()], right=[1])


def _side_by_side(scored: Mapping[str, Any]) -> str:
    """A score per line; every built-in score has its intervals."""
    from capdistill.metrics.bootstrap import bracketed, changed, text_columns

    scores = {"results": scored["scores"], "against": scored["against"]["scores"]}
    rows = [("", *scores, "results minus against")]
    for name, ends in scored["intervals"].items():
        both = [f"{_figure(each[name])} {bracketed(ends[s])}" for s, each in scores.items()]
        rows.append((name, *both, changed(**scored["differences"][name])))
    return text_columns(rows, width=shutil.get_terminal_size().columns)


def _per_image(head: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    images = list(next(iter(scores.values()), {}))
    rows = [(image, *(_figure(each[image]) for each in scores.values())) for image in images]
    return columns([(head, *scores), *rows], right=range(1, len(scores) + 1))


def _remarks(scored: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    from capdistill.metrics.bootstrap import remark

    images, without = scored["images"], scored["images_without_result"]
    lines = [f"{images} of {images + without} images have a result and are scored."]
    whose = {"results": "The captions use", "against": "The other system's captions use"}
    lines += [f"{whose[name]} {health_line(each['health'])}" for name, each in systems.items()]
    drawn = scored.get("bootstrap")
    if drawn:
        lines += [remark(drawn["samples"], drawn["confidence"]), *drawn["notes"]]
    return [*lines, *scored["notes"]]


def health_line(health: Mapping[str, Any]) -> str:
    """The health of the captions in one line."""
    return (
        f"{health['vocabulary']} different words, {health['mean_length']:.1f} per caption; "
        f"{health['distinct_captions']:.1%} are distinct, {health['repeats']:.1%} repeat "
        f"a pair of words, {health['cut_short']:.1%} end on a function word, "
        f"{health['empty']:.1%} are empty."
    )


def _figure(value: float) -> str:
    return f"{value:.4f}"


def score_files(
    references: str,
    results: str,
    metrics: Sequence[str] | None,
    against: str | None = None,
    samples: int = 1000,
) -> dict[str, Any]:
    """The scores of caption files as plain values for JSON, those of each image included.

    Args:
        references: A COCO captions file.
        results: The captions to score.
        metrics: As for `CaptionScorer`.
        against: Another system's captions of the same images.
        samples: Number of bootstrap samples of the images, for the intervals.

    Raises:
        DataError: as in `read_coco_results`; or the two results are not of the same images.
    """
    from capdistill.metrics import CaptionScorer, read_coco_results

    read = read_coco_results(references, results)
    other = read_coco_results(references, against).captions if against else None
    if other is not None:
        _require_same_images(results, read.captions, str(against), other)
    scorer = CaptionScorer(read.references, metrics=metrics)
    scores = scorer(read.captions)
    scored = {
        "schema": SCHEMA,
        "images": len(read.captions),
        "images_without_result": len(read.without),
        "notes": list(scores.notes),
        **_system(read.captions, scores),
    }
    if other is not None:
        systems = {"results": scores, "against": scorer(other)}
        scored["against"] = _system(other, systems["against"])
        scored |= _differences(systems, samples)
    return scored


def _system(captions: Mapping[str, str], scores: Scores) -> dict[str, Any]:
    from capdistill.metrics import diversity

    return {
        "scores": dict(scores),
        "health": diversity(captions).to_json(),
        "per_image": {name: dict(each) for name, each in scores.per_image.items()},
    }


def _differences(systems: Mapping[str, Scores], samples: int) -> dict[str, Any]:
    """Intervals of both systems, and the results' scores minus the other's."""
    from capdistill.metrics.bootstrap import paired

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
    from capdistill.metrics.base import first

    here = [image for image in ours if image not in theirs]
    there = [image for image in theirs if image not in ours]
    if here or there:
        raise DataError(
            f"{results} and {against} are not of the same images, so their scores cannot be "
            f"compared. Only in the first: {first(here)}. Only in the second: {first(there)}. Give "
            "both one caption for each of the same images; '' is a caption."
        )
