"""A step that failed, as a file from which it can be run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from capdistill.errors import CapdistillError, CheckpointError, LossSpike, NotFiniteLoss
from capdistill.files import user_path
from capdistill.outputs import Batch, LossTerm, select_images
from capdistill.runtime import Drawn, evaluating, random_state
from capdistill.training.callbacks import Run
from capdistill.training.history import Row
from capdistill.training.objective import Objective
from capdistill.training.run_directory import FAILED_STEP
from capdistill.training.sharding import any_sharded
from capdistill.training.state_file import read_file, write_file

_FORMAT = "capdistill.failed_step/1"
_TENSORS = ("images", "input_ids", "mask", "sampled", "caption_weights", "advantages")


class Trains(Run, Protocol):
    """What is needed of a `Trainer` to keep a step and to run it again."""

    objective: Objective

    @property
    def models(self) -> list[nn.Module]:
        """The models that read a batch."""

    def terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The terms of a batch."""

    def step(self, *micro_batches: Batch | None) -> Row:
        """One optimizer step."""

    def make_ready(self, batch: Batch | None = None) -> Any:
        """Make the optimizer."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


def explained(
    error: NotFiniteLoss | LossSpike,
    trainer: Trains,
    batches: Sequence[Batch | None],
    before: Drawn,
) -> NotFiniteLoss | LossSpike:
    """The error of a step with the images behind it, and with a file to run the step again.

    The file is `failed_step.pt` in the directory of the run; without one nothing is written. Of
    several ranks, it holds the batches of the main one.

    Args:
        error: What the step raised.
        trainer: The trainer, whose weights the step did not change.
        batches: The micro-batches of the step.
        before: The random state before the step.
    """
    own = [batch for batch in batches if batch is not None]
    found = _images_alone(trainer, own) if isinstance(error, NotFiniteLoss) else []
    alone = f" By themselves, these give it too: {', '.join(found)}." if found else ""
    return type(error)(f"{error}{alone}{_keep(trainer, own, before, str(error))}")


def _keep(trainer: Trains, batches: Sequence[Batch], before: Drawn, error: str) -> str:
    """Write the file, if there is a directory; what the message says about it."""
    out = trainer.checkpoints.out
    if out is None or any_sharded(trainer.objective):
        return ""
    try:
        content = {
            "state": {**trainer.state_dict(), "random": random_state(before)},
            "steps_per_epoch": trainer.steps_per_epoch,
            "batches": [_as_data(batch) for batch in batches],
            "error": error,
        }
        write_file(out / FAILED_STEP, content, _FORMAT)
    except Exception as problem:  # a full disk, parts that no file can hold: the first error counts
        return f" The step could not be written to {out / FAILED_STEP} ({problem})."
    return (
        f" The step is in {out / FAILED_STEP}: capdistill.training.replay_step(trainer, file) "
        "runs it again."
    )


def replay_step(trainer: Trains, path: str | Path) -> Row:
    """Run the step again that ended a run, from the file that the run left.

    The trainer takes the weights, the optimizer and the random state that it had before the step.
    On a CPU the step then fails in the same way. Change options, or set breakpoints, to find out
    why. What a step itself moves besides the weights, such as running statistics of batch norms,
    is as the failed step left it.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> cd.training.replay_step(cd.Trainer(student), "runs/student/failed_step.pt")
        Traceback (most recent call last):
        ...
        capdistill.errors.CheckpointError: runs/student/failed_step.pt does not exist...

    Args:
        trainer: Made like that of the run: the same models, losses and weights.
        path: The file `failed_step.pt`.

    Returns:
        The row of the step, if it succeeds this time.

    Raises:
        NotFiniteLoss: the step fails again.
        LossSpike: the same.
        CheckpointError: the file is missing, damaged, or of other models or losses.
    """
    content = read_file(user_path(path, CheckpointError), _FORMAT, "failed step")
    try:
        batches = [Batch(**_from_data(each)) for each in content["batches"]]
        state, steps = content["state"], content["steps_per_epoch"]
    except (KeyError, TypeError, AttributeError, CapdistillError) as error:
        raise CheckpointError(f"{path} is incomplete: {error}.") from error
    trainer.make_ready(batches[0])
    trainer.steps_per_epoch = steps
    trainer.load_state_dict(state)
    return trainer.step(*batches)


def _as_data(batch: Batch) -> dict[str, Any]:
    """The fields of a batch as plain data."""
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    values["cached"] = {name: value.cpu() for name, value in batch.cached.items()}
    for name in _TENSORS:
        values[name] = None if values[name] is None else values[name].cpu()
    return values


def _from_data(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {each.name for each in fields(Batch)}
    return {name: value for name, value in values.items() if name in known}


def _images_alone(trainer: Trains, batches: Sequence[Batch]) -> list[str]:
    """The images whose terms are not finite when each is the whole batch, unless all are."""
    alone: list[str] = []
    images = 0
    if any_sharded(trainer.objective, *trainer.models):
        return []  # all ranks would have to run them together
    try:
        with evaluating(trainer.objective), torch.no_grad():
            for batch in batches:
                for number, image_id in enumerate(batch.image_ids):
                    images += 1
                    terms = trainer.terms(select_images(batch, [number]))
                    sums = torch.stack([term.sum.float() for term in terms.values()])
                    alone += [] if bool(sums.isfinite().all()) else [image_id]
    except Exception:  # a loss that needs several images, or user code: the step's error counts
        return []
    return alone if len(alone) < images else []
