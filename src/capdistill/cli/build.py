"""From a checked run file to what the API trains: data, tokenizer, captioners, trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.cli.runfile import (
    DistillRun,
    ModelSection,
    Part,
    RunConfig,
    TokenizerSection,
    TrainRun,
)
from capdistill.errors import ConfigError

if TYPE_CHECKING:
    from capdistill.captioner import Captioner
    from capdistill.data import Splits
    from capdistill.tokenizer import Tokenizer, WordTokenizer
    from capdistill.training.distiller import Distiller
    from capdistill.training.trainer import Trainer


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

    changes = {}
    for kind, part in (("encoder", section.encoder), ("decoder", section.decoder)):
        if part is not None and part.name is not None:
            raise ConfigError(
                f"{what}: a preset ('{section.preset}') and {kind}.name ('{part.name}') can not "
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
