"""The state of a run: written atomically, read as data only."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from capdistill.data.caption_files import Problem
from capdistill.data.loader import Loader
from capdistill.data.source import Source
from capdistill.errors import CapdistillError, CheckpointError, ConfigError
from capdistill.files import temporary_name
from capdistill.runtime import random_state, restore_random
from capdistill.training.distributed import HARMLESS
from capdistill.training.monitor import is_complete
from capdistill.training.optim import make_schedule
from capdistill.training.run_directory import (
    PREVIOUS,
    START,
    UNFINISHED,
    is_plain,
    previous_state,
    previous_states,
)
from capdistill.training.sources import captions_per_image
from capdistill.training.state_file import read_file, write_file
from capdistill.training.step import Stepper
from capdistill.weights import load_exactly, strip_prefixes

_FORMAT = "capdistill.training/3"


def save_state(path: Path, state: dict[str, Any], keep: int = 1, check: bool = False) -> None:
    """Write a training state atomically; the ones before stay beside it as `.previous`.

    Args:
        path: The file.
        state: From `snapshot`.
        keep: How many earlier states are kept.
        check: Remove earlier states that cannot be read, lest they take the place of good ones.

    Raises:
        ConfigError: it cannot be written; the existing file is unchanged.
    """
    fresh = path.with_name(UNFINISHED)
    write_file(fresh, state, _FORMAT)
    if check:
        _remove_damaged(path)
    _shift(path, keep)
    fresh.replace(path)


def _remove_damaged(path: Path) -> None:
    for each in (path, *previous_states(path.parent)):
        try:
            _require_complete(read_file(each, _FORMAT), each)
        except CheckpointError:
            each.unlink(missing_ok=True)


def _shift(path: Path, keep: int) -> None:
    """Make room for a new state: every earlier one moves one place on, those beyond `keep` go."""
    for number, old in enumerate(previous_states(path.parent), 1):
        if number > keep:
            old.unlink(missing_ok=True)
        else:
            old.replace(path.with_name(previous_state(number)))  # no gaps
    for number in range(keep if path.exists() else 0, 0, -1):
        younger = path if number == 1 else path.with_name(previous_state(number - 1))
        if younger.exists():
            _give_name(younger, path.with_name(previous_state(number)), keep=number == 1)


def _give_name(path: Path, name: Path, keep: bool) -> None:
    """Rename a file; with `keep` it has both names, so that there is a state at every moment."""
    second = path.with_name(temporary_name(name.name))
    try:
        if keep:
            os.link(path, second)
            second.replace(name)  # does nothing where both are one file already
            second.unlink(missing_ok=True)
            return
    except OSError:  # a file system without links
        second.unlink(missing_ok=True)
    path.replace(name)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; if it is damaged, read the latest one that is not, with a warning.

    Raises:
        CheckpointError: no readable state; names each file and what is wrong with it.
    """
    problems: list[str] = []
    others = previous_states(path.parent) or [path.with_name(PREVIOUS)]
    for candidate in (path, *others):
        try:
            state = read_file(candidate, _FORMAT)
            _require_complete(state, candidate)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"{problems[0]}; continuing from {candidate}, after step {state.get('step')}.",
                stacklevel=2,
            )
        return state
    raise CheckpointError(
        "There is no training state to resume: " + "; ".join(problems) + ". "
        "Give the directory of a run (out=), start again with resume=False, or use resume='auto'."
    )


_PARTS: dict[str, type] = {
    **dict.fromkeys(("objective", "optimizer", "schedule", "scaler", "random", "guard"), dict),
    **dict.fromkeys(("meter", "averages", "config", "identity", "position", "callbacks"), dict),
    **{"epoch": int, "step": int, "skipped": list},
}


def _require_complete(state: Mapping[str, Any], path: Path) -> None:
    wrong = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{path} is no whole training state: it lacks {', '.join(wrong)}")


@contextmanager
def _fitting() -> Iterator[None]:
    """What foreign code raises at parts of a state that it cannot use, as our error."""
    try:
        yield
    except (CapdistillError, Warning):  # warnings may be errors
        raise
    except Exception as error:
        raise CheckpointError(
            f"The training state cannot be used ({type(error).__name__}: {error}). Give the same "
            "models, losses and callbacks, go back to an earlier state (state.previous.pt), or "
            "start again with resume=False."
        ) from error


def snapshot(
    stepper: Stepper,
    train: Source | None,
    callbacks: Sequence[Any],
    who: Mapping[str, Any],
) -> dict[str, Any]:
    """All that a resumed run needs besides the data.

    Args:
        stepper: The trainer.
        train: Its training data.
        callbacks: Those that have a state are saved with it.
        who: The run's `identity`.
    """
    assert stepper.optimizer is not None
    return {
        "objective": stepper.objective.state_dict(),
        "optimizer": stepper.optimizer.state_dict(),
        "schedule": {"done": stepper.schedule.last_epoch},
        "scaler": stepper.scaler.state_dict(),
        "random": random_state(),
        "epoch": stepper.epoch,
        "step": stepper.step_count,
        "guard": stepper.guard.state_dict(),
        "meter": stepper.meter.state_dict(),
        "averages": {name: each.state_dict() for name, each in stepper.averages.items()},
        "skipped": [list(astuple(problem)) for problem in _reported(train)],
        "config": stepper.config.model_dump(),
        "identity": dict(who),
        "position": _position(stepper, train),
        "callbacks": dict(_callback_states(callbacks)),
    }


@_fitting()
def restore(
    stepper: Stepper,
    state: Mapping[str, Any],
    train: Source | None,
    callbacks: Sequence[Any],
    who: Mapping[str, Any],
    accept_changes: bool = False,
) -> None:
    """Let a trainer continue from a saved state; its optimizer must exist.

    Args:
        stepper: The trainer.
        state: From `snapshot`.
        train: The training data of the resumed run.
        callbacks: Those of the resumed run; the state of each is restored.
        who: Its `identity`.
        accept_changes: Continue although losses, weights, teacher or data have changed.

    Raises:
        CheckpointError: the state belongs to another run; nothing was changed.
    """
    assert stepper.optimizer is not None
    _require_same_run(who, state["identity"], accept_changes)  # names causes: it comes first
    _require_same_groups(stepper.optimizer, state["optimizer"])
    if train is not None:  # a loop of your own finds its place by itself
        _require_same_position(_position(stepper, train), state)
    weights = strip_prefixes(state["objective"], stepper.objective.state_dict())
    load_exactly(stepper.objective, weights, "The models and losses of the training state")
    for name, average in stepper.averages.items():
        if name in state.get("averages", {}):
            average.load_state_dict(state["averages"][name])
        else:
            average.restart()  # it begins with the resumed run
    for key, callback in _stateful(callbacks):
        if key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][key])
    same = _position(stepper, train).get("batch_size") == state["position"].get("batch_size")
    harmless = HARMLESS | {"batch_size"} if same else HARMLESS  # on another number of ranks
    complete = is_complete(state["epoch"], stepper.config.epochs, callbacks)
    _warn_of_changes(stepper.config.model_dump(), state["config"], harmless, complete)
    _restore_optimizer(stepper, state)
    stepper.scaler.load_state_dict(state["scaler"])
    restore_random(state["random"])
    stepper.epoch, stepper.step_count = state["epoch"], state["step"]
    stepper.guard.load_state_dict(state["guard"])
    stepper.meter.load_state_dict(state["meter"])
    if isinstance(train, Loader):
        for problem in state["skipped"]:
            train.skipped.add(Problem(*problem))


def _reported(train: Source | None) -> list[Problem]:
    """The images that a loader has skipped so far; it will not meet all of them again."""
    return list(train.skipped) if isinstance(train, Loader) else []


@_fitting()
@torch.no_grad()
def restore_frozen(stepper: Stepper, state: Mapping[str, Any]) -> None:
    """Give the student's frozen parts the weights and ranges of a state, before they are cached.

    They differ where a resumed process has drawn new random weights. What does not fit stays as it
    is; `restore` names it.
    """
    own = stepper.objective.state_dict()
    trained = {n for n, p in stepper.objective.named_parameters() if p.requires_grad}
    for name, value in strip_prefixes(state["objective"], own).items():
        frozen = name.startswith(("student.", "quantizer.")) and name not in trained and name in own
        if frozen and own[name].shape == value.shape:
            own[name].copy_(value)


def _require_same_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    mine = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    theirs = [(group.get("name"), len(group["params"])) for group in saved["param_groups"]]
    if mine != theirs:
        raise CheckpointError(
            f"The training state has an optimizer over groups {theirs}, but {mine} are trained "
            "now. Give the same models, losses and trainable parts, or start again with "
            "resume=False."
        )


def _require_same_run(now: Mapping[str, Any], saved: Mapping[str, Any], accept: bool) -> None:
    # A loop of your own does not know its data, and a run may continue without validation, or
    # without the run that it continues.
    optional = {key for key in {*now} ^ {*saved} if key == START or key.endswith(" data")}
    changed = [
        f"{key}: {saved.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted({*now, *saved} - optional)
        if now.get(key) != saved.get(key)
    ]
    if not changed:
        return
    if not accept:
        raise CheckpointError(
            "The training state is of another run than the one it would continue. What differs "
            f"(saved -> given): {'; '.join(changed)}. Give what the run began with, start again in "
            "another directory, or continue with the changes by accept_changes=True."
        )
    warnings.warn(f"The resumed run continues with changes: {'; '.join(changed)}.", stacklevel=3)


def _position(stepper: Stepper, train: Source | None) -> dict[str, Any]:
    """The options that determine the batches of an epoch, as far as the source has them."""
    found = {name: getattr(train, name, None) for name in ("batch_size", "seed")}
    if isinstance(found["batch_size"], int):  # of all ranks together
        found["batch_size"] *= getattr(train, "world_size", 1)
    found["captions_per_image"] = None
    if train is not None:
        found["captions_per_image"] = captions_per_image(train, stepper.config)
    curriculum = getattr(train, "curriculum", None)
    if curriculum is not None:
        found["curriculum"] = curriculum.key(stepper.config.epochs)
    found["batches"] = len(train) if hasattr(train, "__len__") else None  # type: ignore[arg-type]
    return {name: value if isinstance(value, int) else None for name, value in found.items()}


def _require_same_position(now: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Within an epoch, the position tells which images are done: it must mean the same."""
    before = state["position"]
    names = sorted({*now, *before})
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if state["meter"]["position"] and changed:
        raise CheckpointError(
            f"The run was interrupted within epoch {state['epoch'] + 1}, after "
            f"{state['meter']['images']} images, and would now divide the epoch differently "
            f"({', '.join(changed)}). Resume with the saved values; change them when an epoch is "
            "complete. On N processes, the batch_size named here is N times the option."
        )


def _warn_of_changes(
    now: Mapping[str, Any], before: Mapping[str, Any], harmless: frozenset[str], complete: bool
) -> None:
    changed = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in harmless
    ]
    effect = "Learning rates and scheduled weights follow the new ones from here on."
    if complete:
        effect = (
            "It is complete already, so they change nothing. Train in another directory, or give "
            "more epochs."
        )
    if changed:
        warnings.warn(
            f"The resumed run continues with other options: {', '.join(changed)}. {effect}",
            stacklevel=2,
        )


def _restore_optimizer(stepper: Stepper, state: Mapping[str, Any]) -> None:
    """Moments from the state, rates and decay from the configuration, which may have changed."""
    optimizer = stepper.optimizer
    assert optimizer is not None
    keys = ("initial_lr", "weight_decay")
    wanted = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, fresh in zip(optimizer.param_groups, wanted, strict=True):
        group.update(fresh)
    done = state["schedule"]["done"]
    stepper.schedule = make_schedule(optimizer, stepper.config, stepper.steps_per_epoch, done)


def _stateful(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Callbacks with a state, by class and, of one class, by order."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__qualname__
            yield f"{name}.{seen[name]}", callback
            seen[name] += 1


def _callback_states(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for key, callback in _stateful(callbacks):
        state = callback.state_dict()
        if not is_plain(state):
            raise ConfigError(
                f"The state_dict() of the callback {type(callback).__name__} holds more than "
                "numbers, strings, tensors, lists and dicts, which could not be read again. "
                f"Given: {state!r:.200}"
            )
        yield key, state
