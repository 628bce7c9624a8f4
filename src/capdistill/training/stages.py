"""One student through several trainings: a recipe with stages, each with its own directory."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from typing_extensions import Unpack

from capdistill.averaging import average_weights
from capdistill.captioner import Captioner
from capdistill.data.dataset import require_data
from capdistill.errors import ConfigError, require_number, shortened, suggest
from capdistill.files import user_path, write_text
from capdistill.generation.config import GenerationConfig
from capdistill.saving import hash_weights
from capdistill.teachers.cached import cached_parts
from capdistill.teachers.captions import cache_key, caption, check_options
from capdistill.teachers.ensemble import leaves
from capdistill.training.chain import (
    ChainRow,
    ChainTable,
    Losses,
    history_row,
    naming,
    scores_of,
)
from capdistill.training.config import (
    DistillConfig,
    SelfCriticalConfig,
    SelfCriticalOptions,
    TrainConfig,
)
from capdistill.training.distiller import Distiller, Teacher, as_teacher
from capdistill.training.history import History
from capdistill.training.objective import Weights
from capdistill.training.run_directory import Resume
from capdistill.training.self_critical import Reward, SelfCritical
from capdistill.training.trainer import Trainer

TABLE = "stages.json"
Method = Literal["train", "distill", "self_critical", "average"]
OWN = ("method", "name", "captions", "teacher", "train")  # of a stage, beside its trainer's
_TRAINERS: dict[str, tuple[type[TrainConfig], tuple[str, ...]]] = {  # options and arguments
    "train": (TrainConfig, ("config",)),
    "distill": (DistillConfig, ("config", "losses", "weights")),
    "self_critical": (
        SelfCriticalConfig,
        ("config", "losses", "weights", "reward", "references"),
    ),
}


class StageOptions(SelfCriticalOptions, total=False):
    """What the trainers of stages take as keyword arguments, for type checkers."""

    config: TrainConfig
    losses: Losses | None
    weights: Weights | None
    reward: str | Mapping[str, float] | Reward
    references: Mapping[str, Sequence[str]] | None


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
    **options: Unpack[StageOptions],
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
        stages: A mapping for each stage. "method": "train" (`Trainer`), "distill" (`Distiller`),
            "self_critical" (`SelfCritical`), or "average". "name": of its directory; the method by
            default. "losses" and "weights": as for that trainer; `reward` too, for the last.
            "captions": the stage learns from captions of the teacher of all stages, with these
            arguments of `capdistill.teachers.caption`; device, precision, cache_dir, progress and,
            where it is possible, cache_features are those of the trainer by default. "teacher" and
            "train": instead of those of all stages, such as cached targets of the same teacher,
            for the losses of the stage. Everything else is an option of its trainer.
            "average" trains nothing: the student gets the mean of its weights after the earlier
            stages that "of" names, with "weights" (`average_weights`).
        out: Directory of the stages, and of the returned table in stages.json.
        teacher: As for `Distiller`; not needed if no stage reads it. A stage of "self_critical"
            with `"losses": {}` reads none.
        resume: "auto" goes on where an earlier call stopped: complete stages are loaded, an
            incomplete one is continued. True needs the first stage to exist.
        overwrite: Start anew, whatever is in the directories of the stages.
        accept_changes: Resume a stage although its teacher, losses, data, or the weights that it
            began with have changed.
        options: Options of the trainers, for all stages; those of a stage override them.

    Raises:
        ConfigError: an invalid stage or option; names the stage.
        IncompatibleModels: teacher and student do not fit; names the stage.
        CheckpointError: a stage to resume had other models, losses or data, or began with other
            weights, because an earlier stage has changed.
    """
    listed = _checked(stages)
    taught = None if teacher is None else as_teacher(teacher)
    how = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
    run = _Stages(student, train, val, taught, options, user_path(out), how)
    for number, stage in enumerate(listed, 1):
        with naming(f"run_stages: stage {number} ('{stage['name']}')"):
            run.check(stage)
    averaged = {name for stage in listed for name in stage.get("of", ())}
    rows: list[ChainRow] = []
    for number, stage in enumerate(listed, 1):
        with naming(f"run_stages: stage {number} ('{stage['name']}')"):
            average = stage["method"] == "average"
            rows.append(run.average(stage, number) if average else run.fit(stage, number))
        if stage["name"] in averaged:
            run.keep(stage["name"])
        table = ChainTable(tuple(rows), run.history.interrupted, run.history.signal)
        write_text(run.out / TABLE, json.dumps(table.to_json(), indent=2))
        if run.history.interrupted:
            break
    return table


@dataclass
class _Stages:
    """The student of all stages, with what they have in common.

    Attributes:
        student, train, val, teacher, options, out: As given to `run_stages`.
        how: `resume`, `overwrite` and `accept_changes`.
        trainer: That of the last stage that was trained.
        history: Its history.
        kept: The weights after each stage that an average reads.
    """

    student: Captioner
    train: Any
    val: Any
    teacher: nn.Module | None
    options: Mapping[str, Any]
    out: Path
    how: Mapping[str, Any]
    trainer: Trainer | None = None
    history: History = field(default_factory=History)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def check(self, stage: Mapping[str, Any]) -> None:
        """Refuse a stage that cannot run, before the first one begins."""
        if stage["method"] == "average":
            return
        _make(stage, self.student, self.teacher, self.options)
        if "captions" in stage:
            require_data("captions", stage.get("train", self.train))

    def fit(self, stage: Mapping[str, Any], number: int) -> ChainRow:
        """Train the student further."""
        place, how = f"{number}-{stage['name']}", dict(self.how)
        trainer = _make(stage, self.student, self.teacher, self.options)
        data = stage.get("train", self.train)
        if "captions" in stage:
            same = {**_shared(trainer, self.teacher), "overwrite": how["overwrite"]}
            file = self.out / f"{place}.jsonl"
            data = caption(self.teacher, data, file, **{**same, **stage["captions"]})
        if number > 1:
            trainer.start_weights = _digest(self.student)
            how["resume"] = "auto" if how["resume"] is True else how["resume"]
        self.trainer, self.history = (
            trainer,
            trainer.fit(data, self.val, out=self.out / place, **how),
        )
        return history_row(self.student, number, place, self.history, name=stage["name"])

    def average(self, stage: Mapping[str, Any], number: int) -> ChainRow:
        """Give the student the mean of its weights after earlier stages; score and save it."""
        assert self.trainer is not None  # which knows the validation data; `_checked`
        student, place = self.student, f"{number}-{stage['name']}"
        states = [self.kept[name] for name in stage["of"]]
        student.load_state_dict(average_weights(states, stage.get("weights")))
        student.activation_ranges = None  # of 8 bits: they were those of the last stage's weights
        if self.trainer.ranks.main:
            student.save(self.out / place / "best")
        return ChainRow(
            stage["name"],
            student.num_parameters(),
            number,
            place,
            scores=scores_of(self.trainer, student),
            stopped=f"the mean of {', '.join(stage['of'])}",
        )

    def keep(self, name: str) -> None:
        """Keep the weights after a stage."""
        self.kept[name] = {n: value.clone() for n, value in self.student.state_dict().items()}


def _digest(student: Captioner) -> str:
    state = student.state_dict()
    return hash_weights({name.replace("_orig_mod.", ""): value for name, value in state.items()})


def _shared(trainer: Trainer, teacher: Any) -> dict[str, Any]:
    """The options of a trainer that its captioning has too."""
    config = trainer.config
    same = {name: getattr(config, name) for name in ("device", "precision", "cache_dir")}
    cached = bool(config.cache_features) and _can_cache(teacher)
    return {**same, "cache_features": cached, "progress": config.progress is not False}


def _can_cache(teacher: Any) -> bool:
    """Whether an encoder in the teacher has features that can be cached."""
    models = () if teacher is None else leaves(teacher)
    return any(cache_key(model) is not None for model in models)


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
    named = [{**stage, "name": stage.get("name", stage["method"])} for stage in listed]
    for number, stage in enumerate(named, 1):
        if stage["method"] == "average":
            _check_average(stage, number, [each["name"] for each in named[: number - 1]])
        else:
            _check_keys(stage, number)
    return named


def _check_keys(stage: Mapping[str, Any], number: int) -> None:
    """Refuse keys that neither the stage nor its trainer knows."""
    known = {
        method: {*OWN, *arguments, *config.model_fields, *GenerationConfig.types()}
        for method, (config, arguments) in _TRAINERS.items()
    }
    method = stage["method"]
    for key in (key for key in stage if key not in known[method]):
        others = [name for name, keys in known.items() if key in keys]
        hint = f"It belongs to method {' and '.join(map(repr, others))}. Remove it."
        raise ConfigError(
            f"run_stages: stage {number} ('{stage['name']}'): method '{method}' has no key "
            f"{key!r}. {hint if others else suggest(str(key), known[method])}"
        )


def _check_average(stage: Mapping[str, Any], number: int, earlier: Sequence[str]) -> None:
    begin = f"run_stages: stage {number} ('{stage['name']}')"
    unused = sorted(stage.keys() - {"method", "name", "of", "weights"})
    if unused:
        raise ConfigError(
            f"{begin}: {', '.join(unused)}: an average trains nothing. Its keys are 'name', 'of' "
            "and 'weights'."
        )
    of, weights = stage.get("of"), stage.get("weights")
    if not isinstance(of, (list, tuple)) or not of or any(earlier.count(n) != 1 for n in of):
        known = ", ".join(earlier) or "none"
        raise ConfigError(
            f"{begin}: of={shortened(of)} was given. Expected the names of earlier stages, each "
            f"borne by one of them: {known}."
        )
    if weights is not None and (not isinstance(weights, (list, tuple)) or len(weights) != len(of)):
        raise ConfigError(
            f"{begin}: weights={shortened(weights)} was given. Expected {len(of)} numbers, one for "
            "each stage in 'of'."
        )
    for weight in weights or ():
        require_number(f"{begin}: a weight", weight, above=0)


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
    own = {name: value for name, value in stage.items() if name not in OWN}
    method, chosen = stage["method"], copy.deepcopy({**options, **own})
    captions_of = teacher  # a stage's own teacher may be cached targets, which caption nothing
    silent = chosen.get("losses") == {}
    if stage.get("teacher") is not None:
        if method == "train" or silent:
            raise ConfigError(
                "it has a 'teacher' of its own, but no losses that read it; captions are those of "
                "the teacher of all stages. Use method 'distill', or remove the key."
            )
        teacher = as_teacher(stage["teacher"])
    try:
        if "captions" in stage:
            _check_captions(stage["captions"], captions_of)
        if (teacher is None and method == "distill") or (
            captions_of is None and "captions" in stage
        ):
            raise ConfigError("it learns from a teacher, but there is none. Give teacher=.")
        if method == "train":
            return Trainer(student, **chosen)
        if method == "distill":
            return Distiller(teacher, student, **chosen)
        return SelfCritical(student, teacher=None if silent else teacher, **chosen)
    except TypeError as error:  # an argument that the stage sets itself
        raise ConfigError(f"{error}. Leave it out.") from error


def _check_captions(arguments: Any, teacher: Any) -> None:
    """Refuse arguments of `caption` that are invalid, or that the teacher cannot follow."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"captions={shortened(arguments)} was given; expected a mapping of arguments of "
            'capdistill.teachers.caption, such as {"beam_size": 5}.'
        )
    check_options(**arguments)
    for cached in cached_parts(teacher):
        raise ConfigError(
            f"captions: '{cached.name}' has cached targets and cannot caption images. Give the "
            "teacher itself to all stages, and the targets to those with losses on it."
        )
    if arguments.get("cache_features") and not _can_cache(teacher):
        raise ConfigError(
            "captions: cache_features=True, but the teacher has no encoder that can be cached. "
            "Set cache_features=False."
        )
