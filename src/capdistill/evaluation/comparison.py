"""Compare teacher and student, with the expectations of the published recipe, or any captioners."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import Unpack

from capdistill import plots
from capdistill.captioner import Captioner
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels, require_int
from capdistill.evaluation.evaluation import (
    Evaluation,
    evaluate,
    require_generate,
    require_known_options,
)
from capdistill.evaluation.measure import time_captions
from capdistill.evaluation.report import fragment, page, summary
from capdistill.evaluation.table import (
    Progress,
    TableRow,
    compared_pairs,
    comparison_table,
    table_rows,
)
from capdistill.files import finite_or_none, from_json, write_text
from capdistill.generation.config import GenerationConfig, GenerationOptions
from capdistill.metrics.base import Metrics, listed_metrics
from capdistill.metrics.bootstrap import PairedScores, paired
from capdistill.runtime import autocast, on_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "capdistill.comparison/1"


@dataclass(frozen=True)
class Sample:
    """One image with each model's caption.

    Args:
        image_id: The image.
        picture: A small JPEG as a `data:` address.
        references: The reference captions.
        captions: Model -> its caption.
    """

    image_id: str
    picture: str
    references: tuple[str, ...]
    captions: Mapping[str, str]


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`. `print` it, or `save` it as a report.

    Args:
        models: "teacher", "student" or the names of the students, and "baseline", as given -> its
            evaluation as plain dicts (the form of `Evaluation.to_json`).
        rows: The table.
        samples: Images spread evenly over the data, not chosen by quality.
        bootstrap: Settings of the intervals: "samples", "seed", "confidence", and "notes" on scores
            without one; None if no samples were drawn.
        pictures: Title -> picture as a `data:` address: training curves and attention maps.
    """

    models: Mapping[str, Mapping[str, Any]]
    rows: tuple[TableRow, ...]
    samples: tuple[Sample, ...]
    bootstrap: Mapping[str, Any] | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts and lists; "schema" names the form."""
        return {
            "schema": SCHEMA,
            "rows": [asdict(row) for row in self.rows],
            "bootstrap": self.bootstrap,
            "samples": [asdict(sample) for sample in self.samples],
            "pictures": dict(self.pictures),
            "models": {role: dict(found) for role, found in self.models.items()},
        }

    def save(self, directory: str | Path) -> Path:
        """Write `report.json` and `report.html` (one file that fetches nothing).

        Returns:
            The path of `report.html`.

        Raises:
            ConfigError: the directory cannot be written.
        """
        directory = Path(directory)
        content = finite_or_none(self.to_json())
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(directory / "report.json", text)
        write_text(directory / "report.html", page(content))
        return directory / "report.html"

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read the `report.json` that `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it has another form.
        """
        path = Path(directory) / "report.json"
        try:
            content = from_json(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            samples = [{**s, "references": tuple(s["references"])} for s in content["samples"]]
            return cls(
                models=content["models"],
                rows=tuple(TableRow(**row) for row in content["rows"]),
                samples=tuple(Sample(**sample) for sample in samples),
                bootstrap=content.get("bootstrap"),
                pictures=content.get("pictures", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a report ({error}). Expected the directory that Comparison.save "
                f"wrote, with schema '{SCHEMA}'."
            ) from error

    def __str__(self) -> str:
        return comparison_table(self.to_json())

    def __repr__(self) -> str:
        names = ", ".join(f"{role} {found['name']!r}" for role, found in self.models.items())
        return f"Comparison({names}: {summary(self.to_json()).rstrip('.')})"

    def _repr_html_(self) -> str:
        return fragment(finite_or_none(self.to_json()))


class EvaluationOptions(GenerationOptions, total=False):
    """The keyword arguments of `evaluate`, for type checkers."""

    batch_size: int
    device: str
    precision: str
    metrics: Metrics | None
    limit: int | None
    num_workers: int
    measure: bool
    progress: bool
    name: str | None
    generation: GenerationConfig | Mapping[str, Any] | None
    training_captions: Iterable[str] | None


def compare(
    teacher: Any | None,
    student: Any,
    data: Any,
    baseline: Any = None,
    *,
    bootstrap: int = 0,
    attention: int = 0,
    histories: Mapping[str, str | Path] | None = None,
    **options: Unpack[EvaluationOptions],
) -> Comparison:
    """Evaluate teacher and student, or several students, on the same images and compare them.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> found = compare(teacher, student, data.val, metrics=["bleu"], measure=False)
        >>> [row.key for row in found.rows][:2]
        ['bleu_1', 'bleu_2']

    Args:
        teacher: The teacher; None compares students alone.
        student: The student distilled from it; or name -> student for several. Then there are no
            expectations, and each model is compared with the first, which is the teacher if there
            is one; or all with the one called "student".
        data: As in `evaluate`, but not a one-shot iterator: every model reads it.
        baseline: The same student trained by cross-entropy alone, as a third column.
        bootstrap: Number of samples of the images, such as 1000: scores get 95 % intervals, and the
            student's difference from teacher and baseline (of several students, that from the
            first model) an interval and a p-value, as `metrics.paired_bootstrap` defines them. 0
            draws none.
        attention: Number of images (the first of the data) for which to draw attention maps of each
            model; needs the extra `ui`, as `histories` does.
        histories: "teacher", "student" or a student's name, "baseline" -> its run's directory, to
            draw its training curves.
        options: Options of `evaluate`.

    Raises:
        ConfigError: an unknown option (the message suggests the nearest), a value out of range, a
            history of another model, or fewer than two models.
        DataError: as `evaluate`, or a history that does not exist.
        MissingExtra: pictures are requested but matplotlib is not installed.
        IncompatibleModels: the models could not be scored on the same images.
    """
    require_int("compare: bootstrap", bootstrap, minimum=0)
    require_int("compare: attention", attention, minimum=0)
    require_known_options("compare", options, evaluate, compare)
    models = _by_role(teacher, student, baseline)
    for model in models.values():  # fail before the first model captions everything
        require_generate("compare", model)
    histories = _checked_histories(histories or {}, models)
    if attention:
        plots.require_matplotlib()
    _require_reusable(data)
    options["metrics"] = listed_metrics(options.get("metrics"))
    if isinstance(captions := options.get("training_captions"), Iterator):
        options["training_captions"] = list(captions)  # the second model would find it empty
    found = {}
    for role, model in models.items():
        Progress(role, options.get("progress", True)).say("captioning")
        found[role] = evaluate(model, data, **options)
    _require_same_images(found)
    found = _timed_in_turn(models, found)
    evaluated = {role: each.to_json() for role, each in found.items()}
    drawn = _against(found, bootstrap) if bootstrap else {}
    return Comparison(
        models=evaluated,
        rows=tuple(_with_intervals(row, drawn) for row in table_rows(evaluated)),
        samples=tuple(_samples(found)),
        bootstrap=_settings(next(iter(drawn.values()))) if drawn else None,
        pictures=_pictures(models, found, histories, attention),
    )


def _by_role(teacher: Any, student: Any, baseline: Any) -> dict[str, Any]:
    """Role -> model; several students have names of their own."""
    students = dict(student) if isinstance(student, Mapping) else {"student": student}
    wrong = [name for name in students if not isinstance(name, str) or not name]
    taken = [name for name in ("teacher", "baseline") if name in students]
    if wrong or taken:
        raise ConfigError(
            f"compare: {[*wrong, *taken][0]!r} cannot name a student. Give text other than "
            "'teacher' and 'baseline', which name the models that students are compared with."
        )
    given = {"teacher": teacher, **students, "baseline": baseline}
    models = {role: model for role, model in given.items() if role in students or model is not None}
    if not students or len(models) < 2:
        raise ConfigError(
            f"compare: {', '.join(models) or 'no model'} was given; expected two models or more. "
            "Use evaluate for one, or give several students as {name: captioner}."
        )
    return models


def _checked_histories(
    histories: Mapping[str, str | Path], models: Mapping[str, Any]
) -> dict[str, str | Path]:
    if not isinstance(histories, Mapping):
        raise ConfigError(
            f"compare: histories={histories!r}; expected a mapping from the names of models to the "
            "directories of their runs."
        )
    strange = [role for role in histories if role not in models]
    if strange:
        raise ConfigError(
            f"compare: a history of '{strange[0]}' was given, but the models are "
            f"{', '.join(models)}. Name each history after its model."
        )
    if histories:
        plots.require_matplotlib()
    for run in histories.values():
        plots.read_history(run)
    return dict(histories)


def _require_reusable(data: Any) -> None:
    if isinstance(data, Iterator):
        raise ConfigError(
            "compare: the data are a one-shot iterator, which the second model would find empty. "
            "Give a data set, a list of batches, or an object whose __iter__ starts again."
        )


def _require_same_images(found: Mapping[str, Evaluation]) -> None:
    first = next(iter(found))
    for role, each in found.items():
        other = set(found[first].captions).symmetric_difference(each.captions)
        if other:
            raise IncompatibleModels(
                f"compare: {first} and {role} captioned different images, so their scores cannot "
                f"be compared; the first that only one has: {min(other)}. Use data that give the "
                "same images each time."
            )


def _against(found: Mapping[str, Evaluation], samples: int) -> dict[str, PairedScores]:
    """As `differences` of a row: role -> the comparison of two models, on the same samples."""
    systems = {role: each.scores for role, each in found.items()}
    pairs = compared_pairs(list(found))
    results = paired(systems, pairs.values(), samples)
    return dict(zip(pairs, results, strict=True))


def _with_intervals(row: TableRow, drawn: Mapping[str, PairedScores]) -> TableRow:
    pairs = {role: each[row.key] for role, each in drawn.items() if row.key in each}
    intervals: dict[str, list[float]] = {}
    for role, (before, after) in compared_pairs(list(row.values)).items():
        if role in pairs:
            intervals[before] = list(pairs[role].a_interval)
            intervals[after] = list(pairs[role].b_interval)
    differences = {
        role: {
            "difference": pair.difference,
            "interval": list(pair.interval),
            "p_value": pair.p_value,
        }
        for role, pair in pairs.items()
    }
    return replace(row, intervals=intervals, differences=differences)


def _settings(drawn: PairedScores) -> dict[str, Any]:
    found = drawn.to_json()
    return {name: found[name] for name in ("samples", "seed", "confidence", "notes")}


def _timed_in_turn(
    models: Mapping[str, Any], found: Mapping[str, Evaluation]
) -> dict[str, Evaluation]:
    """Times measured again, image by image in turn: a busy machine slows all models alike."""
    if any(each.latency_ms is None for each in found.values()):
        return dict(found)
    first = next(iter(found.values()))
    device = torch.device(first.device)
    with on_device(list(models.values()), device):
        batches = [each.timed for each in found.values()]
        how = first.precision, first.generation
        times = time_captions(list(models.values()), batches, device, *how)
    pairs = zip(found.items(), times, strict=True)
    return {role: replace(each, latency_ms=time) for (role, each), time in pairs}


def _samples(found: Mapping[str, Evaluation]) -> list[Sample]:
    one = found.get("student") or next(iter(found.values()))
    return [
        Sample(
            image_id=image,
            picture=picture,
            references=tuple(one.references[image]),
            captions={role: each.captions[image] for role, each in found.items()},
        )
        for image, picture in one.gallery.pictures().items()
    ]


def _pictures(
    models: Mapping[str, Any],
    found: Mapping[str, Evaluation],
    histories: Mapping[str, str | Path],
    images: int,
) -> dict[str, str]:
    """Title -> picture: the curves of each run, then attention maps for the first images.

    Models without attention or a map of visual tokens are left out.
    """
    drawn = {f"{role}: training": _address(plots.history(run)) for role, run in histories.items()}
    for role, model in models.items() if images else ():
        if not isinstance(model, Captioner):
            continue
        if model.decoder.has_attention and model.encoder.grid:
            drawn.update(_attention(role, model, found[role], images))
    return drawn


def _attention(role: str, model: Any, found: Evaluation, images: int) -> Iterator[tuple[str, str]]:
    device = torch.device(found.device)
    with on_device([model], device), autocast(device, found.precision):
        for batch in found.timed[:images]:
            for result in model.caption(batch.images, details=True, generation=found.generation):
                title = f"{role}: attention in {batch.image_ids[0]}"
                yield title, _address(plots.attention(result))


_DPI = 60  # a report is read on a screen


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
