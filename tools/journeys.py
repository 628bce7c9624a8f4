"""Which files a reader opens to follow one thing through the package: five journeys, traced.

    python tools/journeys.py            # the files of each journey, in order of first entry

A file is entered when one of its functions is called. Code that runs on import is no entry, and
neither is a name that a package looks up in `__getattr__`. tests/test_journeys.py has the limits.

caption    `Captioner.caption` of one image file, greedy.
step       `Distiller.step` of one batch with one loss, after others. `Captioner.forward` counts
           and is not followed further: what models do inside is the journey of a caption, and
           every further loss is one more file.
fit        From one `on_step` of `Distiller.fit` to the next: the callbacks that write the row, the
           next batch, its step. Models and losses as in `step`.
loss_name  From a loss's name, given to `Distiller`, to its term in the history of a run: functions
           that at any of their lines hold the name, the loss, its weight, or a container of one of
           them; and what the loss itself calls.
option     From `--learning-rate` on the command line until AdamW is made: functions that at any of
           their lines hold its value, by itself, in a container or in a configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from pydantic import BaseModel

import capdistill as cd
from capdistill.cli import main as command_line

Leaves = Collection[Callable[..., Any]]

PACKAGE = Path(cd.__file__).parent
MODELS = (cd.Captioner.forward,)
ODD, TERM = 0.00123, "odd_term"  # a number and a name that nothing else in a run has
QUIET: dict[str, Any] = {"device": "cpu", "precision": "fp32", "progress": False, "batch_size": 2}


class Tracer:
    """Record the files of the package that a block enters, in order of first entry.

    Example:
        >>> with Tracer() as tracer:
        ...     loss = cd.losses.create("token")
        >>> tracer.files[-1]
        'losses/token.py'

    Args:
        leaves: Functions that count, while what they call does not.
        carries: Count only functions that have a variable of which this is true, at any of their
            lines, and what methods of such an object call.
    """

    def __init__(self, leaves: Leaves = (), carries: Callable[[Any], bool] | None = None) -> None:
        self.files: list[str] = []
        self._leaves = {function.__code__ for function in leaves}
        self._carries = carries

    def __enter__(self) -> Tracer:
        self._before = sys.gettrace(), threading.gettrace()
        for frame in reversed(_callers(sys._getframe())):  # those that go on within the block
            self._trace(frame, "call", None)
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before[0])  # coverage, a debugger
        threading.settrace(self._before[1])

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        file = _file(frame.f_code.co_filename)
        if file is None or file in self.files:
            return None
        things = list(frame.f_locals.values())
        if event == "call":
            callers = _callers(frame)
            leaves = (caller.f_code in self._leaves for caller in callers)
            if any(leaves) or any(map(_is_import, [frame, *callers])):
                return None
            ours = [caller for caller in callers if _file(caller.f_code.co_filename)]
            things += [caller.f_locals.get("self") for caller in ours]
        if self._carries is None or any(map(self._carries, things)):
            self.files.append(file)
            return None
        return self._trace  # called again at each line, which may have bound a variable


def _callers(frame: FrameType) -> list[FrameType]:
    callers = []
    while frame.f_back is not None:
        frame = frame.f_back
        callers.append(frame)
    return callers


@functools.cache
def _file(name: str) -> str | None:
    """A source file's path within the package; None outside."""
    path = Path(name)
    return path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else None


def _is_import(frame: FrameType) -> bool:
    name, file = frame.f_code.co_name, _file(frame.f_code.co_filename)
    lazy = name == "__getattr__" and file is not None and file.endswith("__init__.py")
    return lazy or (name == "<module>" and file is not None)


def holding(values: Collection[str | float], kinds: Collection[type] = ()) -> Callable[[Any], bool]:
    """Whether something is one of the values, is of one of the kinds, or contains such a thing.

    Example:
        >>> holds = holding([0.5])
        >>> holds(0.5), holds({"train": {"rate": [0.5]}}), holds("0.5")
        (True, True, False)
    """

    def holds(thing: Any, depth: int = 4) -> bool:
        if isinstance(thing, (str, float)):
            return thing in values
        if isinstance(thing, tuple(kinds)) or any(thing is kind for kind in kinds):
            return True
        parts: Iterable[Any] = ()
        if isinstance(thing, dict):  # not what may still be being made
            parts = (part for pair in thing.items() for part in pair)
        elif isinstance(thing, (list, tuple)):
            parts = thing
        elif isinstance(thing, (BaseModel, argparse.Namespace)) or dataclasses.is_dataclass(thing):
            parts = vars(thing).values()
        return depth > 0 and any(holds(part, depth - 1) for part in islice(parts, 100))

    return holds


def make_distiller(losses: Any = None) -> tuple[cd.Distiller, Any]:
    """A distiller of two tiny models, and photos for four steps of an epoch."""
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    create = functools.partial(cd.Captioner.create, tokenizer=tokenizer)
    teacher, student = create("debug_teacher"), create("debug_student")
    distiller = cd.Distiller(teacher, student, losses or {"token": "token"}, **QUIET)
    return distiller, data.train.subset(8)


def caption() -> list[str]:
    """A greedy caption of an image file."""
    distiller, photos = make_distiller()
    student, path = distiller.student, photos.examples[0].path
    with Tracer() as tracer:
        student.caption(path)
    return tracer.files


def step(leaves: Leaves = MODELS, losses: Any = None) -> list[str]:
    """One optimizer step."""
    distiller, photos = make_distiller(losses)
    tokenizer, size = distiller.student.tokenizer, distiller.student.image_size
    loader = cd.data.Loader(photos, tokenizer, image_size=size, batch_size=2, train=True)
    *before, batch = loader.epoch(0)
    distiller.steps_per_epoch = len(before) + 1
    for each in before:
        distiller.step(each)
    with Tracer(leaves) as tracer:
        distiller.step(batch)
    return tracer.files


def fit(leaves: Leaves = MODELS, losses: Any = None) -> list[str]:
    """One turn of the loop of `fit`, between two calls of a callback."""
    distiller, photos = make_distiller(losses)
    tracer, block = Tracer(leaves), contextlib.ExitStack()

    class Between:
        def on_step(self, trainer: cd.Trainer, row: Mapping[str, Any]) -> None:
            if row["step"] == 2:
                block.enter_context(tracer)
            else:
                block.close()

    distiller.fit(photos, epochs=1, log_every=1, callbacks=[Between()])
    return tracer.files


def loss_name() -> list[str]:
    """The name of a loss until its term is in the history."""
    models, photos = make_distiller()
    weights = {"ce": 1.0, TERM: ODD}
    with Tracer(carries=holding(["token", TERM, ODD], [cd.TokenKD])) as tracer:
        distiller = cd.Distiller(models.teacher, models.student, {TERM: "token"}, weights, **QUIET)
        history = distiller.fit(photos.subset(2), epochs=1)
    assert history.steps[0]["terms"][TERM]["weighted"] > 0
    return tracer.files


def option() -> list[str]:
    """The learning rate from the command line until the optimizer is made."""
    holds = holding([ODD, str(ODD)])

    class Arrived(BaseException): ...

    def arrive(*arguments: Any, **options: Any) -> None:
        assert holds([arguments, options]), "AdamW was given another learning rate"
        raise Arrived

    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        words = ["train", "--preset", "debug_student", "--data", "sample", "--out", f"{out}/run"]
        words += ["--learning-rate", str(ODD), "--set", "tokenizer.min_count=2"]
        stack.enter_context(mock.patch.object(torch.optim.AdamW, "__init__", arrive))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.suppress(Arrived))
        with Tracer(carries=holds) as tracer:
            command_line(words)
            raise AssertionError("the command ended before AdamW was made")
    return tracer.files


JOURNEYS: dict[str, Callable[[], list[str]]] = {
    journey.__name__: journey for journey in (caption, step, fit, loss_name, option)
}


def main() -> None:
    """Print every journey, and what `step` and `fit` would be with all that they leave out."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    for name, journey in JOURNEYS.items():
        files = journey()
        print(f"{name}: {len(files)} files", *files, sep="\n    ")
    losses = {name: name for name in ("token", "feature", "hidden")}
    print(f"with three losses: step {len(step(losses=losses))}, fit {len(fit(losses=losses))}")
    print(f"and inside of models: step {len(step((), losses))}, fit {len(fit((), losses))}")


if __name__ == "__main__":
    main()
