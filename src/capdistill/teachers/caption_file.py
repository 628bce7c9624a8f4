"""The file of a teacher's captions, and the choice among them that makes training data."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from capdistill.data.caption_files import DataReport, Problem, pluralize
from capdistill.data.dataset import CaptionData, Example, require_data
from capdistill.data.rows import accept_rows
from capdistill.errors import ConfigError, DataError, require_int, require_number, suggest
from capdistill.files import DirectoryLock, from_json, user_path, write_text
from capdistill.generation.hypotheses import Hypothesis
from capdistill.metrics import CaptionScorer
from capdistill.runtime import SAFE_SEED, stable_hash
from capdistill.teachers.foreign_captions import (
    is_foreign,
    read_texts,
    rows_of,
    texts_of,
    with_file_names,
)

Keep = Literal["cider", "score"]


def read_captions(
    path: str | Path,
    data: CaptionData,
    *,
    num_return: int = 1,
    keep: Keep | None = None,
    mix: float = 0,
    reweight: float | None = None,
) -> TeacherCaptions:
    """Training data with the captions that `caption`, or another program, wrote to a file.

    Example:
        >>> read_captions("api.jsonl", data.train, mix=1)  # doctest: +SKIP

    Args:
        path: The file of `caption`; or captions of any other origin, such as an API: JSON Lines or
            JSON, by the id of the image or the name of its file (see `foreign_captions.py`).
        data: The images that it was made for, or some of them; by id, or by the name of their file
            if one image alone has it. With captions of another origin,
            images that the file lacks keep their own.
        num_return, keep, mix, reweight: As for `caption`. Those of another origin have no
            log-probabilities: `keep="score"` and `reweight` are refused.

    Raises:
        DataError: no such file, a damaged one, or images of `data` that it does not have.
        ConfigError: an invalid option, or `keep="cider"` for images without references.
    """
    choice = Choice(num_return, keep, mix, reweight)
    data = accept_rows(data)
    require_data("read_captions", data)
    file = user_path(path, DataError)
    if is_foreign(file, description_of(file)):
        rows = _foreign_rows(file, data, choice)
    else:
        written = read_rows(file)
        rows = rows_of(written, {image: row.image for image, row in written.items()}, data)
    missing = [image for image in data.image_ids if image not in rows]
    if missing:
        raise DataError(
            f"{file} has no captions of {len(missing)} of {len(data)} images, such as "
            f"'{missing[0]}'. Call caption() with the teacher again, which adds them, or give the "
            "data that the file was made for."
        )
    examples, counts = [], Counter[str](dict.fromkeys(_COUNTED, 0))
    report = DataReport(problems=list(data.report.problems))
    for example in data.examples:
        row = rows[example.image_id]
        if row.error is not None:
            report.add(Problem("corrupt image", str(example.path), "", row.error))
        examples.append(choice.example(example, row, counts))
    return TeacherCaptions(examples, dict(counts), name=data.name, report=report)


def _foreign_rows(file: Path, data: CaptionData, choice: Choice) -> dict[str, Row]:
    """The rows of all images; those that the file lacks have no captions.

    Raises:
        DataError: it has none of the images.
        ConfigError: a choice that needs log-probabilities.
    """
    if choice.keep == "score" or choice.reweight is not None:
        raise ConfigError(
            f"read_captions: {file} has captions without log-probabilities, so keep='score' and "
            "reweight= have nothing to go by. Use keep='cider', or None for the order of the file."
        )
    written, rows = read_texts(file), dict[str, Row]()
    texts, named = with_file_names(written), 0
    for example in data.examples:
        row = rows[example.image_id] = Row(str(example.path), example.image_id, [], [], [])
        given = texts_of(texts, example)
        named += given is not None
        for text in given or ():
            if not text:
                row.empty += 1
            elif text in row.captions:
                row.duplicates += 1
            else:
                row.captions.append(text)
    if not named:
        theirs, ours = (", ".join(repr(n) for n in [*names][:3]) for names in (written, rows))
        raise DataError(
            f"{file} has captions of {pluralize(len(written), 'image')}, such as {theirs}, but of "
            f"none of the {len(data)} images of the data, such as {ours}. Name them by id or by "
            "file."
        )
    if not any(row.captions for row in rows.values()):
        raise DataError(f"{file}: every caption of the {pluralize(named, 'image')} is empty.")
    if choice.keep == "cider":
        _score(rows, data)
    return rows


def _score(rows: Mapping[str, Row], data: CaptionData) -> None:
    """Add the CIDEr-D of each caption against the references of its image."""
    known = {image: texts for image, texts in data.references.items() if texts}
    scorer = CaptionScorer(known, metrics=["cider_d"]) if known else None
    for image, row in rows.items():
        if scorer is not None and image in known:
            row.cider_d = scorer.rewards([image] * len(row.captions), row.captions).tolist()


class TeacherCaptions(CaptionData):
    """Images with a teacher's captions to train on; `references` are still the human ones.

    The references of an image without human captions are the captions that it is trained on.

    Attributes:
        counts: "captions" of the teacher and "mixed" human ones that are trained on; candidates
            dropped as "duplicates", "empty" or "unfinished"; images "without" any candidate left
            and "unreadable" ones, which both keep their own captions.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        counts: Mapping[str, int],
        *,
        name: str = "data",
        report: DataReport | None = None,
    ) -> None:
        super().__init__(examples, name=name, report=report)
        self.counts = dict(counts)

    def __str__(self) -> str:
        shown = ", ".join(f"{n} {_COUNTED[name]}" for name, n in self.counts.items() if n)
        return f"{super().__str__()} ({shown})"


_COUNTED = {
    "captions": "of the teacher",
    "mixed": "human ones beside them",
    "duplicates": "duplicates dropped",
    "empty": "empty dropped",
    "unfinished": "unfinished dropped",
    "without": "images without any",
    "unreadable": "unreadable images",
}


@dataclass(frozen=True)
class Choice:
    """Which captions of a row are trained on; for the arguments see `caption`."""

    num_return: int = 1
    keep: Keep | None = None
    mix: float = 0
    reweight: float | None = None

    def __post_init__(self) -> None:
        require_int("caption: num_return", self.num_return, 1)
        if self.keep not in (None, *get_args(Keep)):
            hint = suggest(str(self.keep), get_args(Keep))
            raise ConfigError(f"caption: keep={self.keep!r} is unknown. {hint}")
        share = isinstance(self.mix, Real) and not isinstance(self.mix, (Integral, bool))
        if share and not 0 <= self.mix < 1:
            raise ConfigError(
                f"caption: mix={self.mix} was given as a share; expected a number from 0 to below "
                "1, or a whole number of references, without a decimal point."
            )
        mix = float(self.mix) if share else require_int("caption: mix", self.mix, 0)
        object.__setattr__(self, "mix", mix)  # NumPy's numbers as Python's
        if self.reweight is not None:
            require_number("caption: reweight", self.reweight, above=0)

    def example(self, example: Example, row: Row, counts: Counter[str]) -> Example:
        """The image with the chosen captions; its own ones if the teacher has none."""
        counts.update({name: getattr(row, name) for name in ("duplicates", "empty", "unfinished")})
        chosen = self.places(row)
        if not chosen:
            counts["without" if row.error is None else "unreadable"] += 1
            return example
        mixed = self.mixed(example, len(chosen))
        counts.update(captions=len(chosen), mixed=len(mixed))
        weights = None
        if self.reweight is not None:
            scores = torch.tensor([row.log_probs[i] for i in chosen], dtype=torch.float64)
            shares = (scores / self.reweight).softmax(0) * len(chosen)
            weights = [*shares.tolist(), *[1.0] * len(mixed)]
        return Example(
            example.image_id,
            example.path,
            [*(row.captions[i] for i in chosen), *mixed],
            references=example.references or None,
            weights=weights,
        )

    def places(self, row: Row) -> list[int]:
        """The places of the chosen candidates, the best first."""
        values = [0.0] * len(row.captions)
        if self.keep == "score":
            values = [p / n for p, n in zip(row.log_probs, row.lengths, strict=True)]
        elif self.keep == "cider" and row.captions:
            if row.cider_d is None:
                raise ConfigError(
                    f"caption: keep='cider' scores captions against references, but the image "
                    f"'{row.image_id}' has none. Use keep='score' or None."
                )
            values = row.cider_d
        order = sorted(range(len(values)), key=lambda place: -values[place])
        return order[: self.num_return]

    def mixed(self, example: Example, captions: int) -> list[str]:
        """The human captions beside so many of the teacher."""
        wanted = self.mix
        if isinstance(wanted, float):
            share = captions * wanted / (1 - wanted)
            wanted = math.floor(share + stable_hash("mix", example.image_id) / SAFE_SEED)
        order = sorted(
            enumerate(example.references),
            key=lambda each: (stable_hash("mix", example.image_id, each[0]), each[0]),
        )
        return [text for _, text in order[: int(wanted)]]


_LEAST = -1e9  # a log-probability as JSON can hold it


@dataclass
class Row:
    """The line of an image: its usable candidates in the order of the search.

    Args:
        image: The image file, below the folder that holds all of them.
        image_id: The id of the image.
        captions: The texts.
        log_probs: The log-probability (nats) of each, the end token included.
        lengths: The number of tokens of each, the end token included.
        cider_d: CIDEr-D of each; None without references.
        duplicates, empty, unfinished: How many candidates were dropped.
        error: Why the image could not be read.
    """

    image: str
    image_id: str
    captions: list[str]
    log_probs: list[float]
    lengths: list[int]
    cider_d: list[float] | None = None
    duplicates: int = 0
    empty: int = 0
    unfinished: int = 0
    error: str | None = None

    @classmethod
    def of(cls, image_id: str, image: str, hypothesis: Hypothesis) -> Row:
        """The row of an image, whose candidates are not scored yet."""
        row = cls(image, image_id, [], [], [])
        for each in hypothesis.n_best or (hypothesis,):
            if not each.finished:
                row.unfinished += 1
            elif not each.text.strip():
                row.empty += 1
            elif each.text in row.captions:
                row.duplicates += 1
            else:
                row.captions.append(each.text)
                row.log_probs.append(max(each.log_prob, _LEAST))
                row.lengths.append(len(each.tokens) + 1)
        return row

    def require_types(self) -> None:
        """Refuse a row that someone else wrote, or that was edited by hand.

        Raises:
            TypeError: names the field that has another type, or as many values as it should not.
        """
        kinds: dict[str, type] = {"captions": str, "log_probs": float, "lengths": int}
        kinds |= {} if self.cider_d is None else {"cider_d": float}
        for name, kind in kinds.items():
            values = getattr(self, name)
            if not isinstance(values, list) or len(values) != len(self.captions):
                raise TypeError(f"{name} is no list with a value per caption")
            if not all(isinstance(v, (int, kind) if kind is float else kind) for v in values):
                raise TypeError(f"{name} holds something else than {kind.__name__}")
        if not isinstance(self.image_id, str) or not isinstance(self.error, (str, type(None))):
            raise TypeError("image_id or error is no text")
        if not all(isinstance(n, int) for n in (self.duplicates, self.empty, self.unfinished)):
            raise TypeError("a count is no whole number")

    def line(self) -> bytes:
        """The row as JSON."""
        text = json.dumps(asdict(self), ensure_ascii=False)
        return (text + "\n").encode("utf-8", "backslashreplace")


def description_of(file: Path) -> Path:
    """The file beside it that says how it was made."""
    jsonl = file.suffix in ("", ".jsonl")
    return file.with_suffix(".run.json") if jsonl else file.with_name(f"{file.name}.run.json")


def remove_if_empty(file: Path) -> None:
    """Leave nothing behind where no image could be captioned."""
    with suppress(OSError):
        if not file.stat().st_size:
            file.unlink()
            description_of(file).unlink()


def open_rows(file: Path, about: dict[str, Any], overwrite: bool) -> dict[str, Row]:
    """The rows that a file has, for the same teacher, options and data.

    Raises:
        ConfigError: it was made with others, or is to be replaced while another process writes it.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a directory. Give a file, such as {file / 'captions.jsonl'}.")
    side = description_of(file)
    if file.exists() and not overwrite:
        try:
            before = from_json(side.read_text("utf-8"))
            different = [key for key in about if before.get(key) != about[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{file} exists, but {side.name} beside it, which says how it was made, cannot be "
                f"read ({error}). Give another file, or overwrite=True to replace it."
            ) from error
        if different:
            changes = ", ".join(_change(key, before.get(key), about[key]) for key in different)
            raise ConfigError(
                f"{file} was made differently: {changes}. Give another file, or overwrite=True to "
                "caption the images anew."
            )
        return read_rows(file)
    with DirectoryLock() as lock, suppress(OSError):  # what cannot be removed: nor written
        lock.take(file)
        file.unlink()  # first: old rows must never stand beside a new description
    write_text(side, json.dumps(about, indent=2))
    write_text(file, "")
    return {}


def _change(key: str, before: object, now: object) -> str:
    short = all(len(str(value)) < 32 for value in (before, now))
    return f"{key} was {before!r} and is {now!r}" if short else f"other {key}"


def read_rows(file: Path, cut: bool = False) -> dict[str, Row]:
    """The rows by image id, the last one of an image; `cut` removes a line that has no end."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    whole = content.rfind(b"\n") + 1
    if cut and whole < len(content):
        os.truncate(file, whole)
    rows = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            values = json.loads(line)
            row = Row(**{field.name: values[field.name] for field in fields(Row)})
            row.require_types()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{file}, row {number} is not a row that teachers.caption wrote "
                f"({type(error).__name__}: {error}). Caption the images anew, with overwrite=True."
            ) from error
        rows[row.image_id] = row
    return rows


def append_rows(file: Path, batches: Iterable[Sequence[Row]], rows: dict[str, Row]) -> None:
    """Add the rows of images that have none, a batch at a time.

    Raises:
        ConfigError: the file cannot be written; the rows so far stay.
    """
    for batch in batches:
        new = [row for row in batch if row.image_id not in rows or _retried(row, rows)]
        try:
            with open(file, "ab") as stream:
                stream.write(b"".join(row.line() for row in new))
        except OSError as error:
            raise ConfigError(
                f"Cannot write {file}: {error.strerror or error}. The captions written so far are "
                "kept: make room, and the same call continues."
            ) from error
        rows |= {row.image_id: row for row in new}


def _retried(row: Row, rows: Mapping[str, Row]) -> bool:
    """Whether an image could not be read before and can be now."""
    return row.error is None and rows[row.image_id].error is not None
