"""The command `capdistill`: the Python API on the command line.

Exit codes: 0 done, 1 a problem that the message names, 2 a wrong command line, 130 interrupted by
Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from capdistill import __version__
from capdistill.errors import CapdistillError, suggest
from capdistill.files import finite_or_none, printable
from capdistill.progress import report

COMMANDS = {
    "demo": ("demo", "train and distil on the bundled photos: a first look, without downloads"),
    "models": ("models", "list the presets with their sizes, and all registered parts"),
    "shards": ("prepare", "write a data set as WebDataset shards"),
    "cache": ("prepare", "encode the images of a run once, before it"),
    "check": ("distill", "try a teacher, a student and their losses before a long run"),
    "train": ("train", "train a captioner by cross-entropy"),
    "distill": ("distill", "train a student with a teacher"),
    "tune": ("tune", "train a captioner further on a score of its captions"),
    "evaluate": ("evaluate", "score and measure a saved captioner"),
    "compare": ("evaluate", "compare a student with its teacher and write a report"),
    "caption": ("caption", "caption images"),
    "export": ("deploy", "write a captioner as ONNX graphs, which run without torch"),
    "bench": ("deploy", "measure captioners side by side: size, memory, start, time"),
    "score": ("evaluate", "score caption files, as the COCO tool does"),
}
DONE, PROBLEM = 0, 1
_NEEDED = {"nltk", "pydantic", "safetensors", "timm", "torch", "torchvision", "tqdm"}
_CLOSING = """\
example:
  capdistill demo
  capdistill distill --teacher runs/teacher --student lite0_lstm --data flickr8k --out runs/student

`capdistill COMMAND --help` lists the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    Example:
        >>> main(["caption", "no-such-directory", "dog.jpg"])
        1

    Args:
        arguments: The words after the program's name; `sys.argv` by default.
    """
    name, debug = "capdistill", False
    try:
        parser = make_parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            print(printable(parser.format_help()), end="", flush=True)
            return DONE
        name, debug = f"capdistill {options.command}", options.debug
        with _plain_warnings(), _sigterm_as_interrupt():
            return int(options.run(options))
    except _Terminated:
        print_status("Terminated.")
        return interrupted(signal.SIGTERM)
    except KeyboardInterrupt:
        print_status("Interrupted.")
        return interrupted(signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        _abandon_output()
        return PROBLEM
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if debug or package not in _NEEDED:
            raise
        print_status(
            f"{name}: the package {package} is not installed, which training and captioners in "
            "torch need: pip install capdistill. Without it, `capdistill caption` and `bench` take "
            "directories that `capdistill export` wrote."
        )
        return PROBLEM
    except (CapdistillError, OSError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and not isinstance(error, CapdistillError):
            _abandon_output()  # a full disk under our output would fail again at exit
        print_status(f"{name}: {_as_options(str(error))}")
        return PROBLEM


def interrupted(number: int | None) -> int:
    """The exit code of a command that a signal ended, as shells count it.

    Example:
        >>> interrupted(signal.SIGTERM), interrupted(None)
        (143, 130)

    Args:
        number: Number of the signal; Ctrl-C where it is not known.
    """
    return 128 + (number or signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came where no run could heed it."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM ends the command like Ctrl-C; files are cleaned up."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It imports a command's module only when that command is used.

    Example:
        >>> make_parser().parse_args(["models", "--json"]).command
        'models'
    """
    parser = CommandParser(
        prog="capdistill",
        description="Distil large image captioners into small, fast ones.",
        epilog=_CLOSING,
    )
    parser.add_argument("--version", action="version", version=f"capdistill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, summary=summary, module=module)
    return parser


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests the nearest name, and adds a command's options on first use.

    Args:
        module: Module of `capdistill.cli` whose function `COMMAND_command` adds the options.
        summary: What the command does, in one line.
        options: As for `argparse.ArgumentParser`.

    Attributes:
        settings: Names that are no option but can be given with `--set`, such as "train.flip".
    """

    def __init__(self, module: str = "", summary: str = "", **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)
        self.settings: Sequence[str] = ()
        self._module, self._summary = module, summary

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is unknown here, with this command's usage."""
        if self._module:
            self._add_options()
        options, unknown = super().parse_known_args(args, namespace or argparse.Namespace())
        if getattr(options, "paths", None) == []:  # argparse fills no "*" behind an option
            options.paths = [word for word in unknown if word == "-" or not word.startswith("-")]
            unknown = [word for word in unknown if word not in options.paths]
        if getattr(options, "captioner", "") is None and unknown and not unknown[0].startswith("-"):
            options.captioner = unknown.pop(0)  # nor "?"
        if unknown:
            self.error(self._explain(unknown[0]))
        return options, []

    def error(self, message: str) -> NoReturn:
        """Exit with the usage, the message and code 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def _add_options(self) -> None:
        module = importlib.import_module(f"capdistill.cli.{self._module}")
        self._module = ""
        getattr(module, f"{self.prog.split()[-1]}_command")(self)
        self.description = f"{self._summary[0].upper()}{self._summary[1:]}.\n\n{self.description}"
        common = self.add_argument_group("output")
        common.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout"
        )
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def _explain(self, word: str) -> str:
        name = word.split("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {word!r}"
        ways = {f"--{key.rpartition('.')[2].replace('_', '-')}": key for key in self.settings}
        ways = {flag: f"--set {key}=VALUE" for flag, key in ways.items()}
        ways |= {flag: flag for flag in self._option_string_actions}
        near = difflib.get_close_matches(name.replace("_", "-"), ways, n=1)
        hint = f" Did you mean {ways[near[0]]}?" if near else ""
        return f"there is no option {name}.{hint} `{self.prog} --help` lists the options."

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"there is no {value!r}. {suggest(str(value), map(str, action.choices))}"
            )


def _abandon_output() -> None:
    """Send what is still buffered for a closed stdout or stderr to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line on stderr, without the place in our code that gave it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print_status(f"warning: {_as_options(str(message))}")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def _as_options(message: str) -> str:
    """A message of the Python API with its arguments named as options."""
    for argument in ("resume", "overwrite", "accept_changes", "sample"):
        message = message.replace(f"{argument}=True", f"--{argument.replace('_', '-')}")
    return message.replace("another out=", "another --out")


def print_status(text: str) -> None:
    """Print a line about the work (not its result) on stderr."""
    if speaks():
        report(text)


def print_result(options: argparse.Namespace, content: Any, text: Callable[[], str]) -> None:
    """Print the result on stdout: `content` as JSON with `--json`, else what `text` returns."""
    if speaks():
        print(as_json(content) if options.json else printable(text()), flush=True)


def speaks() -> bool:
    """Whether this process prints: of several that train together, the one of rank 0."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def as_json(content: Any) -> str:
    """JSON that stdout can encode. Numbers that are not finite become null.

    Example:
        >>> as_json({"cider_d": float("nan")})
        '{\\n  "cider_d": null\\n}'
    """
    finite = finite_or_none(content)
    text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)
    return text if printable(text) == text else json.dumps(finite, indent=2, allow_nan=False)


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows of text as aligned columns.

    Example:
        >>> print(columns([("name", "size"), ("lstm", "5"), ("transformer", "12")], right=[1]))
        name         size
        lstm            5
        transformer    12

    Args:
        rows: Cells, equally many per row.
        right: Numbers of the columns that are aligned to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(widths[i]) if i in right else text.ljust(widths[i])
            for i, text in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
