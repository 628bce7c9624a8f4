"""`capdistill caption`: photos to captions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from capdistill.cli.output import DONE, PROBLEM, as_json, say
from capdistill.errors import DataError

if TYPE_CHECKING:
    from capdistill.captioner import Captioner

_EXAMPLE = """\
  capdistill caption runs/student/best dog.jpg
  capdistill caption runs/student/best photos/*.jpg --json > captions.json"""


def caption_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `caption`."""
    parser = add(example=_EXAMPLE)
    parser.add_argument("captioner", metavar="DIR", help="a saved captioner, e.g. RUN/best")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a caption at most")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """One line an image, `path<TAB>caption`; an image that can not be read is named on stderr."""
    from capdistill.captioner import Captioner
    from capdistill.training.runtime import pick_device

    device = pick_device(options.device)
    captioner = Captioner.load(options.captioner, device=device)
    found = []
    for chunk in _chunks(options.images, max(options.batch_size, 1)):
        for row in caption_files(captioner, chunk, options.max_length):
            found.append(row)
            if not options.json and "caption" in row:
                print(f"{row['image']}\t{row['caption']}", flush=True)
    if options.json:
        print(as_json(found))
    bad = sum("error" in row for row in found)
    if bad:
        say(f"capdistill caption: {bad} of {len(found)} images could not be read; see above.")
    return PROBLEM if bad else DONE


def caption_files(
    captioner: Captioner, paths: Sequence[str], max_length: int | None = None
) -> Iterator[dict[str, str]]:
    """Image and caption, or image and error, of every path in its order."""
    from capdistill.data import read_image

    pixels, errors = {}, {}
    for path in paths:
        try:
            pixels[path] = read_image(path)
        except DataError as error:
            errors[path] = str(error)
            say(str(error))
    texts = captioner.caption(list(pixels.values()), max_length=max_length) if pixels else []
    captions = dict(zip(pixels, texts, strict=True))
    for path in paths:
        key = "error" if path in errors else "caption"
        yield {"image": path, key: errors[path] if path in errors else captions[path]}


def _chunks(items: Sequence[str], size: int) -> Iterator[list[str]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
