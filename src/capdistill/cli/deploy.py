"""`capdistill export`: a captioner as ONNX graphs. `capdistill bench`: what captioners cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from capdistill.cli import DONE, PROBLEM, print_result, print_status
from capdistill.cli.common import (
    add_generation_options,
    captioner_directory,
    generation_values,
    require_writable,
)
from capdistill.errors import ConfigError
from capdistill.files import user_path

_EXPORT = """\
example:
  capdistill export runs/student --out exported/student
  capdistill export runs/student --out exported/int8 --quantize int8 --calibration photos/
  capdistill export runs/student --out exported/student --web page

The directory needs no torch: capdistill.deploy.OnnxCaptioner runs it, and so does the page that
--web writes, in a browser. With int8, images like those to be captioned set the ranges of the
numbers: --calibration is a folder of them, or a data set's with --format. A captioner that was
trained with quantize="int8" has ranges, and needs none."""
_BENCH = """\
example:
  capdistill bench exported/int8 exported/student runs/student --images photos/
  capdistill bench small=exported/int8 vit_transformer hf-config:blip-base --images photos/ --json

MODEL is a directory that `capdistill export` wrote, a run, a saved captioner or teacher, or, with
random weights, a preset or hf-config: before blip-base, vit-gpt2, git-base or the path of a
config.json of transformers. NAME=MODEL gives it a name."""


def export_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.description = _EXPORT
    parser.usage = "capdistill export DIR --out DIR [options]"
    parser.add_argument("captioner", metavar="DIR", help="a run's or a saved captioner's directory")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the graphs go")
    parser.add_argument(
        "--quantize", choices=["int8"], metavar="int8", help="8-bit graphs, a quarter of the size"
    )
    parser.add_argument(
        "--calibration",
        metavar="PATH",
        help='with --quantize: a folder of images, a data set (with --format), or "sample"',
    )
    parser.add_argument(
        "--format", metavar="FORMAT", help="with --calibration: the layout of the data set"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="also write greedy.onnx: from images to ids"
    )
    parser.add_argument(
        "--executorch",
        action="store_true",
        help="also write encoder.pte and step.pte, for ExecuTorch (in float32)",
    )
    parser.add_argument("--web", metavar="DIR", help="also write a page for the browser there")
    parser.add_argument(
        "--ort",
        metavar="DIR",
        help="with --web: the files of onnxruntime-web; otherwise the page loads them",
    )
    add_generation_options(parser, " (what the exported captioner does by default)")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Export a captioner, and write its page."""
    from capdistill.deploy.exporting import export
    from capdistill.deploy.web import require_page, write_page
    from capdistill.teachers.ensemble import load

    if options.ort and not options.web:
        raise ConfigError("--ort belongs to --web DIR; give that, too.")
    if options.web and (options.sample or (options.beam_size or 1) > 1):
        raise ConfigError("--web: the page decodes greedily. Leave --beam-size and --sample out.")
    if options.calibration and not options.quantize:
        raise ConfigError("--calibration belongs to --quantize int8; give that, too.")
    if options.format and not options.calibration:
        raise ConfigError("--format belongs to --calibration PATH; give that, too.")
    out, captioner = user_path(options.out), captioner_directory(options.captioner)
    require_writable(out.parent)
    if options.web:
        require_page(out, options.web, options.ort)
        require_writable(user_path(options.web).parent)
    model: Any = load(captioner)
    calibration = _calibration(options, model)
    manifest = export(
        model,
        out,
        quantize=options.quantize,
        calibration=calibration,
        generation=generation_values(options) or None,
        greedy=options.greedy,
        executorch=options.executorch,
    )
    page = write_page(out, options.web, ort=options.ort) if options.web else None
    result = {**manifest.to_json(), "directory": str(out), "page": page and str(page)}
    print_result(options, result, lambda: f"{out}: {manifest.precision}, {manifest.size:,} bytes")
    if page:
        print_status(f"The page is {page}. Serve it: python -m http.server -d {page.parent}")
    return DONE


def _calibration(options: argparse.Namespace, model: Any) -> Any:
    """A folder of images, or the training images of a data set; None where none are needed.

    Raises:
        ConfigError: they are needed and were not given.
    """
    from capdistill.cli.data import parse_data

    given = options.calibration
    if given is None:
        if options.quantize and getattr(model, "activation_ranges", None) is None:
            raise ConfigError(
                "--quantize int8 needs --calibration PATH: images like those that will be "
                'captioned. Only a captioner that was trained with quantize="int8" needs none.'
            )
        return None
    if options.format is None and given != "sample":
        return str(user_path(given))
    values = {"path": given, **({"format": options.format} if options.format else {})}
    return parse_data(values).load().train


def bench_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.description = _BENCH
    parser.usage = "capdistill bench MODEL [MODEL ...] --images DIR [options]"
    parser.add_argument("models", metavar="MODEL", nargs="+", help="what to measure; see above")
    parser.add_argument(
        "--images", metavar="PATH", nargs="+", required=True, help="a folder, or image files"
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="the model that others are compared with (default: the first)",
    )
    for name, default, text in (
        ("--threads", 1, "threads that compute"),
        ("--rounds", 5, "how often the models take turns"),
        ("--images-per-round", 4, "images of a model's turn, one by one"),
        ("--batch-size", 8, "images of a batch; 0 times no batches"),
        ("--words", 12, "tokens of every caption; 0 leaves it to the models"),
        ("--starts", 3, "how often the start is timed"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Measure captioners side by side."""
    from capdistill.evaluation.benchmark import bench

    images = options.images[0] if len(options.images) == 1 else options.images
    named = dict(_named(given) for given in options.models)
    if len(named) < len(options.models):
        raise ConfigError("Two models have the same name. Give each another one: NAME=MODEL.")
    found = bench(
        {name: _directory(model) for name, model in named.items()},
        images,
        rounds=options.rounds,
        images_per_round=options.images_per_round,
        batch_size=options.batch_size,
        words=options.words or None,
        threads=options.threads,
        starts=options.starts,
        reference=options.reference,
    )
    print_result(options, found.to_json(), lambda: str(found))
    return PROBLEM if found.failed else DONE


def _named(given: str) -> tuple[str, str]:
    """NAME=MODEL, or a model that is its own name."""
    name, equals, model = given.partition("=")
    return (name, model) if equals and name and not Path(given).exists() else (given, given)


def _directory(model: str) -> str:
    """The best captioner of a run; other models as they are."""
    from capdistill.deploy.manifest import is_exported
    from capdistill.evaluation.timed_models import CONFIG

    path = Path(model).expanduser()
    as_it_is = model.startswith(CONFIG) or is_exported(path) or not path.exists()
    return model if as_it_is else str(captioner_directory(model))
