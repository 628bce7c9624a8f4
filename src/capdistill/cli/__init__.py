"""The command `capdistill`: thin over the API, one module a command or two.

Exit codes: 0 done, 1 a problem that the message names, 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from capdistill import __version__
from capdistill.cli.common import INTERRUPTED, PROBLEM, say
from capdistill.errors import CapdistillError

COMMANDS = {
    "demo": ("demo", "train and distil on the bundled photos: a first look, nothing is fetched"),
    "models": ("models", "presets with their sizes, and the registered parts"),
    "check": ("train", "try a teacher, a student and their losses before a long run"),
    "train": ("train", "train a captioner by cross-entropy"),
    "distill": ("train", "train a student with a teacher"),
    "evaluate": ("evaluate", "score and measure a saved captioner"),
    "compare": ("evaluate", "set a teacher and a student side by side"),
    "caption": ("caption", "caption photos"),
    "score": ("evaluate", "score captions in COCO's own files, as the COCO tool does"),
}
_CLOSING = """\
example:
  capdistill demo
  capdistill distill --teacher runs/teacher/best --student lite0_lstm --data flickr8k --out runs/kd

`capdistill COMMAND --help` has the options of a command and an example.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code.

    Example:
        >>> main(["caption", "no-such-directory", "dog.jpg"])
        1

    Args:
        arguments: Those after the program's name; `sys.argv` unless given.
    """
    options = make_parser().parse_args(arguments)
    try:
        with _plain_warnings():
            return int(options.run(options))
    except CapdistillError as error:
        if options.debug:
            raise
        say(f"capdistill {options.command}: {error}")
        return PROBLEM
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PROBLEM


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Imports no torch, so that `--help` is quick.

    Example:
        >>> make_parser().parse_args(["models", "--json"]).command
        'models'
    """
    parser = argparse.ArgumentParser(
        prog="capdistill",
        description="Distil large image captioners into small, fast ones.",
        epilog=_CLOSING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"capdistill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        setup = getattr(importlib.import_module(f"capdistill.cli.{module}"), f"{name}_command")
        _add_common(setup(lambda name=name, line=line, **more: _add(commands, name, line, **more)))
    return parser


def _add(commands: Any, name: str, line: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description=f"{line[0].upper()}{line[1:]}.",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="the result as JSON on stdout, all else on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the place in our code that gave them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before
