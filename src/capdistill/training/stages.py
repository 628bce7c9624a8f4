"""One student through several trainings: a recipe with stages, each with its own directory."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, shortened, suggest
from capdistill.files import user_path, write_text
from capdistill.teachers.caption_file import require_data
from capdistill.teachers.captions import caption, check_options
from capdistill.training.chain import ChainRow, ChainTable, history_row, naming
from capdistill.training.distiller import Distiller, Teacher, as_teacher
from capdistill.training.run_directory import Resume
from capdistill.training.self_critical import SelfCritical
from capdistill.training.trainer import Trainer

TABLE = "stages.json"
Method = Literal["train", "distill", "self_critical"]


def run_stages(
    student: Captioner,
    train: Any,
    val: Any = None,
    *,
    stages: Sequence[Mapping[str, Any]],
    out: str | Path,
    teacher: Teacher | None = None,
    resume: Resume = "auto",
    overwrite: bool = False,
    accept_changes: bool = False,
    **options: Any,
) -> ChainTable:
    """Train one student in several stages: each begins with the best weights of the one before.

    Every stage is a run in `out/1-name`, `out/2-name`, ... All are checked before the first one
    begins.

    Example:
        >>> import capdistill as cd, tempfile
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> teacher, student = (cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer)
        ...                     for role in ("teacher", "student"))
        >>> table = run_stages(
        ...     student, data.train.subset(8), out=tempfile.mkdtemp(), teacher=teacher,
        ...     stages=[
        ...         {"method": "train", "name": "cross-entropy"},
        ...         {"method": "train", "captions": {"beam_size": 2}, "name": "sequences"},
        ...         {"method": "self_critical", "samples": 2, "losses": {}},
        ...     ],
        ...     epochs=1, batch_size=8, progress=False,
        ... )
        >>> [row.directory for row in table.rows]
        ['1-cross-entropy', '2-sequences', '3-self_critical']

    Args:
        student: The captioner; it is trained in place.
        train: As for `Trainer.fit`; all stages have the same images.
        val: As for `Trainer.fit`.
        stages: A mapping for each stage. "method": "train" (`Trainer`), "distill" (`Distiller`) or
            "self_critical" (`SelfCritical`). "name": of its directory; the method by default.
            "losses" and "weights": as for that trainer; `reward` too, for the last. "captions":
            the stage learns from the teacher's captions, with these arguments of
            `capdistill.teachers.caption`; device, precision, cache_dir and progress are those of
            the trainer by default. Everything else is an option of its trainer.
        out: Directory of the stages, and of the returned table in stages.json.
        teacher: As for `Distiller`; not needed if no stage reads it. A stage of "self_critical"
            with `"losses": {}` reads none.
        resume: "auto" goes on where an earlier call stopped: complete stages are loaded, an
            incomplete one is continued. True needs the first stage to exist.
        overwrite: Start anew, whatever is in the directories of the stages.
        accept_changes: Resume a stage although its teacher, losses or data have changed.
        options: Options of the trainers, for all stages; those of a stage override them.

    Raises:
        ConfigError: an invalid stage or option; names the stage.
        IncompatibleModels: teacher and student do not fit; names the stage.
        CheckpointError: a stage to resume had other models, losses or data.
    """
    taught = None if teacher is None else as_teacher(teacher)
    listed = _checked(stages)
    for number, stage in enumerate(listed, 1):
        with naming(f"run_stages: stage {number} ('{stage['name']}')"):
            _make(stage, student, taught, options)
            if "captions" in stage:
                require_data("captions", train)
    directory, rows = user_path(out), list[ChainRow]()
    for number, stage in enumerate(listed, 1):
        place = f"{number}-{stage['name']}"
        how: Any = {"overwrite": overwrite, "accept_changes": accept_changes}
        with naming(f"run_stages: stage {number} ('{stage['name']}')"):
            trainer, data = _make(stage, student, taught, options), train
            if "captions" in stage:
                given = {**_shared(trainer), "overwrite": overwrite, **stage["captions"]}
                data = caption(taught, train, directory / f"{place}.jsonl", **given)
            begun = "auto" if resume is True and number > 1 else resume
            history = trainer.fit(data, val, out=directory / place, resume=begun, **how)
        rows.append(history_row(student, number, place, history, name=stage["name"]))
        table = ChainTable(tuple(rows), history.interrupted, history.signal)
        write_text(directory / TABLE, json.dumps(table.to_json(), indent=2))
        if history.interrupted:
            break
    return table


def _shared(trainer: Trainer) -> dict[str, Any]:
    """The options of a trainer that its captioning has too."""
    config = trainer.config
    same = {name: getattr(config, name) for name in ("device", "precision", "cache_dir")}
    return {**same, "progress": config.progress is not False}


def _checked(stages: Any) -> list[dict[str, Any]]:
    """The stages with a method and a name each."""
    listed = list(stages) if isinstance(stages, (list, tuple)) else []
    if not listed or not all(isinstance(each, Mapping) for each in listed):
        raise ConfigError(
            f"run_stages: stages={shortened(stages)} was given. Expected a list of mappings, such "
            'as [{"method": "train", "epochs": 10}, {"method": "self_critical"}].'
        )
    methods = get_args(Method)
    for number, stage in enumerate(listed, 1):
        method = stage.get("method")
        if method not in methods:
            hint = suggest(str(method), methods)
            raise ConfigError(f"run_stages: stage {number}: method={method!r} is unknown. {hint}")
        name = stage.get("name", method)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(
                f"run_stages: stage {number}: name={name!r} cannot name a directory. Use letters, "
                "digits, '-', '_' and '.'."
            )
    return [{**stage, "name": stage.get("name", stage["method"])} for stage in listed]


def _make(
    stage: Mapping[str, Any],
    student: Captioner,
    teacher: Any,
    options: Mapping[str, Any],
) -> Trainer:
    """The trainer of a stage.

    Raises:
        ConfigError: what the trainer or `caption` refuses; a stage that needs a teacher although
            there is none.
    """
    left_out = ("method", "name", "captions")
    own = {name: value for name, value in stage.items() if name not in left_out}
    method, chosen = stage["method"], copy.deepcopy({**options, **own})
    try:
        if "captions" in stage:
            if not isinstance(stage["captions"], Mapping):
                raise ConfigError(
                    f"captions={shortened(stage['captions'])} was given; expected a mapping of "
                    'arguments of capdistill.teachers.caption, such as {"beam_size": 5}.'
                )
            check_options(**stage["captions"])
        if teacher is None and (method == "distill" or "captions" in stage):
            raise ConfigError("it learns from a teacher, but there is none. Give teacher=.")
        if method == "train":
            return Trainer(student, **chosen)
        if method == "distill":
            return Distiller(teacher, student, **chosen)
        silent = chosen.get("losses") == {}
        return SelfCritical(student, teacher=None if silent else teacher, **chosen)
    except TypeError as error:  # an argument that the stage sets itself
        raise ConfigError(f"{error}. Leave it out.") from error
