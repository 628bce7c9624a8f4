"""The run file of `train` and `distill`: one JSON object, checked, and written back resolved.

Values come from `--config`, then from plain flags, then from `--set`; the last one wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from capdistill.cli.common import DataSection, FullPath, parse_data
from capdistill.errors import ConfigError, parse
from capdistill.files import write_text
from capdistill.training.config import DistillConfig, TrainConfig, recipe

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.data import Splits
    from capdistill.tokenizer import Tokenizer, WordTokenizer
    from capdistill.training.distiller import Distiller
    from capdistill.training.trainer import Trainer


NAME = "config.json"
S = TypeVar("S", bound=BaseModel)
R = TypeVar("R", bound="RunConfig")


class Section(BaseModel):
    """Part of a run file: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(Section):
    """A registered encoder, decoder or loss, as in a saved captioner's `captioner.json`.

    Args:
        name: In the registry; beside a preset none is given, and `kwargs` join the preset's.
        kwargs: Its arguments.
    """

    name: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)


class ModelSection(Section):
    """A preset, or an encoder and a decoder.

    Args:
        preset: A name that `capdistill models` lists.
        weights: Of the encoder: true (hub), false (random), or a file.
        encoder, decoder: Parts, or what changes in the preset's.
        start: A saved captioner of the same parts, whose weights to start from.
    """

    preset: str | None = None
    weights: bool | FullPath | None = None
    encoder: Part | None = None
    decoder: Part | None = None
    start: FullPath | None = None


class TokenizerSection(Section):
    """A saved tokenizer (a file, or a captioner's directory), or how to train one."""

    path: FullPath | None = None
    min_count: int = Field(default=5, ge=1)
    max_size: int | None = Field(default=None, ge=5)
    max_length: int = Field(default=40, ge=1)


class RunConfig(Section):
    """What `train` and `distill` share.

    Args:
        data: See `capdistill.cli.common`.
        tokenizer: Trained on the training captions unless a path is given.
        train: Options of the trainer.
        out: Directory of the run.
    """

    data: SerializeAsAny[DataSection]
    tokenizer: TokenizerSection | None = None
    train: SerializeAsAny[TrainConfig]
    out: FullPath | None = None


class TrainRun(RunConfig):
    """A run of `capdistill train`."""

    command: Literal["train"] = "train"
    model: ModelSection


class DistillRun(RunConfig):
    """A run of `capdistill distill`; without a tokenizer section the student has the teacher's.

    Args:
        teacher: Directory of a saved captioner.
        student: The captioner that is trained.
        losses: Term -> loss; the reference's three unless given.
        weights: Of the terms, "ce" among them: a number, or [first, last] over the run.
    """

    command: Literal["distill"] = "distill"
    teacher: FullPath
    student: ModelSection
    losses: dict[str, Part] | None = None
    weights: dict[str, float | tuple[float, float]] | None = None


def parse_run(cls: type[R], values: Mapping[str, Any]) -> R:
    """The values of a run file to a checked configuration.

    Example:
        >>> run = parse_run(TrainRun, {"data": {"path": "sample"}, "train": {"epochs": 3},
        ...                            "model": {"preset": "debug_student"}})
        >>> run.train.epochs, run.model.preset, run.tokenizer
        (3, 'debug_student', None)

    Raises:
        ConfigError: an unknown key, with the nearest one, or a value that cannot be.
    """
    checked = dict(values)
    options = DistillConfig if cls is DistillRun else TrainConfig
    checked["data"] = parse_data(values.get("data"))
    checked["train"] = _section(options, values.get("train") or {}, "train")
    if values.get("tokenizer") is not None:
        checked["tokenizer"] = _section(TokenizerSection, values["tokenizer"], "tokenizer")
    for key in {"model", "student"} & {*cls.model_fields}:
        checked[key] = _model(values.get(key), key)
    if values.get("losses") is not None:
        checked["losses"] = _losses(values["losses"])
    if cls is DistillRun and not values.get("teacher"):
        raise ConfigError(
            "teacher: no directory of a saved captioner was given. Train one with "
            "`capdistill train`, then give --teacher RUN/best."
        )
    return parse(cls, checked, "run file")


def recipe_values(name: str) -> dict[str, Any]:
    """A recipe as values of a run file.

    Example:
        >>> recipe_values("reference")["losses"]["token"]
        {'name': 'token', 'kwargs': {'temperature': 4.0}}

    Raises:
        UnknownName: no such recipe.
    """
    options = recipe(name)
    weights = options.pop("weights")
    losses = {
        term: {"name": loss.pop("name"), "kwargs": loss}
        for term, loss in options.pop("losses").items()
    }
    return {"losses": losses, "weights": weights, "train": options}


def read_values(path: str | Path) -> dict[str, Any]:
    """The object in a run file, unchecked.

    Raises:
        ConfigError: no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a run file ({error}). Expected a JSON object such as the "
            f"{NAME} in the directory of a run."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def override(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Values with `key=value` settings laid over them; dots lead into sections.

    Example:
        >>> override({"train": {"epochs": 3}}, ["train.epochs=4", "student.preset=lite0_lstm"])
        {'train': {'epochs': 4}, 'student': {'preset': 'lite0_lstm'}}

    Raises:
        ConfigError: not of that form, or a dot after something that is no section.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting!r}: expected key=value, e.g. train.epochs=3.")
        values = _with(values, key.split("."), _value(text), setting)
    return values


def write_resolved(run: RunConfig) -> Path | None:
    """Write the run file, every default filled in, to the run's directory.

    Raises:
        ConfigError: the directory cannot be written.
    """
    if run.out is None:
        return None
    path = Path(run.out) / NAME
    write_text(path, json.dumps(run.model_dump(mode="json"), indent=2) + "\n")
    return path


def _section(cls: type[S], values: Any, what: str) -> S:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}: {values!r} is no section; expected an object with keys.")
    return parse(cls, dict(values), what)


def _model(values: Any, key: str) -> ModelSection:
    if not values:
        raise ConfigError(
            f"{key}: no model was given. Give --{'preset' if key == 'model' else key} NAME "
            f'(`capdistill models` lists them), or a section "{key}" with encoder and decoder.'
        )
    if not isinstance(values, Mapping):
        raise ConfigError(f'{key}: {values!r} is no section; write {{"preset": {values!r}}}.')
    parts = {
        name: _part(values[name], f"{key}.{name}")
        for name in ("encoder", "decoder")
        if values.get(name) is not None
    }
    return _section(ModelSection, {**values, **parts}, key)


def _losses(values: Any) -> dict[str, Part]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"losses: {values!r} is no section; expected term -> loss.")
    return {term: _part(loss, f"losses.{term}") for term, loss in values.items()}


def _part(value: Any, what: str) -> Part:
    return Part(name=value) if isinstance(value, str) else _section(Part, value, what)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with(values: Mapping[str, Any], keys: list[str], value: Any, setting: str) -> dict[str, Any]:
    if len(keys) == 1:
        return {**values, keys[0]: value}
    inner = values.get(keys[0])
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"--set {setting!r}: '{keys[0]}' is {inner!r}, which has no keys.")
    return {**values, keys[0]: _with(inner or {}, keys[1:], value, setting)}


def make_trainer(run: RunConfig, data: Splits) -> Trainer:
    """What trains a run, its models made. Weights drawn by chance depend on the seed alone."""
    return _distiller(run, data) if isinstance(run, DistillRun) else _trainer(run, data)


def make_tokenizer(section: TokenizerSection, data: Splits) -> WordTokenizer:
    """A saved tokenizer, or one trained on the captions of the training split."""
    from capdistill.tokenizer import WordTokenizer

    if section.path is None:
        options = section.model_dump(exclude={"path"})
        return WordTokenizer.train(data.train.captions, **options)
    path = Path(section.path)
    return WordTokenizer.load(path / "tokenizer.json" if path.is_dir() else path)


def make_captioner(section: ModelSection, tokenizer: Tokenizer, what: str) -> Captioner:
    """A preset with its changes, or parts from the registries.

    Raises:
        ConfigError: neither, or a part without a name.
        CheckpointError: the weights to start from do not fit.
    """
    from capdistill.captioner import Captioner

    made = _preset(section, tokenizer, what) if section.preset else _parts(section, tokenizer, what)
    if section.start is not None:
        from capdistill.weights import load_exactly

        load_exactly(made, Captioner.load(section.start).state_dict(), section.start)
    return made


def make_losses(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Losses by term; a part without a name is called as its term."""
    from capdistill import losses

    return {term: losses.create(part.name or term, **part.kwargs) for term, part in parts.items()}


def _trainer(run: RunConfig, data: Splits) -> Trainer:
    from capdistill.runtime import seed_everything
    from capdistill.training.trainer import Trainer

    assert isinstance(run, TrainRun)
    tokenizer = make_tokenizer(run.tokenizer or TokenizerSection(), data)
    seed_everything(run.train.seed)
    captioner = make_captioner(run.model, tokenizer, "model")
    return Trainer(captioner, **run.train.model_dump())


def _distiller(run: DistillRun, data: Splits) -> Distiller:
    from capdistill.captioner import Captioner
    from capdistill.runtime import seed_everything
    from capdistill.training.distiller import Distiller

    teacher = Captioner.load(run.teacher)
    tokenizer = make_tokenizer(run.tokenizer, data) if run.tokenizer else teacher.tokenizer
    seed_everything(run.train.seed)
    return Distiller(
        teacher,
        make_captioner(run.student, tokenizer, "student"),
        losses=None if run.losses is None else make_losses(run.losses),
        weights=run.weights,
        **run.train.model_dump(),
    )


def _preset(section: ModelSection, tokenizer: Tokenizer, what: str) -> Captioner:

    from capdistill.captioner import Captioner

    changes = {}
    for kind, part in (("encoder", section.encoder), ("decoder", section.decoder)):
        if part is not None and part.name is not None:
            raise ConfigError(
                f"{what}: a preset ('{section.preset}') and {kind}.name ('{part.name}') cannot "
                f"both be given. Leave out the preset, or change its {kind} with {kind}.kwargs."
            )
        changes[kind] = part.kwargs if part is not None else {}
    weights = True if section.weights is None else section.weights
    return Captioner.create(section.preset or "", tokenizer=tokenizer, weights=weights, **changes)


def _parts(section: ModelSection, tokenizer: Tokenizer, what: str) -> Captioner:
    from capdistill import decoders, encoders
    from capdistill.captioner import Captioner

    encoder, decoder = section.encoder, section.decoder
    if encoder is None or decoder is None or encoder.name is None or decoder.name is None:
        raise ConfigError(
            f"{what}: expected a preset, or an encoder and a decoder with a name each, e.g. "
            f'"{what}": {{"encoder": {{"name": "timm", "kwargs": {{"name": "resnet18"}}}}, '
            '"decoder": {"name": "lstm"}}.'
        )
    weights = {} if section.weights is None else {"weights": section.weights}
    looks = encoders.create(encoder.name, **{**weights, **encoder.kwargs})
    says = decoders.create(decoder.name, **{"dim": looks.dim, **decoder.kwargs})
    return Captioner(looks, says, tokenizer, name=what)
