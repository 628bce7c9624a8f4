"""Distillation along a chain of models: from a teacher, through assistants, to a student."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from capdistill.captioner import Captioner
from capdistill.errors import CapdistillError, ConfigError, shortened
from capdistill.files import finite_or_none, from_json, user_path, write_text
from capdistill.losses.base import DistillationLoss
from capdistill.metrics.bootstrap import text_columns
from capdistill.runtime import autocast, evaluating
from capdistill.training.config import DistillOptions
from capdistill.training.distiller import Distiller, Teacher, as_teacher
from capdistill.training.history import History
from capdistill.training.objective import Weights
from capdistill.training.run_directory import Resume, identity
from capdistill.training.sources import close_workers
from capdistill.training.trainer import Trainer
from capdistill.training.validation import References, add_references

TABLE = "chain.json"
Losses = Mapping[str, DistillationLoss | str | Mapping[str, Any]]


@dataclass(frozen=True)
class ChainRow:
    """A model of a chain, after its stage.

    Args:
        name: Its name.
        parameters: Number of its parameters.
        stage: 0 for the teacher, which is not trained, then 1, 2, ...
        directory: The directory of its run, within that of the chain; None for the teacher.
        epochs: Epochs it was trained for.
        best_epoch: The epoch whose weights were kept, from 1; None without validation data.
        seconds: Time of these epochs.
        scores: Scores of validation, of the best epoch; empty without validation data.
        stopped: Why its training ended, in words.
    """

    name: str
    parameters: int
    stage: int = 0
    directory: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True)
class ChainTable:
    """The models of a chain, one row each, in their order; `print` it.

    Example:
        >>> rows = (ChainRow("large", 4_000_000, scores={"cider_d": 0.61}),
        ...         ChainRow("small", 1_000_000, 1, "1-small", 9, 7, 60.0, {"cider_d": 0.55}))
        >>> print(ChainTable(rows))
        model  parameters  of teacher  epochs  cider_d
        large   4,000,000        100%           0.6100
        small   1,000,000         25%       9   0.5500

    Args:
        rows: The teacher, then every model whose stage has begun.
        interrupted: Whether the last of them was interrupted; the same call goes on with it.
        signal: Number of the signal that interrupted it, or None.
    """

    rows: tuple[ChainRow, ...]
    interrupted: bool = False
    signal: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: format, `interrupted`, and `rows` with the fields of `ChainRow`."""
        rows = [asdict(row) for row in self.rows]
        content = {"format": "capdistill.chain/1", "interrupted": self.interrupted, "rows": rows}
        found: dict[str, Any] = finite_or_none(content)
        return found

    def __repr__(self) -> str:
        names = " -> ".join(row.name for row in self.rows)
        return f"<ChainTable {names}{', interrupted' if self.interrupted else ''}>"

    def __str__(self) -> str:
        scores = list(dict.fromkeys(name for row in self.rows for name in row.scores))
        taught = any(row.stage == 0 for row in self.rows)  # else all rows are of one student
        compared = ["of teacher"] if taught else []
        lines = [["model" if taught else "stage", "parameters", *compared, "epochs", *scores]]
        for row in self.rows:
            share = [f"{row.parameters / max(self.rows[0].parameters, 1):.0%}"] if taught else []
            epochs = str(row.epochs) if row.stage else ""
            numbers = [f"{row.scores[n]:.4f}" if n in row.scores else "" for n in scores]
            lines.append([row.name, f"{row.parameters:,}", *share, epochs, *numbers])
        return text_columns(lines, right=range(1, len(lines[0])))


def distill_chain(
    models: Sequence[Teacher],
    train: Any,
    val: Any = None,
    *,
    out: str | Path,
    losses: Losses | None = None,
    weights: Weights | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    resume: Resume = "auto",
    overwrite: bool = False,
    accept_changes: bool = False,
    **options: Unpack[DistillOptions],
) -> ChainTable:
    """Distil every model from the one before it: a large gap in several smaller steps.

    Stage i is a run of `Distiller(models[i - 1], models[i])` in the directory `out/i-name`. Its
    student, with the weights of its best epoch, is the teacher of the next stage. All stages are
    checked before the first one begins.

    Example:
        >>> import capdistill as cd, tempfile
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> teacher, assistant, student = (
        ...     cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer)
        ...     for role in ("teacher", "student", "student")
        ... )
        >>> table = distill_chain(
        ...     [teacher, assistant, student], data.train.subset(8), out=tempfile.mkdtemp(),
        ...     losses={"token": "token"}, stages=[{"epochs": 2}, {}], epochs=1, batch_size=8,
        ...     progress=False,
        ... )
        >>> [(row.directory, row.epochs) for row in table.rows]
        [(None, 0), ('1-debug_student', 2), ('2-debug_student', 1)]

    Args:
        models: The teacher, which may be all that `Distiller` takes as one; captioners, which are
            trained in place, in this order.
        train: As for `Trainer.fit`; all stages have the same data.
        val: As for `Trainer.fit`.
        out: Directory of the chain: a directory per stage, and the returned table in chain.json.
        losses: As for `Distiller`. Every stage has its own copies.
        weights: As for `Distiller`.
        stages: What differs by stage: a mapping for each, with "losses", "weights" or options.
        resume: "auto" goes on where an earlier call stopped: complete stages are loaded, an
            incomplete one is continued. True needs the first stage to exist.
        overwrite: Start anew, whatever is in the directories of the stages.
        accept_changes: Resume a stage although its teacher, losses or data have changed.
        options: Fields of `DistillConfig`, for all stages.

    Raises:
        ConfigError: fewer than two models, one of them twice, or an invalid option; names the
            stage.
        IncompatibleModels: a pair does not fit; names the stage.
        CheckpointError: a stage to resume had other models, losses or data.

    Source:
        Mirzadeh et al. (2020), Improved Knowledge Distillation via Teacher Assistant, section 3.
    """
    teacher, students = _checked(models)
    common: dict[str, Any] = {"losses": losses, "weights": weights, **options}
    runs = _make(teacher, students, common, _differences(stages, len(students)))
    file = user_path(out) / TABLE
    rows: list[ChainRow] = []
    about: dict[str, Any] = {}
    for number, student in enumerate(students, 1):
        run = runs.pop(0)  # the memory of a stage ends with it
        place = file.with_name(f"{number}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', student.name)}")
        begun = "auto" if resume is True and number > 1 else resume
        how: Any = {"overwrite": overwrite, "accept_changes": accept_changes}
        with naming(f"distill_chain: stage {number} ('{student.name}')"):
            history = run.fit(train, val, out=place, resume=begun, **how)
        if number == 1:
            about = _measured(run)
            scores = _known_scores(file, about)
            if scores is None and not history.interrupted:
                scores = scores_of(run, teacher)
            name = str(getattr(teacher, "name", type(teacher).__name__))
            rows.append(ChainRow(name, _size(teacher), scores=scores or {}))
        rows.append(history_row(student, number, place.name, history))
        table = ChainTable(tuple(rows), history.interrupted, history.signal)
        write_text(file, json.dumps({**table.to_json(), "teacher": about}, indent=2, default=str))
        if history.interrupted:
            break
    return table


@contextmanager
def naming(stage: str) -> Iterator[None]:
    """Begin the errors of the block with the stage that they belong to."""
    try:
        yield
    except CapdistillError as error:
        raise type(error)(f"{stage}: {error}") from error


def _checked(models: Any) -> tuple[nn.Module, list[Captioner]]:
    several = isinstance(models, Sequence) and not isinstance(models, str) and len(models) > 1
    if not several or not all(isinstance(model, Captioner) for model in models[1:]):
        raise ConfigError(
            f"distill_chain: models={shortened(models)} was given. Give [teacher, assistant, "
            "student]: a teacher, then one or more captioners to train."
        )
    teacher, students = as_teacher(models[0]), list(models[1:])
    if len({id(model) for model in (teacher, *students)}) < len(models):
        raise ConfigError(
            "distill_chain: a model stands in the chain twice. Give each stage a captioner of its "
            "own (copy.deepcopy)."
        )
    return teacher, students


def _differences(stages: Any, count: int) -> list[Mapping[str, Any]]:
    if stages is None:
        return [{}] * count
    listed = list(stages) if isinstance(stages, (list, tuple)) else []
    if len(listed) != count or not all(isinstance(each, Mapping) for each in listed):
        raise ConfigError(
            f"distill_chain: stages={shortened(stages)} was given for {count} stages. Expected a "
            f"list of {count} mappings, such as {[{'epochs': 10}] + [{}] * (count - 1)}."
        )
    return listed


def _make(
    teacher: nn.Module,
    students: Sequence[Captioner],
    common: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
) -> list[Distiller]:
    """The run of every stage; the models of each fit together."""
    made: list[Distiller] = []
    for number, (student, differing) in enumerate(zip(students, stages, strict=True), 1):
        chosen = {**common, **differing}
        losses, weights = copy.deepcopy((chosen.pop("losses"), chosen.pop("weights")))
        with naming(f"distill_chain: stage {number} ('{student.name}')"):
            made.append(Distiller(teacher, student, losses, weights, **chosen))
        teacher = student
    return made


def _measured(run: Distiller) -> dict[str, Any]:
    """What the scores of the teacher depend on."""
    who = identity(run, None, run.val_source)
    config = run.config.model_dump(mode="json", include={"metrics", "monitor", "generation"})
    kept = {key: value for key, value in who.items() if "teacher" in key or key in _SCORED}
    return {**kept, **config, "precision": run.precision}


_SCORED = ("vocabulary", "validation data")


def _known_scores(file: Path, about: Mapping[str, Any]) -> dict[str, float] | None:
    """The scores of the teacher that an earlier call measured, if they still hold."""
    try:
        content = from_json(file.read_text(encoding="utf-8"))
        found = dict(content["rows"][0]["scores"])
        return found if found and content["teacher"] == about else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def history_row(
    student: Captioner, number: int, directory: str, history: History, name: str | None = None
) -> ChainRow:
    """The row of a stage, from the history of its run.

    Args:
        student: The captioner that it trained.
        number: Of the stage, from 1.
        directory: The directory of its run, within that of all.
        history: Of the run.
        name: Of the row; by default that of the captioner.
    """
    epochs = history.epochs
    best = history.best or (epochs[-1] if epochs else {"scores": {}})
    return ChainRow(
        name or student.name,
        _size(student),
        number,
        directory,
        len(epochs),
        best["epoch"] + 1 if history.best else None,
        sum(row["seconds"] for row in epochs),
        best["scores"],
        history.stopped,
    )


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def scores_of(run: Trainer, model: Any) -> dict[str, float]:
    """The scores of a model on the validation data of a run, measured as the run does.

    Args:
        run: A trainer after its `fit`.
        model: What generates captions; of another kind, or without validation data, it has none.
    """
    source, references, captions = run.val_source, References(), dict[str, str]()
    if source is None or not callable(getattr(model, "generate", None)):
        return {}
    with evaluating(model), torch.no_grad():
        for batch in source.epoch(0):
            add_references(references, batch)
            with autocast(run.device, run.precision):
                found = model.generate(batch.to(run.device), run.config.generation)
            captions |= zip(batch.image_ids, (each.text for each in found), strict=True)
    close_workers(source)
    return run.score(references, captions)
