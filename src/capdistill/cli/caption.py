"""`capdistill caption`: photos to captions."""

from __future__ import annotations

import argparse
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.common import (
    DONE,
    PROBLEM,
    add_generation_options,
    as_json,
    generation_values,
    say,
)
from capdistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.generation.hypotheses import CaptionResult

_EXAMPLE = """\
  capdistill caption runs/student/best dog.jpg
  capdistill caption runs/student/best photos/*.jpg --beam-size 3 --json > captions.json
  capdistill caption runs/student/best dog.jpg --attention looked.png"""


def caption_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `caption`."""
    parser = add(example=_EXAMPLE)
    parser.add_argument("captioner", metavar="DIR", help="a saved captioner, e.g. RUN/best")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--details", action="store_true", help="with --json: log-probabilities and n-best as well"
    )
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FILE",
        help="draw where each word looked; a folder where there are several images",
    )
    add_generation_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """One line an image, `path<TAB>caption`; an image that cannot be read is named on stderr."""
    from capdistill.captioner import Captioner
    from capdistill.runtime import pick_device

    if options.attention:
        _require_pictures(options.attention, len(options.images))
    device = pick_device(options.device)
    captioner = Captioner.load(options.captioner, device=device)
    rows = []
    for row in caption_files(captioner, options):
        rows.append(row)
        if not options.json and "caption" in row:
            print(f"{row['image']}\t{row['caption']}", flush=True)
    if options.json:
        print(as_json(rows))
    bad = sum("error" in row for row in rows)
    if bad:
        say(f"capdistill caption: {bad} of {len(rows)} images could not be read; see above.")
    return PROBLEM if bad else DONE


def caption_files(captioner: Captioner, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Image and caption, or image and error, of every path in its order."""
    waiting: deque[tuple[str, str | None]] = deque()  # paths that were read, each with its error
    stream = captioner.caption_stream(
        _readable(options.images, waiting),
        batch_size=max(options.batch_size, 1),
        details=options.details or options.attention is not None,
        **generation_values(options),
    )
    pictures = _pictures(options)
    for found in stream:
        while waiting[0][1] is not None:
            yield _error(*waiting.popleft())
        path, _ = waiting.popleft()
        if options.attention:
            _draw(found, pictures[path])
        yield {"image": path, **_row(found, options.details)}
    yield from (_error(*each) for each in waiting)


def _readable(paths: Sequence[str], waiting: deque[tuple[str, str | None]]) -> Iterator[Any]:
    """The images that can be read; every path goes to `waiting`, in its order."""
    from capdistill.data import read_image

    for path in paths:
        try:
            image = read_image(path)
        except DataError as error:
            say(str(error))
            waiting.append((path, str(error)))
            continue
        waiting.append((path, None))
        yield image


def _error(path: str, error: str | None) -> dict[str, Any]:
    return {"image": path, "error": error}


def _row(found: str | CaptionResult, details: bool) -> dict[str, Any]:
    """What the JSON says of a caption."""
    if isinstance(found, str):
        return {"caption": found}
    if not details:
        return {"caption": found.text}
    return {
        "caption": found.text,
        "finished": found.finished,
        "log_prob": found.log_prob,
        "tokens": list(found.tokens),
        "token_log_probs": list(found.token_log_probs),
        "n_best": [
            {"caption": each.text, "log_prob": each.log_prob, "score": each.score}
            for each in found.n_best
        ],
    }


def _require_pictures(target: Path, images: int) -> None:
    """Matplotlib is there, and so is the folder; before anything is captioned."""
    from capdistill import plots

    plots.require_matplotlib()
    if images > 1:
        target.mkdir(parents=True, exist_ok=True)
    elif not target.suffix:
        raise ConfigError(
            f"--attention {target} has no suffix that names a picture's kind. "
            f"Use {target}.png, .svg or .pdf."
        )


def _pictures(options: argparse.Namespace) -> dict[str, Path]:
    """Path of an image -> file of its picture; photos of one name in two folders get two."""
    if options.attention is None or len(options.images) == 1:
        return dict.fromkeys(options.images, options.attention)
    stems = Counter(Path(path).stem for path in options.images)
    return {
        path: options.attention / (f"{name}_{i}.png" if stems[name] > 1 else f"{name}.png")
        for i, path in enumerate(options.images)
        for name in [Path(path).stem]
    }


def _draw(found: CaptionResult, target: Path) -> None:
    from capdistill import plots

    plots.attention(found, path=target)
