"""The run file of the commands that train: one JSON object, checked and fully resolved."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, StrictBool

from capdistill.cli.common import captioner_directory, default_losses
from capdistill.cli.data import (
    FORMATS,
    DataSection,
    FullPath,
    Teachers,
    parse_data,
    teacher_section,
)
from capdistill.cli.tokenizers import TokenizerSection
from capdistill.errors import ConfigError, parse
from capdistill.files import from_json, read_object, write_text
from capdistill.training.config import DEFAULT_WEIGHTS, DistillConfig, TrainConfig

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.tokenizer import Tokenizer

NAME = "config.json"
S = TypeVar("S", bound=BaseModel)
R = TypeVar("R", bound="RunConfig")
Whole = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Weight = Whole | Number | tuple[Number, Number] | dict[str, Any] | str | None


class Section(BaseModel):
    """Part of a run file: it has no unknown keys and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ComponentConfig(Section):
    """A registered encoder or decoder, as in the `captioner.json` of a saved captioner.

    In a run file, arguments may stand beside the name: `{"name": "lstm", "hidden": 384}`. An
    argument that is itself called `name` (timm's) must stand in `kwargs`.

    Args:
        name: The name in the registry. Beside a preset there is none: `kwargs` then change the
            preset's arguments.
        kwargs: Its arguments.
    """

    name: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)


class ModelSection(Section):
    """A preset, an encoder and a decoder, or a saved captioner.

    Args:
        preset: A name that `capdistill models` lists.
        weights: Weights of the encoder: true (from the hub), false (random), or a file.
        encoder, decoder: Components, or changes to those of the preset.
        start: Directory of a saved captioner to start from. Alone, it gives the whole model; with a
            preset or components, it gives their weights.
    """

    preset: str | None = None
    weights: StrictBool | FullPath | None = None
    encoder: ComponentConfig | None = None
    decoder: ComponentConfig | None = None
    start: FullPath | None = None


class RunConfig(Section):
    """The sections shared by all runs.

    Args:
        data: See `capdistill.cli.data.DataSection`.
        train: Options of the trainer.
        out: Directory of the run.
    """

    data: SerializeAsAny[DataSection]
    train: TrainConfig
    out: FullPath | None = None

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Check the other sections of a run file and fill in their defaults."""
        raise NotImplementedError


class TrainRun(RunConfig):
    """A run of `capdistill train`.

    Args:
        tokenizer: Trained on the training captions unless it has a path.
        model: The captioner to train.
    """

    command: Literal["train"] = "train"
    tokenizer: TokenizerSection | None = None
    model: ModelSection

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The model."""
        return {"model": _model(values.get("model"), "model")}


class DistillRun(RunConfig):
    """A run of `capdistill distill`. Without a tokenizer section, the student has the teacher's.

    Args:
        teacher: Directory of a saved captioner; or a list of several, or name -> directory; or
            {"name": "mean_teacher", "decay": 0.999}.
        student: The captioner to train.
        losses: Term -> {"name": ..., arguments}; by default token, feature and hidden.
        weights: Term -> number, [first, last] or schedule; "name" and options of what adapts them.
    """

    command: Literal["distill"] = "distill"
    tokenizer: TokenizerSection | None = None
    train: DistillConfig
    teacher: Teachers
    student: ModelSection
    losses: dict[str, dict[str, Any]]
    weights: dict[str, Weight]

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Student, teacher, losses and weights."""
        student = _model(values.get("student"), "student")
        if not values.get("teacher"):
            raise ConfigError(
                "teacher: no directory of a saved captioner was given. Train one with "
                "`capdistill train`, then give --teacher RUN."
            )
        given = default_losses() if values.get("losses") is None else values["losses"]
        losses = losses_section(given)
        weights = weights_section(values.get("weights"), losses, removed=given)
        teacher = teacher_section(values["teacher"])
        return {"student": student, "teacher": teacher, "losses": losses, "weights": weights}


def parse_run(cls: type[R], values: Mapping[str, Any]) -> R:
    """Check the values of a run file and fill in its defaults.

    Example:
        >>> run = parse_run(TrainRun, {"data": {"path": "sample"}, "train": {"epochs": 3},
        ...                            "model": {"preset": "debug_student"}})
        >>> run.train.epochs, run.model.preset, run.tokenizer
        (3, 'debug_student', None)

    Raises:
        ConfigError: a key is unknown (the message names the nearest one), or a value is invalid.
    """
    checked = dict(values)
    options: Any = cls.model_fields["train"].annotation
    for key in options.model_fields.keys() & values.keys() - cls.model_fields.keys():
        raise ConfigError(
            f"run file: '{key}' is an option of training. Write it as train.{key}, or in the "
            'section "train".'
        )
    checked["data"] = parse_data(values.get("data"))
    checked["train"] = _with_monitored(parse_section(options, values.get("train") or {}, "train"))
    if "tokenizer" in cls.model_fields and values.get("tokenizer") is not None:
        checked["tokenizer"] = parse_section(TokenizerSection, values["tokenizer"], "tokenizer")
    return parse(cls, {**checked, **cls.sections(values)}, "run file")


def _with_monitored(train: TrainConfig) -> TrainConfig:
    """Compute the score that the run monitors, unless the metrics were given."""
    from capdistill.metrics.scorer import DIRECTIONS

    computed = [n for n in DIRECTIONS if n in train.metrics or n[:-2] in train.metrics]
    if "metrics" in train.model_fields_set or train.monitor not in DIRECTIONS.keys() - computed:
        return train
    return train.model_copy(update={"metrics": (*train.metrics, train.monitor)})


def read_values(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in a run file, unchecked.

    Raises:
        ConfigError: the file does not exist, or holds no JSON object.
    """
    return read_object(path, "a run file", f", such as the {NAME} in the directory of a run")


def override(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Lay `key=value` settings over values. Dots lead into sections; values are JSON or text.

    Example:
        >>> override({"train": {"epochs": 3}}, ["train.epochs=4", "student.preset=lite0_lstm"])
        {'train': {'epochs': 4}, 'student': {'preset': 'lite0_lstm'}}

    Raises:
        ConfigError: a setting has another form, or leads into a value that is not a section.
    """
    changed = dict(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        keys = key.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {setting!r}: expected KEY=VALUE, e.g. train.epochs=3.")
        _set(changed, keys, _value(keys, text), setting)
    return changed


def _set(values: dict[str, Any], keys: list[str], value: Any, setting: str) -> None:
    """Set a value in place, with a copy of every section on the way."""
    for key in keys[:-1]:
        inner = values.get(key)
        if isinstance(inner, str) and (keys[0] == "losses" or key in ("encoder", "decoder")):
            inner = {"name": inner}  # given by its name alone
        if inner is not None and not isinstance(inner, Mapping):
            raise ConfigError(f"--set {setting!r}: '{key}' is {inner!r}, which has no keys.")
        values[key] = values = dict(inner or {})
    values[keys[-1]] = value


def _value(keys: list[str], text: str) -> Any:
    """Parse JSON; return the text if it is not JSON, or if the key takes text and not that type."""
    try:
        value = from_json(text)
    except ValueError:
        return text
    kinds = _types_of(keys)
    is_text = str in kinds and type(value) in (bool, int, float) and type(value) not in kinds
    return text if is_text else value


def _types_of(keys: list[str]) -> set[Any]:
    """The types that a key of a run file takes, if known."""
    models: dict[str, tuple[type[BaseModel], ...]] = {
        "data": tuple(FORMATS.values()),
        "tokenizer": (TokenizerSection,),
        "train": (TrainConfig,),
        "model": (ModelSection,),
        "student": (ModelSection,),
    }
    classes = (TrainRun, DistillRun) if len(keys) == 1 else models.get(keys[0], ())
    fields = [cls.model_fields.get(keys[-1]) for cls in classes if len(keys) <= 2]
    return {kind for field in fields if field for kind in _leaves(field.annotation)}


def _leaves(annotation: Any) -> list[Any]:
    inner = () if get_origin(annotation) is dict else get_args(annotation)
    return [leaf for each in inner for leaf in _leaves(each)] if inner else [annotation]


def write_resolved(run: RunConfig) -> None:
    """Write the run file, with every default filled in, to the directory of the run.

    Raises:
        ConfigError: the directory cannot be written.
    """
    assert run.out is not None
    path = Path(run.out) / NAME
    write_text(path, json.dumps(run.model_dump(mode="json"), indent=2) + "\n")


def parse_section(cls: type[S], values: Any, what: str) -> S:
    """Check a section of a run file; an unknown key is an error that names the nearest one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}: {values!r} is not a section; expected an object with keys.")
    return parse(cls, dict(values), what)


def _model(values: Any, key: str) -> ModelSection:
    if not values:
        raise ConfigError(
            f"{key}: no model was given. Give --{'preset' if key == 'model' else key} NAME "
            f'(`capdistill models` lists them), or a section "{key}" with encoder and decoder.'
        )
    if not isinstance(values, Mapping):
        raise ConfigError(f'{key}: {values!r} is not a section; write {{"preset": {values!r}}}.')
    parts = {
        name: _component(values[name], f"{key}.{name}")
        for name in ("encoder", "decoder")
        if values.get(name) is not None
    }
    return parse_section(ModelSection, {**values, **parts}, key)


def _component(value: Any, what: str) -> ComponentConfig:
    if isinstance(value, str):
        return ComponentConfig(name=value)
    if not isinstance(value, Mapping):
        raise ConfigError(f'{what}: {value!r} is not a component; expected {{"name": ..., ...}}.')
    given = {key: each for key, each in value.items() if key in ComponentConfig.model_fields}
    component = parse_section(ComponentConfig, given, what)
    beside = {key: each for key, each in value.items() if key not in given}
    twice = sorted(component.kwargs.keys() & beside.keys())
    if twice:
        raise ConfigError(f"{what}: '{twice[0]}' is given twice, also in kwargs. Give it once.")
    return component.model_copy(update={"kwargs": {**component.kwargs, **beside}})


def losses_section(values: Any) -> dict[str, dict[str, Any]]:
    """Losses by term, each as {"name": ..., arguments}; those set to null are left out."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"losses: {values!r} is not a section; expected term -> loss.")
    return {term: _loss(term, loss) for term, loss in values.items() if loss is not None}


def _loss(term: str, loss: Any) -> dict[str, Any]:
    """A loss as {"name": ..., arguments}; without a name, the term is the name."""
    if isinstance(loss, str):
        return {"name": loss}
    if not isinstance(loss, Mapping):
        raise ConfigError(
            f'losses.{term}: {loss!r} is not a loss; expected a name or {{"name": ..., arguments}}.'
        )
    if "kwargs" in loss:
        inner = loss["kwargs"]
        name = next(iter(inner), "ARGUMENT") if isinstance(inner, Mapping) else "ARGUMENT"
        raise ConfigError(
            f"losses.{term}.kwargs: the arguments of a loss stand beside its name. Write "
            f'losses.{term}.{name}=..., or "{term}": {{"name": "{loss.get("name", term)}", '
            f'"{name}": ...}} in a run file.'
        )
    if not isinstance(loss.get("name", term), str):
        raise ConfigError(f"losses.{term}.name: {loss['name']!r} is not the name of a loss.")
    return {"name": term, **loss}


def weights_section(
    given: Any,
    losses: Collection[str],
    removed: Collection[str] = (),
    defaults: Mapping[str, float] = DEFAULT_WEIGHTS,
) -> dict[str, Any]:
    """The given weights, without those of losses set to null, and defaults for the others."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"weights: {given!r} is not a section; expected term -> weight.")
    terms = {"ce", *losses} if isinstance(given.get("name"), str) else {*given}
    for term in sorted(terms & {*given}):
        if given[term] is None or isinstance(given[term], str):
            raise ConfigError(f"run file: option 'weights.{term}': {given[term]!r} is no weight.")
    complete = {term: defaults.get(term, 1.0) for term in ("ce", *losses)} | dict(given)
    return {k: weight for k, weight in complete.items() if k in losses or k not in removed}


def make_captioner(
    section: ModelSection, what: str, tokenizer: Tokenizer | None = None
) -> Captioner:
    """Make the model that a section describes.

    Args:
        section: A preset with its changes, components from the registries, or a saved captioner.
        what: "model" or "student", for messages.
        tokenizer: Needed unless the section is a saved captioner alone.

    Raises:
        ConfigError: the section describes no model, or two.
        CheckpointError: the weights to start from do not fit.
    """
    from capdistill.captioner import Captioner

    parts = (section.encoder, section.decoder)
    if section.start is not None and section.preset is None and parts == (None, None):
        if section.weights is not None:
            raise ConfigError(
                f"{what}: a saved captioner to start from has its own weights. Give either start "
                "or weights."
            )
        return Captioner.load(captioner_directory(section.start), tokenizer=tokenizer)
    assert tokenizer is not None
    if section.preset:
        captioner = _from_preset(section, tokenizer, what)
    else:
        captioner = _from_components(section, tokenizer, what)
    if section.start is not None:
        from capdistill.weights import load_exactly

        start = captioner_directory(section.start)
        load_exactly(captioner, Captioner.load(start).state_dict(), str(start))
    return captioner


def _from_preset(section: ModelSection, tokenizer: Tokenizer, what: str) -> Captioner:
    from capdistill.captioner import Captioner

    changes = {}
    for kind, part in (("encoder", section.encoder), ("decoder", section.decoder)):
        if part is not None and part.name is not None:
            raise ConfigError(
                f"{what}: a preset ('{section.preset}') and {kind}.name ('{part.name}') cannot "
                f"both be given. Leave out the preset, or change an argument of its {kind} with "
                f"{kind}.ARGUMENT (one called name with {kind}.kwargs.name)."
            )
        changes[kind] = part.kwargs if part is not None else {}
    weights = True if section.weights is None else section.weights
    return Captioner.create(section.preset or "", tokenizer=tokenizer, weights=weights, **changes)


def _from_components(section: ModelSection, tokenizer: Tokenizer, what: str) -> Captioner:
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
    made = encoders.create(encoder.name, **{**weights, **encoder.kwargs})
    reader = decoders.create(decoder.name, **{"dim": made.dim, **decoder.kwargs})
    return Captioner(made, reader, tokenizer, name=what)
