"""The trainer's state on disk, apart from the student: written atomically, read as data only."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capdistill.errors import CheckpointError
from capdistill.files import write_atomically
from capdistill.training.history import Row

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_FORMAT = "capdistill.training/1"
STATE = "state.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically; the one before stays beside it as `.previous`."""
    if path.exists():
        path.replace(path.with_suffix(".previous.pt"))
    content = {"format": _FORMAT, **state}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; the one before where the last is truncated or gone.

    Raises:
        CheckpointError: no readable state, naming each file and what is wrong with it.
    """
    problems = []
    for candidate in (path, path.with_suffix(".previous.pt")):
        try:
            return _read(candidate)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(
        "There is no training state to resume: " + "; ".join(problems) + ". "
        "Give the directory of a run (out=), or start anew with resume=False."
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is truncated or no training state")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can not be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training state of capdistill")
    return state


class Checkpoints:
    """After each epoch: the best student to best/, the state to state.pt; at the end final/."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.best: dict[str, torch.Tensor] | None = None

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Keep the student if it improved, then the state to go on from."""
        if row.get("improved"):
            self.best = _copy_weights(trainer.captioner)
            if self.out is not None:
                trainer.captioner.save(self.out / "best")
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write what a resumed run needs."""
        if self.out is not None:
            save_state(self.out / STATE, trainer.state_dict())

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write the last student; then the captioner takes the best weights."""
        if trainer.history.interrupted:
            return
        if self.out is not None:
            trainer.captioner.save(self.out / "final")
        if self.best is None and self.out is not None and trainer.history.best is not None:
            self.best = _saved_weights(self.out / "best")
        if self.best is not None:
            trainer.captioner.load_state_dict(self.best)
        elif self.out is not None:
            trainer.captioner.save(self.out / "best")


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _saved_weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")
