"""The trainer's state on disk, apart from the student: written atomically, read as data only."""

from __future__ import annotations

import pickle
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capdistill.captioner import Captioner
from capdistill.errors import CheckpointError, ConfigError
from capdistill.files import write_atomically
from capdistill.training.history import Row
from capdistill.weights import load_exactly, read_state_dict

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_FORMAT = "capdistill.training/1"
STATE = "state.pt"
PREVIOUS = "state.previous.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically; the one before stays beside it as `.previous`.

    Raises:
        ConfigError: it can not be written; what stood there stays.
    """
    fresh = path.with_suffix(".new.pt")
    write_atomically(fresh, lambda temporary: _dump({"format": _FORMAT, **state}, temporary))
    if path.exists():
        path.replace(path.with_name(PREVIOUS))
    fresh.replace(path)


def _dump(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{error}".split("\n")[0]) from error


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; the one before where the last is truncated, which is said.

    Raises:
        CheckpointError: no readable state, naming each file and what is wrong with it.
    """
    problems: list[str] = []
    for candidate in (path, path.with_name(PREVIOUS)):
        try:
            state = _read(candidate)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"{problems[0]}; going on from {candidate}, after step {state['step']}.",
                stacklevel=2,
            )
        return state
    raise CheckpointError(
        "There is no training state to resume: " + "; ".join(problems) + ". "
        "Give the directory of a run (out=), or start anew with resume=False."
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated or no training state")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} can not be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training state of capdistill")
    return state


def forget_states(out: Path) -> None:
    """A run that starts anew must not be resumed from an earlier one's state."""
    for name in (STATE, PREVIOUS):
        (out / name).unlink(missing_ok=True)


def rehearse_saving(captioner: Captioner, out: Path) -> None:
    """Save once to a place of no account: what can not be saved is said before training.

    Raises:
        ConfigError: `out` can not be written, or a part could not be made again from a file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal.", dir=out) as folder:
            captioner.save(folder)
    except OSError as error:
        raise ConfigError(
            f"Can not write to {out}: {error.strerror or error}. Give an out= that exists or can "
            "be made, is writable and has space."
        ) from error


class Checkpoints:
    """After each epoch: the best student to best/, the state to state.pt; at the end final/."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.best: dict[str, torch.Tensor] | None = None  # kept here only without a directory

    def on_epoch(self, trainer: Trainer, row: Row) -> None:
        """Keep the student if it improved, then the state to go on from."""
        if row.get("improved"):
            if self.out is None:
                self.best = _copy_weights(trainer.captioner)
            else:
                trainer.captioner.save(self.out / "best")
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write what a resumed run needs."""
        if self.out is not None:
            save_state(self.out / STATE, trainer.state_dict())

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write the last student; then the captioner takes the best weights.

        Where no epoch was the best, the last weights are the best there are.
        """
        if trainer.history.interrupted:
            return
        if self.out is not None:
            trainer.captioner.save(self.out / "final")
            if trainer.history.best is None:
                trainer.captioner.save(self.out / "best")
            else:
                _load_weights(trainer.captioner, self.out / "best" / "model.safetensors")
        elif self.best is not None:
            trainer.captioner.load_state_dict(self.best)


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _load_weights(captioner: Captioner, path: Path) -> None:
    """Read what `save` wrote: without what torch.compile adds to names."""
    names = {key.replace("_orig_mod.", ""): key for key in captioner.state_dict()}
    state = {names.get(key, key): value for key, value in read_state_dict(path).items()}
    load_exactly(captioner, state, f"The weights in '{path}'")
