"""`capdistill caption`: images to captions."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, PROBLEM, as_json, print_result, print_status
from capdistill.cli.common import (
    add_data_options,
    add_generation_options,
    captioner_directory,
    data_values,
    generation_values,
)
from capdistill.data.image_names import images_below
from capdistill.deploy.manifest import is_exported
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.files import printable, user_path
from capdistill.generation.config import resolve

if TYPE_CHECKING:
    from capdistill.data import CaptionData
    from capdistill.deploy.onnx_captioner import OnnxCaptioner
    from capdistill.generation.decode import CaptionGenerator
    from capdistill.generation.hypotheses import CaptionResult

_EXAMPLE = """\
example:
  capdistill caption runs/student dog.jpg
  capdistill caption runs/student photos/ --beam-size 3 --json > captions.json
  capdistill caption runs/student dog.jpg --num-return 3
  capdistill caption runs/student dog.jpg --attention looked.png
  find photos -name '*.jpg' | capdistill caption runs/student -
  capdistill caption runs/teacher --data flickr8k --out captions.jsonl --beam-size 5

With --out, captions to train on go to a file: those of the training images of --data, or of the
images that are named. A run that was stopped continues. Otherwise they are printed.

Each line of the output is an image and its caption, separated by a tab. With --details or
--num-return there is a line per caption: image, rank, score, log-probability, caption."""
_EVERY = 100  # images between two lines of progress


def caption_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `caption`."""
    parser.description = _EXAMPLE
    parser.usage = "capdistill caption DIR [IMAGE ...] [options]"
    parser.add_argument(
        "captioner", metavar="DIR", help="directory of a run, or of a saved or exported captioner"
    )
    parser.add_argument(
        "paths",
        metavar="IMAGE",
        nargs="*",
        help="an image file, a folder (all images in it and in its subfolders, sorted), or - for "
        "a list of files on stdin, one per line",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per batch (default: 8; with --out 64)",
    )
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="auto, cpu, cuda, ... (default: auto)"
    )
    parser.add_argument(
        "--details",
        action="store_true",
        help="show every caption with its rank, score and log-probability; with --json also the "
        "tokens",
    )
    parser.add_argument(
        "--attention",
        metavar="FILE",
        help="draw the attention map of each word; a folder if there are several images",
    )
    training = parser.add_argument_group("captions to train on")
    training.add_argument(
        "--out",
        metavar="FILE",
        help="write the captions, several per image if --num-return says so, as JSON Lines",
    )
    training.add_argument(
        "--overwrite", action="store_true", help="with --out: start the file anew"
    )
    add_data_options(parser)
    add_generation_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Caption the images, print each as it is done, and name those that cannot be read."""
    exported = is_exported(user_path(options.captioner, CheckpointError))
    if exported:
        _require_possible(options)
    _require_companions(options)
    if options.out is not None:
        return _write_training_captions(options, captioner_directory(options.captioner))
    if options.data is not None or not options.paths:
        raise ConfigError("Give IMAGE files or folders. --data PATH needs --out FILE, too.")
    if not exported:
        resolve(None, _decoding(options))  # an exported captioner has defaults of its own
    paths = image_paths(options.paths)
    if options.attention:
        options.attention = user_path(options.attention)
        _require_pictures(options.attention, len(paths))
    captioner = _load_exported(options) if exported else _load(options)
    rows, unreadable = [], 0
    for number, row in enumerate(caption_files(captioner, paths, options), start=1):
        unreadable += "error" in row
        if options.json:
            rows.append(row)
            if number % _EVERY == 0:
                print_status(f"captioned {number:,} of {len(paths):,} images")
        elif "caption" in row:
            print(printable(_lines(row)), flush=True)
    if options.json:
        print(as_json(rows), flush=True)
    if unreadable:
        print_status(
            f"capdistill caption: {unreadable} of {len(paths)} images could not be read; see above."
        )
    return PROBLEM if unreadable else DONE


def _require_companions(options: argparse.Namespace) -> None:
    """Refuse options that would do nothing without another one."""
    if options.overwrite and options.out is None:
        raise ConfigError("--overwrite belongs to --out FILE; give that, too.")
    if options.data is None and data_values(options):
        raise ConfigError("--format, --images and --limit belong to --data PATH; give that, too.")


def _load(options: argparse.Namespace) -> CaptionGenerator:
    from capdistill.runtime import pick_device
    from capdistill.teachers.ensemble import load

    directory = captioner_directory(options.captioner)
    return load(directory, device=pick_device(options.device))


def _require_possible(options: argparse.Namespace) -> None:
    """Refuse what an exported captioner cannot do."""
    given = {"--out": options.out, "--data": options.data, "--attention": options.attention}
    for name in (name for name, value in given.items() if value is not None):
        raise ConfigError(f"{name}: {options.captioner} is exported. Give the captioner itself.")
    if options.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {options.device}: an exported captioner runs on the CPU.")


def _load_exported(options: argparse.Namespace) -> OnnxCaptioner:
    """What `capdistill export` wrote; it runs without torch, on the CPU."""
    from capdistill.deploy.onnx_captioner import OnnxCaptioner

    return OnnxCaptioner.load(options.captioner)


def _write_training_captions(options: argparse.Namespace, directory: Path) -> int:
    """Caption the images of a data set, or the named ones, into a file; see `teachers.caption`."""
    from capdistill import teachers
    from capdistill.cli.data import parse_data
    from capdistill.data import Images

    if (options.data is None) == (not options.paths):
        raise ConfigError("--out FILE needs either --data PATH or IMAGE files or folders.")
    if options.attention or options.details:
        raise ConfigError("--attention and --details show captions; they do not go with --out.")
    if options.data is None:
        data: CaptionData = Images(image_paths(options.paths))
    else:
        data = parse_data(data_values(options)).load().train
    generation = generation_values(options)
    candidates = generation.pop("num_return", None)
    made = teachers.caption(
        teachers.load(directory),
        data,
        options.out,
        num_return=candidates or 1,
        candidates=candidates,
        batch_size=64 if options.batch_size is None else options.batch_size,
        device=options.device,
        overwrite=options.overwrite,
        **generation,
    )
    print_result(options, made.counts, lambda: f"{options.out}: {made}")
    if made.report.problems:
        print_status(str(made.report))
    return PROBLEM if made.counts["unreadable"] else DONE


def image_paths(given: Iterable[str]) -> list[str]:
    """The image files that the arguments name: files, folders, and "-" for a list on stdin.

    Raises:
        DataError: a folder or the list holds no image.
    """
    paths: list[str] = []
    for each in given:
        if each == "-":
            named = [line.rstrip("\r\n") for line in sys.stdin]
            found = image_paths(line for line in named if line not in ("", "-"))
        elif user_path(each, DataError).is_dir():
            found = [str(path) for path in images_below(user_path(each))]
        else:
            found = [each]
        if not found:
            where = "The list on stdin" if each == "-" else f"The folder {each}"
            raise DataError(f"{where} holds no image. Expected files such as photo.jpg.")
        paths += found
    return paths


def caption_files(
    captioner: CaptionGenerator | OnnxCaptioner, paths: Sequence[str], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Image and caption, or image and error, for every path in its order."""
    generation = _decoding(options)
    details = options.details or generation.get("num_return", 1) > 1
    waiting: deque[tuple[str, str | None]] = deque()  # paths that were read, each with its error
    stream = captioner.caption_stream(
        _readable(paths, waiting),
        batch_size=8 if options.batch_size is None else options.batch_size,
        details=details or options.attention is not None,
        **generation,
    )
    pictures = _pictures(paths, options.attention)
    for result in stream:
        while waiting[0][1] is not None:
            yield _error(*waiting.popleft())
        path, _ = waiting.popleft()
        if options.attention:
            _draw(result, pictures[path])
        yield {"image": path, **_row(result, details)}
    yield from (_error(*each) for each in waiting)


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The options of decoding; several captions need as many beams."""
    generation = generation_values(options)
    if generation.get("num_return", 1) > 1 and not generation.get("sample"):
        generation.setdefault("beam_size", generation["num_return"])
    return generation


def _readable(paths: Sequence[str], waiting: deque[tuple[str, str | None]]) -> Iterator[Any]:
    """The images that can be read; every path goes to `waiting`, in its order."""
    from capdistill.data.pixels import read_pixels

    for path in paths:
        try:
            image = read_pixels(user_path(path, DataError))
        except DataError as error:
            print_status(str(error))
            waiting.append((path, str(error)))
            continue
        waiting.append((path, None))
        yield image


def _error(path: str, error: str | None) -> dict[str, Any]:
    return {"image": path, "error": error}


def _row(result: str | CaptionResult, details: bool) -> dict[str, Any]:
    """A caption as a JSON object."""
    if isinstance(result, str):
        return {"caption": result}
    if not details:
        return {"caption": result.text}
    return {
        "caption": result.text,
        "finished": result.finished,
        "log_prob": result.log_prob,
        "tokens": list(result.tokens),
        "token_log_probs": list(result.token_log_probs),
        "n_best": [
            {"caption": each.text, "log_prob": each.log_prob, "score": each.score}
            for each in result.n_best
        ],
    }


def _lines(row: dict[str, Any]) -> str:
    """A line per caption, tab-separated."""
    image = row["image"]
    if "n_best" not in row:
        return f"{image}\t{row['caption']}"
    return "\n".join(
        f"{image}\t{rank}\t{each['score']:.4f}\t{each['log_prob']:.4f}\t{each['caption']}"
        for rank, each in enumerate(row["n_best"], start=1)
    )


def _require_pictures(target: Path, images: int) -> None:
    """Check for matplotlib and make the folder before anything is captioned."""
    from capdistill import plots

    plots.require_matplotlib()
    if images > 1:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--attention {target}: {images} images need a folder, "
                f"and it cannot be made ({error.strerror}). Give another path."
            ) from error
    elif not target.suffix:
        raise ConfigError(
            f"--attention {target} has no known image suffix. Use {target}.png, .svg or .pdf."
        )


def _pictures(paths: Sequence[str], target: Path | None) -> dict[str, Path]:
    """Path of an image -> file of its picture. Images of one name in two folders get two."""
    if target is None or len(paths) == 1:
        return dict.fromkeys(paths, target or Path())
    stems = Counter(Path(path).stem for path in paths)
    return {
        path: target / (f"{name}_{i}.png" if stems[name] > 1 else f"{name}.png")
        for i, path in enumerate(paths)
        for name in [Path(path).stem]
    }


def _draw(result: CaptionResult, target: Path) -> None:
    from capdistill import plots

    plots.attention(result, path=target)
