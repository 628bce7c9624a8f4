"""The trainer's state on disk, apart from the student: written atomically, read as data only."""

from __future__ import annotations

import json
import pickle
import platform
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.errors import CheckpointError, ConfigError
from capdistill.files import write_atomically, write_text
from capdistill.registry import stamp_of
from capdistill.training.optim import make_schedule
from capdistill.weights import load_exactly, strip_prefixes

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


_FORMAT = "capdistill.training/1"
STATE = "state.pt"
PREVIOUS = "state.previous.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically; the one before stays beside it as `.previous`.

    Raises:
        ConfigError: it cannot be written; what stood there stays.
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
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training state of capdistill")
    return state


def forget_states(out: Path) -> None:
    """A run that starts anew must not be resumed from an earlier one's state."""
    for name in (STATE, PREVIOUS):
        (out / name).unlink(missing_ok=True)


def rehearse_saving(captioner: Captioner, out: Path) -> None:
    """Save once to a place of no account: what cannot be saved is said before training.

    Raises:
        ConfigError: `out` cannot be written, or a part could not be made again from a file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal.", dir=out) as folder:
            captioner.save(folder)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to {out}: {error.strerror or error}. Give an out= that exists or can "
            "be made, is writable and has space."
        ) from error


# Options that may change between two parts of a run without changing what is trained.
_HARMLESS = frozenset(
    {
        "num_workers",
        "device",
        "cache_images",
        "cache_dir",
        "eval_batch_size",
        "log_every",
        "progress",
    }
)


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """All that a resumed run needs beside the data."""
    assert trainer.optimizer is not None
    return {
        "objective": trainer.objective.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": {"done": trainer.schedule.last_epoch},
        "scaler": trainer.scaler.state_dict(),
        "random": random_state(),
        "epoch": trainer.epoch,
        "step": trainer.step_count,
        "so_far": trainer.so_far.state_dict(),
        "skipped": len(trainer.train_source.skipped) if trainer.train_source is not None else 0,
        "config": trainer.config.model_dump(),
        "callbacks": dict(_callback_states(trainer)),
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Let a trainer, its optimizer made, go on from a saved state.

    Raises:
        CheckpointError: the state is of other models or losses; nothing was changed.
    """
    assert trainer.optimizer is not None
    _require_same_groups(trainer.optimizer, state["optimizer"])
    weights = strip_prefixes(state["objective"], trainer.objective.state_dict())
    load_exactly(trainer.objective, weights, "The models and losses of the training state")
    _say_what_changed(trainer.config.model_dump(), state["config"])
    _restore_optimizer(trainer, state)
    trainer.scaler.load_state_dict(state["scaler"])
    restore_random(state["random"])
    trainer.epoch, trainer.step_count = state["epoch"], state["step"]
    trainer.so_far.load_state_dict(state["so_far"])
    for key, callback in _stateful(trainer):
        if key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][key])


def _restore_optimizer(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Moments from the state, rates and decay from the configuration, which may have changed."""
    optimizer = trainer.optimizer
    assert optimizer is not None
    keys = ("initial_lr", "weight_decay")
    wanted = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, fresh in zip(optimizer.param_groups, wanted, strict=True):
        group.update(fresh)
    done = state["schedule"]["done"]
    trainer.schedule = make_schedule(optimizer, trainer.config, trainer.steps_per_epoch, done)


def _require_same_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    mine = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    theirs = [(group.get("name"), len(group["params"])) for group in saved["param_groups"]]
    if mine != theirs:
        raise CheckpointError(
            f"The training state has an optimizer over groups {theirs}, but {mine} are trained "
            "now. Give the same models, losses and trainable parts, or start anew with "
            "resume=False."
        )


def _say_what_changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in _HARMLESS
    ]
    if changed:
        warnings.warn(
            f"The resumed run goes on with other options: {', '.join(changed)}. Learning rates and "
            "scheduled weights follow the new ones from here on.",
            stacklevel=2,
        )


def _stateful(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Callbacks with a state, by class and, of one class, by order."""
    seen: Counter[str] = Counter()
    for callback in trainer.callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__qualname__
            yield f"{name}.{seen[name]}", callback
            seen[name] += 1


def _callback_states(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for key, callback in _stateful(trainer):
        state = callback.state_dict()
        if not _is_plain(state):
            raise ConfigError(
                f"The state_dict() of the callback {type(callback).__name__} holds more than "
                "numbers, strings, tensors, lists and dicts, so that it could not be read again. "
                f"Given: {state!r:.200}"
            )
        yield key, state


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, Tensor)


def random_state() -> dict[str, Any]:
    """State of torch's generators, here and on CUDA devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_random(state: Mapping[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


LIBRARIES = ("capdistill", "torch", "torchvision", "timm", "numpy", "pydantic", "nltk")


def describe_run(trainer: Trainer, out: Path) -> None:
    """Write run.json: resolved options, models, weights of the terms, versions and seed."""
    content = {
        "format": "capdistill.run/1",
        "trainer": type(trainer).__name__,
        "config": trainer.config.model_dump(),
        "device": str(trainer.device),
        "precision": trainer.precision,
        "weights": {name: _plain(value) for name, value in trainer.objective.weights.items()},
        "losses": {name: _part(loss) for name, loss in trainer.objective.losses.items()},
        "models": [_model(model) for model in trainer.models],
        "versions": versions(),
    }
    write_text(out / "run.json", json.dumps(content, indent=2, default=str))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a run depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, Captioner):
        return {"name": getattr(model, "name", type(model).__name__)}
    parts = {"encoder": _part(model.encoder), "decoder": _part(model.decoder)}
    return {"name": model.name, "parameters": model.num_parameters(), **parts}


def _part(part: Any) -> dict[str, Any]:
    stamp = stamp_of(part)
    if stamp is None:
        return {"class": f"{type(part).__module__}:{type(part).__qualname__}", "shown": repr(part)}
    return {"name": stamp.name, "kwargs": stamp.kwargs}


def _plain(weight: Any) -> Any:
    return repr(weight) if callable(weight) else weight
