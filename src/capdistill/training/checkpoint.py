"""The directory of a run and the state in it: written atomically, read as data only."""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
import random
import re
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.data.loader import Source, skipped_images
from capdistill.errors import CheckpointError, ConfigError
from capdistill.files import user_path, write_atomically, write_text
from capdistill.registry import stamp_of
from capdistill.training.optim import make_schedule
from capdistill.training.step import Stepper
from capdistill.weights import load_exactly, strip_prefixes

_FORMAT = "capdistill.training/2"
STATE = "state.pt"
PREVIOUS = "state.previous.pt"
_RESULTS = (STATE, PREVIOUS, "best", "final")  # a new run does not replace these unasked
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}|\.check\..+")
LIBRARIES = ("capdistill", "torch", "torchvision", "timm", "numpy", "pydantic", "nltk")

Resume = bool | Literal["auto"]


# -- the directory ----------------------------------------------------------------------------


def open_directory(
    out: str | Path | None, resume: Resume, overwrite: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """The directory of a run, and the state to resume from, if any. Nothing is written yet.

    Args:
        out: As given to `fit`.
        resume: True needs a state; "auto" takes one where there is one.
        overwrite: Whether a new run may replace the results of an earlier one.

    Raises:
        ConfigError: options that contradict each other, or a directory that holds a run.
        CheckpointError: there is nothing to resume.
    """
    if resume not in (True, False, "auto") or not isinstance(overwrite, bool):
        raise ConfigError(
            f"fit: resume={resume!r} and overwrite={overwrite!r} were given. Expected resume=True, "
            "False or 'auto', and overwrite=True or False."
        )
    if resume is True and overwrite:
        raise ConfigError("fit: resume=True and overwrite=True contradict each other. Choose one.")
    if out is None:
        if resume is True:
            raise ConfigError("resume=True needs out=, the directory of the run to continue.")
        return None, None
    directory = user_path(out)
    found = [name for name in _RESULTS if (directory / name).exists()]
    if resume is True or (resume == "auto" and STATE in found and not overwrite):
        return directory, load_state(directory / STATE)
    if found and not overwrite:
        raise ConfigError(
            f"{directory} holds the results of an earlier run ({', '.join(found)}). Continue it "
            "with resume=True, give another out=, or replace it with overwrite=True."
        )
    return directory, None


def clear_directory(out: Path, keep_results: bool) -> None:
    """Remove temporary files of interrupted writers and, for a new run, all an earlier one left."""
    for path in out.iterdir() if out.is_dir() else ():
        stale = _TEMPORARY.fullmatch(path.name) is not None
        if stale or (not keep_results and path.name in (*_RESULTS, "run.json", "history.jsonl")):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_can_save(captioner: Captioner, out: Path) -> None:
    """Save once to a temporary directory, so that what cannot be saved fails before training.

    Raises:
        ConfigError: `out` cannot be written, or a part could not be made again from a file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".check.", dir=out) as folder:
            captioner.save(Path(folder) / "captioner")
    except OSError as error:
        raise ConfigError(
            f"Cannot write to {out}: {error.strerror or error}. Give an out= that exists or can "
            "be made, is writable and has space."
        ) from error


def describe_run(stepper: Stepper, train: Source, captions: int | None, out: Path) -> None:
    """Write run.json: resolved options, models, weights of the terms, versions and seed."""
    content = {
        "format": "capdistill.run/1",
        "trainer": type(stepper).__name__,
        "config": {**stepper.config.model_dump(), "captions_per_image": captions},
        "device": str(stepper.device),
        "precision": stepper.precision,
        "num_workers": getattr(train, "num_workers", None),
        "weights": {name: _plain(value) for name, value in stepper.objective.weights.items()},
        "losses": {name: _part(loss) for name, loss in stepper.objective.losses.items()},
        "models": [_model(model) for model in stepper.models],
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
    if stamp is not None:
        return {"name": stamp.name, **stamp.kwargs}
    kind = f"{type(part).__module__}:{type(part).__qualname__}"
    return {"class": kind, **_plain_attributes(part)}


def _plain(weight: Any) -> Any:
    if callable(weight):
        return f"function {getattr(weight, '__qualname__', type(weight).__name__)}"
    return list(weight) if isinstance(weight, tuple) else weight


def _plain_attributes(module: Any) -> dict[str, Any]:
    """Public attributes that are plain data: temperature, layers and the like."""
    skipped = ("training", "registered_as")
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in skipped and _is_plain(value)
    }


# -- the state on disk --------------------------------------------------------------------------


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
    """Read a training state; the one before where the last is truncated, with a warning.

    Raises:
        CheckpointError: no readable state; names each file and what is wrong with it.
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
                f"{problems[0]}; continuing from {candidate}, after step {state['step']}.",
                stacklevel=2,
            )
        return state
    raise CheckpointError(
        "There is no training state to resume: " + "; ".join(problems) + ". "
        "Give the directory of a run (out=), start anew with resume=False, or use resume='auto'."
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated or not a training state")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a training state of this version of capdistill")
    return state


# -- the state of a trainer ---------------------------------------------------------------------


# Options that may differ between two parts of a run without changing what is trained.
_HARMLESS = frozenset(
    {
        "num_workers",
        "device",
        "cache_images",
        "cache_dir",
        "eval_batch_size",
        "log_every",
        "save_every_steps",
        "save_every_minutes",
        "progress",
    }
)
_POSITION = ("batch_size", "captions_per_image", "seed")  # decide which batches an epoch has


def snapshot(
    stepper: Stepper,
    train: Source | None,
    callbacks: Sequence[Any],
    who: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that a resumed run needs besides the data.

    Args:
        stepper: The trainer.
        train: Its training data.
        callbacks: Those that have a state are saved with it.
        who: The run's `identity`, where it is known already.
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
        "skipped_steps": stepper.skipped_steps,
        "meter": stepper.meter.state_dict(),
        "skipped": len(skipped_images(train)),
        "config": stepper.config.model_dump(),
        "identity": dict(who or identity(stepper, train)),
        "callbacks": dict(_callback_states(callbacks)),
    }


def restore(
    stepper: Stepper,
    state: Mapping[str, Any],
    train: Source | None,
    callbacks: Sequence[Any],
    accept_changes: bool = False,
) -> None:
    """Let a trainer continue from a saved state; its optimizer must exist.

    Args:
        stepper: The trainer.
        state: From `snapshot`.
        train: The training data of the resumed run.
        callbacks: Those of the resumed run; each with a state gets its own back.
        accept_changes: Continue although losses, weights, teacher or data are others.

    Raises:
        CheckpointError: the state is of another run; nothing was changed.
    """
    assert stepper.optimizer is not None
    _require_same_groups(stepper.optimizer, state["optimizer"])
    _require_same_run(identity(stepper, train), state["identity"], accept_changes)
    _require_same_position(stepper.config.model_dump(), state)
    weights = strip_prefixes(state["objective"], stepper.objective.state_dict())
    load_exactly(stepper.objective, weights, "The models and losses of the training state")
    _warn_of_changes(stepper.config.model_dump(), state["config"])
    _restore_optimizer(stepper, state)
    stepper.scaler.load_state_dict(state["scaler"])
    restore_random(state["random"])
    stepper.epoch, stepper.step_count = state["epoch"], state["step"]
    stepper.skipped_steps = state["skipped_steps"]
    stepper.meter.load_state_dict(state["meter"])
    for key, callback in _stateful(callbacks):
        if key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][key])


def identity(stepper: Stepper, train: Source | None) -> dict[str, Any]:
    """What makes a run this run, as plain data: its objective, teacher, words and images."""
    config, objective = stepper.config, stepper.objective
    losses = {name: _part_of_state(loss) for name, loss in objective.losses.items()}
    weights = {name: _plain(value) for name, value in objective.weights.items()}
    found: dict[str, Any] = {f"losses.{name}": value for name, value in losses.items()}
    found |= {f"weights.{name}": value for name, value in weights.items()}
    found["label_smoothing"] = config.label_smoothing
    found["monitor"] = config.monitor
    found["vocabulary"] = _digest([repr(list(stepper.captioner.tokenizer.vocabulary))])
    for number, teacher in enumerate(stepper.models[1:]):
        found[f"teacher {number + 1}"] = _weights_digest(teacher)
    if train is not None:
        found["training images"] = getattr(train, "num_images", None)
    return found


def _part_of_state(part: nn.Module) -> str:
    """A loss and its plain options, whether a registry made it or not."""
    kind = f"{type(part).__module__}:{type(part).__qualname__}"
    options = ", ".join(f"{k}={v!r}" for k, v in sorted(_plain_attributes(part).items()))
    return f"{kind}({options})"


def _weights_digest(module: nn.Module) -> str:
    values = module.state_dict().items()
    return _digest(
        part
        for name, value in values
        for part in (name, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    )


def _digest(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def _require_same_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    mine = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    theirs = [(group.get("name"), len(group["params"])) for group in saved["param_groups"]]
    if mine != theirs:
        raise CheckpointError(
            f"The training state has an optimizer over groups {theirs}, but {mine} are trained "
            "now. Give the same models, losses and trainable parts, or start anew with "
            "resume=False."
        )


def _require_same_run(now: Mapping[str, Any], saved: Mapping[str, Any], accept: bool) -> None:
    changed = [
        f"{key}: {saved.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted({*now, *saved})
        if now.get(key) != saved.get(key)
    ]
    if not changed:
        return
    if not accept:
        raise CheckpointError(
            "The training state is of another run than the one it would continue. What differs "
            f"(saved -> given): {'; '.join(changed)}. Give what the run began with, start anew in "
            "another directory, or continue with the changes by accept_changes=True."
        )
    warnings.warn(f"The resumed run continues with changes: {'; '.join(changed)}.", stacklevel=3)


def _require_same_position(now: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Within an epoch, numbers of batches tell which images are done: they must mean the same."""
    before = state["config"]
    changed = [f"{key} {before[key]} -> {now[key]}" for key in _POSITION if before[key] != now[key]]
    if state["meter"]["batches"] and changed:
        raise CheckpointError(
            f"The run was interrupted within epoch {state['epoch'] + 1}, after "
            f"{state['meter']['images']} images, and would now divide the epoch differently "
            f"({', '.join(changed)}). Resume with the saved values; change them when an epoch is "
            "complete."
        )


def _warn_of_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in _HARMLESS
    ]
    if changed:
        warnings.warn(
            f"The resumed run continues with other options: {', '.join(changed)}. Learning rates "
            "and scheduled weights follow the new ones from here on.",
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
    """The states of Python's, NumPy's and torch's generators, here and on CUDA devices."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *map(float, numpy_state[2:])],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Continue drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
