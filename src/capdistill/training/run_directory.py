"""The directory of a run: its contents, its identity, and whether a new run may use it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capdistill.averaging import WeightAverage
from capdistill.captioner import Captioner
from capdistill.data.caption_files import pluralize
from capdistill.data.dataset import CaptionData
from capdistill.data.loader import Loader
from capdistill.data.source import Source
from capdistill.errors import ConfigError
from capdistill.files import DirectoryLock, system_error, user_path, write_text
from capdistill.losses.schedules import NamedSchedule, as_data
from capdistill.outputs import Batch
from capdistill.registry import recipe_of
from capdistill.saving import TARGETS, require_no_other
from capdistill.teachers.cached import CachedTeacher
from capdistill.teachers.ensemble import Ensemble
from capdistill.training.history import HISTORY
from capdistill.training.monitor import monitor_key
from capdistill.training.sharding import whole
from capdistill.training.sources import captions_per_image
from capdistill.training.step import Stepper
from capdistill.weights import StateOf

STATE = "state.pt"
PREVIOUS = "state.previous.pt"
UNFINISHED = "state.new.pt"  # of a writer that was killed before it became the state
FAILED_STEP = "failed_step.pt"
BEST_OF = "best-epoch-"  # a best captioner that is kept beside best/, by its epoch from 1
_RESULTS = (STATE, PREVIOUS, "best", "final")  # a new run replaces these only with overwrite=True
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}|\.check\..+")  # of earlier versions, and of a check
LIBRARIES = ("capdistill", "torch", "torchvision", "timm", "numpy", "pydantic", "nltk")

START = "weights at the start"  # in the identity of a run that continues another one

Resume = bool | Literal["auto"]


def open_directory(
    out: str | Path | None, resume: Resume, overwrite: bool, lock: DirectoryLock
) -> tuple[Path | None, bool]:
    """The directory of a run, and whether to resume from the state in it. Nothing is written yet.

    Args:
        out: As given to `fit`.
        resume: True needs a state; "auto" uses one if there is one.
        overwrite: Whether a new run may replace the results of an earlier one.
        lock: Takes the directory, if it exists, so that no other process trains in it.

    Raises:
        ConfigError: options that contradict each other, or a directory that holds a run or is in
            use.
    """
    known = isinstance(resume, bool) or (isinstance(resume, str) and resume == "auto")
    if not known or not isinstance(overwrite, bool):
        raise ConfigError(
            f"fit: resume={resume!r} and overwrite={overwrite!r} were given. Expected resume=True, "
            "False or 'auto', and overwrite=True or False."
        )
    if resume is True and overwrite:
        raise ConfigError("fit: resume=True and overwrite=True contradict each other. Choose one.")
    if out is None:
        if resume is True:
            raise ConfigError("resume=True needs out=, the directory of the run to continue.")
        return None, False
    directory = user_path(out).absolute()  # a callback may change the working directory
    lock.take(directory)
    require_no_other(directory)
    require_no_other(directory.parent, TARGETS)  # a captioner or ensemble has directories within
    found = [name for name in _RESULTS if (directory / name).exists()]
    states = {STATE, PREVIOUS} & {*found}
    if resume is True or (resume == "auto" and states and not overwrite):
        return directory, True
    if found and not overwrite:
        raise ConfigError(
            f"{directory} holds the results of an earlier run ({', '.join(found)}). Continue it "
            "with resume=True, give another out=, or replace it with overwrite=True."
        )
    return directory, False


def clear_directory(out: Path, keep_results: bool) -> None:
    """Remove temporary files of interrupted writers and, for a new run, all an earlier one left."""
    old = [] if keep_results else [*previous_states(out), *kept_bests(out)]
    for path in out.iterdir() if out.is_dir() else ():
        stale = path in old or path.name in (UNFINISHED, FAILED_STEP)
        stale |= _TEMPORARY.fullmatch(path.name) is not None
        if stale or (not keep_results and path.name in (*_RESULTS, "run.json", HISTORY)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def previous_state(number: int) -> str:
    """The name of the state that was saved `number` saves before the last.

    Example:
        >>> previous_state(1), previous_state(2)
        ('state.previous.pt', 'state.previous.2.pt')
    """
    return PREVIOUS if number == 1 else f"state.previous.{number}.pt"


def previous_states(out: Path) -> list[Path]:
    """The earlier states in the directory of a run, the latest first."""
    numbers = {int(m[1] or 1): path for m, path in _matching(out, _PREVIOUS)}
    return [numbers[number] for number in sorted(numbers)]


def kept_bests(out: Path) -> list[Path]:
    """The best captioners that are kept beside best/."""
    return [path for _, path in _matching(out, _KEPT_BEST) if path.is_dir()]


_PREVIOUS = re.compile(r"state\.previous(?:\.([0-9]{1,6}))?\.pt")
_KEPT_BEST = re.compile(rf"{BEST_OF}[0-9]{{1,9}}")


def _matching(out: Path, name: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Path]]:
    for path in out.iterdir() if out.is_dir() else ():
        match = name.fullmatch(path.name)
        if match:
            yield match, path


def check_can_save(captioner: Captioner, out: Path, lock: DirectoryLock) -> None:
    """Save once to a temporary directory, so that an unsaveable captioner fails before training.

    Raises:
        ConfigError: `out` cannot be written or is in use, or a part could not be made again from a
            file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.take(out)
        with tempfile.TemporaryDirectory(prefix=".check.", dir=out) as folder:
            captioner.save(Path(folder) / "captioner")
    except (OSError, ConfigError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ConfigError(
            f"Cannot write to {out}: {cause.strerror or cause}. Give an out= that exists or can "
            "be made, is writable and has space."
        ) from cause


def describe_run(stepper: Stepper, train: Source, out: Path) -> None:
    """Write run.json: resolved options, models, weights of the terms, versions and seed."""
    captions = captions_per_image(train, stepper.config)
    content = {
        "format": "capdistill.run/1",
        "trainer": type(stepper).__name__,
        "config": {**stepper.config.model_dump(), "captions_per_image": captions},
        "device": str(stepper.device),
        "precision": stepper.precision,
        "num_workers": getattr(train, "num_workers", None),
        "weights": {**_weighting(stepper), **_plain_weights(stepper)},
        "losses": {name: _loss(loss) for name, loss in stepper.objective.losses.items()},
        "models": [_model(model) for model in stepper.models],
        "versions": versions(),
    }
    write_text(out / "run.json", json.dumps(content, indent=2, default=str))


def run_lines(stepper: Stepper, train: Source | None, val: Source | None) -> list[str]:
    """Lines about a run: models, data, terms and rates."""
    config = stepper.config
    model = stepper.captioner
    whole, trained = model.num_parameters(), model.num_parameters(trainable=True)
    lines = [
        f"training '{model.name}': {whole / 1e6:.2f} M parameters, {trained / 1e6:.2f} M "
        f"trained, on {stepper.device} in {stepper.precision}"
        + (f", {stepper.ranks.world_size} processes" if stepper.ranks.several else "")
    ]
    if train is not None:
        images = getattr(train, "num_images", None)
        captions = captions_per_image(train, config)
        data = "ready-made batches"
        if images:
            each = "" if captions is None else f" x {pluralize(captions, 'caption')}"
            data = f"{pluralize(images, 'image')}{each}"
        workers = getattr(train, "num_workers", None)
        data += "" if workers is None else f", {workers} worker process{'es' * (workers != 1)}"
        curriculum = getattr(train, "curriculum", None)
        data += "" if curriculum is None else f", easy ones first (by {curriculum.kind})"
        cached = ", cached features" if getattr(train, "has_caches", False) else ""
        steps = stepper.steps_per_epoch
        per_epoch = f"; {pluralize(steps, 'step')} per epoch" if steps is not None else ""
        lines.append(f"  data    {data}{cached}{per_epoch}")
    terms = []
    for name in stepper.objective.weights:
        first, last = (stepper.objective.weight(name, at) for at in (0.0, 1.0))
        terms.append(f"{name} {first:g}" + (f" to {last:g}" if last != first else ""))
    adapted = f"; adapted by {weighting!r}" if (weighting := stepper.objective.weighting) else ""
    lines.append(f"  terms   {', '.join(terms)}{adapted}")
    groups = stepper.optimizer.param_groups if stepper.optimizer is not None else []
    rates = {str(group["name"]): group["initial_lr"] for group in groups}
    shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    lines.append(
        f"  rates   {shown}; {config.schedule}, at most {pluralize(config.epochs, 'epoch')}"
    )
    if config.ema_decay is not None:
        lines.append(f"  average of the weights with decay {config.ema_decay:g}")
    if val is not None:
        waits = "none" if config.patience is None else pluralize(config.patience, "epoch")
        lines.append(f"  best    by {monitor_key(config.monitor)}, patience {waits}")
    return lines


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
    if isinstance(model, Ensemble):
        members = [{**_model(each), "name": name} for name, each in model.members.items()]
        about = {"name": model.name, "mixing": model.mixing, "weights": model.weights}
        return {**about, "parameters": model.num_parameters(), "members": members}
    if isinstance(model, CachedTeacher):
        return {"name": model.name, "targets": str(model.directory)}
    if not isinstance(model, Captioner):
        return {"name": getattr(model, "name", type(model).__name__)}
    parts = {"encoder": _part(model.encoder), "decoder": _part(model.decoder)}
    return {"name": model.name, "parameters": model.num_parameters(), **parts}


def _loss(loss: Any) -> dict[str, Any]:
    """A loss as it may be given to a `Distiller`, if a registry created it."""
    part = _part(loss)
    arguments = part.pop("kwargs", {})
    named = {} if loss.teacher is None else {"teacher": loss.teacher}
    return {**part, **{name: _plain(value) for name, value in arguments.items()}, **named}


def _part(part: Any) -> dict[str, Any]:
    recipe = recipe_of(part)
    if recipe is not None:
        return {"name": recipe.name, "kwargs": recipe.kwargs}
    kind = f"{type(part).__module__}:{type(part).__qualname__}"
    return {"class": kind, **_plain_attributes(part)}


def _plain_weights(stepper: Stepper) -> dict[str, Any]:
    return {name: _plain(value) for name, value in stepper.objective.weights.items()}


def _weighting(stepper: Stepper) -> dict[str, Any]:
    """What adapts the weights, as it may be given beside them; empty if they are not adapted."""
    weighting = stepper.objective.weighting
    return {} if weighting is None else weighting.as_data()


def _plain(value: Any) -> Any:
    if isinstance(value, NamedSchedule):
        return as_data(value)
    if callable(value):
        return f"function {getattr(value, '__qualname__', type(value).__name__)}"
    return list(value) if isinstance(value, tuple) else value


def _plain_attributes(module: Any) -> dict[str, Any]:
    """Public attributes that are plain data or functions: temperature, layers and the like."""
    skipped = ("training", "registered_as", "progress", "was_trained")
    shown = {
        name: _plain(value) if isinstance(value, FunctionType) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in skipped
    }
    return {name: value for name, value in shown.items() if is_plain(value)}


def identity(stepper: Stepper, train: Source | None, val: Source | None = None) -> dict[str, Any]:
    """The identity of a run, as plain data: its objective, teacher, vocabulary and data."""
    config = stepper.config
    found: dict[str, Any] = {
        f"losses.{name}": value for name, value in stepper.loss_options.items()
    }
    found |= {f"weights.{name}": value for name, value in _plain_weights(stepper).items()}
    if adapted := _weighting(stepper):
        found["weights"] = adapted
    if stepper.start_weights is not None:
        found[START] = stepper.start_weights
    if config.quantize is not None:
        found["quantize"] = config.quantize
    found["label_smoothing"] = config.label_smoothing
    found["monitor"] = config.monitor
    found["vocabulary"] = _digest([repr(list(stepper.captioner.tokenizer.vocabulary))])
    for number, teacher in enumerate(stepper.models[1:]):
        found[f"teacher {number + 1}"] = _teacher_digest(teacher)
        if isinstance(teacher, Ensemble):
            found[f"mixture of teacher {number + 1}"] = f"{teacher.mixing} {teacher.weights}"
    for name, source in (("training data", train), ("validation data", val)):
        if source is not None:
            found[name] = _data_digest(source)
    return found


def _data_digest(source: Source) -> str:
    """Number of images, and a digest of their ids and captions if available."""
    data = source.data if isinstance(source, Loader) else getattr(source, "batches", None)
    curriculum = getattr(source, "curriculum", None)
    order = "" if curriculum is None else f", {curriculum!r} {_digest([str(curriculum.ranking)])}"
    if isinstance(data, CaptionData):
        parts = [f"{e.image_id} {e.captions}{e.weights or ''}\n" for e in data.examples]
        return f"{len(data)} images, {_digest(parts)}{order}"
    if isinstance(data, (list, tuple)) and all(isinstance(batch, Batch) for batch in data):
        parts = [f"{batch.image_ids} {batch.captions}\n" for batch in data]
        return f"{sum(batch.num_images for batch in data)} images, {_digest(parts)}"
    return f"{getattr(source, 'num_images', 'an unknown number of')} images{order}"


def options_of(part: nn.Module) -> str:
    """The class of a loss and its plain options, whether a registry made it or not."""
    kind = f"{type(part).__module__}:{type(part).__qualname__}"
    options = ", ".join(f"{k}={v!r}" for k, v in sorted(_plain_attributes(part).items()))
    return f"{kind}({options})"


def _teacher_digest(teacher: nn.Module) -> str:
    """A digest of the weights; of a part that follows the student, its decay instead."""
    averages = {n: getattr(part, "average", None) for n, part in teacher.named_modules()}
    decays = {n: each.decay for n, each in averages.items() if isinstance(each, WeightAverage)}
    moving = tuple(f"{name}." if name else "" for name in decays)
    state = StateOf(teacher)
    fixed = [name for name in state if not (moving and name.startswith(moving))]
    named = [f"average with decay {decay} {name}" for name, decay in decays.items()]
    digest = _digest(_bytes_of((name, state[name]) for name in fixed))
    return " ".join([*named, digest] if fixed else named)


def _bytes_of(values: Iterable[tuple[str, Tensor]]) -> Iterator[Any]:
    for name, value in values:
        yield name
        if value.is_meta:  # loaded when it runs, nobody knows from where
            continue
        value = whole(value)
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _digest(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def is_plain(value: Any) -> bool:
    """Whether a value is numbers, strings and tensors, in lists and dicts: readable as data."""
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, Tensor)
