"""Teacher and student side by side, with what the recipe promises beside each figure."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capdistill import plots
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels, require_int
from capdistill.evaluation.evaluation import Evaluation, evaluate
from capdistill.evaluation.measure import time_captions
from capdistill.evaluation.table import Row, figures
from capdistill.files import finite_or_none, write_text
from capdistill.metrics.bootstrap import PairedScores, paired
from capdistill.plots import require_matplotlib
from capdistill.runtime import autocast, on_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SCHEMA = "capdistill.comparison/1"


@dataclass(frozen=True)
class Sample:
    """One image with what each model says of it.

    Args:
        image_id: The image.
        picture: A small JPEG as a `data:` address.
        references: What people say.
        captions: Model -> its caption.
    """

    image_id: str
    picture: str
    references: tuple[str, ...]
    captions: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: figures, promises, samples. `print` it, or `save` it as a report.

    Args:
        models: "teacher", "student" and, where given, "baseline" -> its evaluation as plain dicts
            (the form of `Evaluation.to_json`).
        rows: The table.
        samples: Images spread evenly over the data, not chosen by quality.
        bootstrap: What the intervals of the rows are of: "samples", "seed", "confidence", and
            "notes" on scores without one; None where no samples were drawn.
        pictures: Title -> picture as a `data:` address: training curves, and where models looked.
    """

    models: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
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
        """Write `report.json` and `report.html` (one file, nothing fetched); gives the latter.

        Raises:
            ConfigError: the directory cannot be written.
        """
        from capdistill.evaluation.report import page

        directory = Path(directory)
        text = json.dumps(
            finite_or_none(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False
        )
        write_text(directory / "report.json", text)
        write_text(directory / "report.html", page(self))
        return directory / "report.html"

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read the `report.json` that `save` wrote.

        Raises:
            CheckpointError: no such file, or one of another form.
        """
        path = Path(directory) / "report.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            samples = [{**s, "references": tuple(s["references"])} for s in content["samples"]]
            return cls(
                models=content["models"],
                rows=tuple(Row(**row) for row in content["rows"]),
                samples=tuple(Sample(**sample) for sample in samples),
                bootstrap=content.get("bootstrap"),
                pictures=content.get("pictures", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no report ({error}). Expected the directory that Comparison.save "
                f"wrote, with schema '{SCHEMA}'."
            ) from error

    def __str__(self) -> str:
        from capdistill.evaluation.table import text_table

        return text_table(self)


def compare(
    teacher: Any,
    student: Any,
    data: Any,
    baseline: Any = None,
    *,
    bootstrap: int = 0,
    attention: int = 0,
    histories: Mapping[str, str | Path] | None = None,
    **options: Any,
) -> Comparison:
    """Evaluate teacher and student on the same images and set them side by side.

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
        teacher: The model that taught.
        student: The model that was distilled from it.
        data: As in `evaluate`, but not a one-shot iterator: every model reads it.
        baseline: The same student trained by cross-entropy alone, as a third column.
        bootstrap: Samples of the images to draw, such as 1000: scores get 95 % intervals, and
            the student's difference from teacher and baseline an interval and a p-value, as
            `metrics.paired_bootstrap` defines them. 0 draws none.
        attention: Draw for so many images (the first of the data) where each model looked; needs
            the extra `ui`, as `histories` does.
        histories: Draw the training curves of "teacher", "student" or "baseline": its run's
            directory.
        options: Of `evaluate`.

    Raises:
        ConfigError: a number of samples below 0, or a history of another model.
        MissingExtra: pictures are wanted and matplotlib is not installed.
        IncompatibleModels: the models could not be scored on the same images.
    """
    require_int("compare: bootstrap", bootstrap, minimum=0)
    require_int("compare: attention", attention, minimum=0)
    models = {"teacher": teacher, "student": student}
    if baseline is not None:
        models["baseline"] = baseline
    histories = _known(histories or {}, models)
    if attention or histories:
        require_matplotlib()
    if options.get("training_captions") is not None:  # an iterator would be empty the second time
        options["training_captions"] = list(options["training_captions"])
    found = {role: evaluate(model, _again(data), **options) for role, model in models.items()}
    _same_images(found)
    found = _timed_in_turn(models, found)
    rows, drawn = figures(found), _against(found, bootstrap) if bootstrap else {}
    return Comparison(
        models={role: each.to_json() for role, each in found.items()},
        rows=tuple(_with_intervals(row, drawn) for row in rows),
        samples=tuple(_samples(found)),
        bootstrap=_settings(drawn["teacher"]) if drawn else None,
        pictures=_pictures(models, found, histories, attention),
    )


def _known(histories: Mapping[str, str | Path], models: Mapping[str, Any]) -> dict[str, Any]:
    strange = [role for role in histories if role not in models]
    if strange:
        raise ConfigError(
            f"compare: a history of '{strange[0]}' was given, but the models are "
            f"{', '.join(models)}. Name each history after its model."
        )
    return dict(histories)


def _pictures(
    models: Mapping[str, Any],
    found: Mapping[str, Evaluation],
    histories: Mapping[str, str | Path],
    attention: int,
) -> dict[str, str]:
    if not attention and not histories:
        return {}
    pass

    return pictures(models, found, histories, attention)


def _against(found: Mapping[str, Evaluation], samples: int) -> dict[str, PairedScores]:
    """Teacher and, where given, baseline -> the student beside it, on the same samples."""
    systems = {role: each.scores for role, each in found.items()}
    others = [role for role in found if role != "student"]
    results = paired(systems, [(role, "student") for role in others], samples)
    return dict(zip(others, results, strict=True))


def _with_intervals(row: Row, drawn: Mapping[str, PairedScores]) -> Row:
    pairs = {role: each[row.key] for role, each in drawn.items() if row.key in each}
    intervals = {role: list(pair.a_interval) for role, pair in pairs.items()}
    differences = {
        role: {
            "difference": pair.difference,
            "interval": list(pair.interval),
            "p_value": pair.p_value,
        }
        for role, pair in pairs.items()
    }
    if pairs:
        intervals["student"] = list(pairs["teacher"].b_interval)
    return replace(row, intervals=intervals, differences=differences)


def _settings(drawn: PairedScores) -> dict[str, Any]:
    found = drawn.to_json()
    return {name: found[name] for name in ("samples", "seed", "confidence", "notes")}


def _timed_in_turn(
    models: Mapping[str, Any], found: Mapping[str, Evaluation]
) -> dict[str, Evaluation]:
    """Times taken anew image by image in turn: a busy machine slows all models alike."""
    if any(each.latency_ms is None for each in found.values()):
        return dict(found)
    teacher = found["teacher"]
    device = torch.device(teacher.device)
    with on_device(list(models.values()), device):
        batches = [each.timed for each in found.values()]
        how = teacher.precision, teacher.generation
        times = time_captions(list(models.values()), batches, device, *how)
    pairs = zip(found.items(), times, strict=True)
    return {role: replace(each, latency_ms=time) for (role, each), time in pairs}


def _samples(found: Mapping[str, Evaluation]) -> list[Sample]:
    student = found["student"]
    return [
        Sample(
            image_id=image,
            picture=picture,
            references=tuple(student.references[image]),
            captions={role: each.captions[image] for role, each in found.items()},
        )
        for image, picture in student.gallery.pictures().items()
    ]


def _again(data: Any) -> Any:
    if isinstance(data, Iterator):
        raise ConfigError(
            "compare: the data are a one-shot iterator, which the second model would find empty. "
            "Give a data set, a list of batches, or an object whose __iter__ starts anew."
        )
    return data


def _same_images(found: Mapping[str, Evaluation]) -> None:
    teacher = set(found["teacher"].captions)
    for role, each in found.items():
        other = teacher.symmetric_difference(each.captions)
        if other:
            raise IncompatibleModels(
                f"compare: teacher and {role} captioned different images, so their scores cannot "
                f"be compared; the first that only one has: {min(other)}. Use data that give the "
                "same images each time."
            )


_DPI = 60  # a report is read, not printed


def pictures(
    models: Mapping[str, Any],
    found: Mapping[str, Evaluation],
    histories: Mapping[str, str | Path],
    images: int,
) -> dict[str, str]:
    """Title -> picture: the curves of each run, then the first images through each model's eyes.

    Models without attention or a map of visual tokens are left out.

    Raises:
        MissingExtra: matplotlib is not installed.
        DataError: a history that is not there.
    """
    drawn = {f"{role}: training": _address(plots.history(run)) for role, run in histories.items()}
    for role, model in models.items():
        if hasattr(model, "caption") and model.decoder.has_attention and model.encoder.grid:
            drawn.update(_looks(role, model, found[role], images))
    return drawn


def _looks(role: str, model: Any, found: Evaluation, images: int) -> Iterator[tuple[str, str]]:
    device = torch.device(found.device)
    with on_device([model], device), autocast(device, found.precision):
        for batch in found.timed[:images]:
            for result in model.caption(batch.images, details=True, generation=found.generation):
                title = f"{role}: where it looked in {batch.image_ids[0]}"
                yield title, _address(plots.attention(result))


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
