"""Find the problems of a run before it starts: `check_training`, behind `Trainer.check()`.

Each check examines one topic and yields rows; `_attempt` turns an exception into a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from capdistill.errors import CapdistillError
from capdistill.teachers.cached import made_up_targets
from capdistill.training.check.costs import check_data, check_memory, check_options, check_time
from capdistill.training.check.models import (
    check_outputs,
    check_projectors,
    check_shapes,
    check_sizes,
    check_sums,
    check_terms,
    check_trained,
    check_vocabularies,
    check_weights,
)
from capdistill.training.check.trial import (
    CheckReport,
    CheckRow,
    Trial,
    less_memory,
    made_up_batch,
    restoring_state,
)

if TYPE_CHECKING:
    from capdistill.training.step import Stepper


def check_training(trainer: Stepper, train: Any = None, val: Any = None) -> CheckReport:
    """Look for problems that `trainer.fit(train, val)` would meet, without changing anything.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> report = check_training(cd.Trainer(captioner, batch_size=2))
        >>> report.ok, report.rows[0].topic
        (True, 'options')

    Args:
        trainer: A `Trainer` or `Distiller`.
        train: As for `fit`; without it a made-up batch of the configured size is used.
        val: As for `fit`.

    Returns:
        Rows with a finding and, if needed, a fix. A problem is a row, never an exception.
    """
    rows: list[CheckRow] = []
    with restoring_state(trainer), made_up_targets(*trainer.models):
        trainer.parallel = None  # what it wraps may stay wrapped
        if not _attempt(rows, "options", check_options, trainer, val):
            return CheckReport(tuple(rows))
        trial = Trial(trainer, trainer.config, made_up_batch(trainer))
        direct = {"cache_features": False, "cache_views": 1, "num_workers": 0}
        trainer.config = trainer.config.model_copy(update=direct)
        if train is None:
            trainer.prepare_data(trial.batch)
        else:
            _attempt(rows, "data", check_data, trial, train, val)
        for topic, check in _CHECKS:
            if not _attempt(rows, topic, check, trial):
                break  # the next check would meet the same problem
    return CheckReport(tuple(rows))


def _attempt(
    rows: list[CheckRow], topic: str, check: Callable[..., Iterable[CheckRow]], *args: Any
) -> bool:
    """Add the rows of a check. If it raises, add one row for the exception and return False."""
    try:
        rows.extend(check(*args))
    except Exception as error:  # whatever a model, a loss or a data set raises is a finding
        rows.append(_failure(topic, error, args[0]))
        return False
    return True


_USUAL = {
    "data": "Pass a data set with at least one readable image and a caption.",
    "shapes": "Fix the model's forward, or its specification.",
    "losses": "Remove the loss, or use models that fit it.",
}


def _failure(topic: str, error: Exception, about: Any) -> CheckRow:
    text = str(error).strip()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return CheckRow("memory", "fail", f"Out of memory: {text}", less_memory(about.config))
    if not isinstance(error, CapdistillError):
        fix = "This error was raised outside capdistill: fix the model, loss or data it comes from."
        if isinstance(about, Trial) and about.source is None:
            fix += " If the made-up batch causes it, pass your data to check()."
        return CheckRow(topic, "fail", f"{type(error).__name__}: {text}", fix)
    finding, _, fix = " ".join(text.split()).partition(". ")
    return CheckRow(
        topic, "fail", finding, fix or _USUAL.get(topic, "Fix the problem that the message names.")
    )


_CHECKS: tuple[tuple[str, Callable[[Trial], Iterable[CheckRow]]], ...] = (
    ("models", check_sizes),
    ("vocabulary", check_vocabularies),
    ("shapes", check_shapes),
    ("losses", check_projectors),  # the needed outputs are known once the losses are built
    ("shapes", check_outputs),
    ("losses", check_sums),
    ("weights", check_weights),
    ("trained", check_trained),
    ("terms", check_terms),
    ("memory", check_memory),
    ("time", check_time),
)

__all__ = ["CheckReport", "CheckRow", "check_training"]
