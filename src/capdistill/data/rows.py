"""Rows of a Hugging Face `datasets.Dataset`, which is used as it is: nothing is copied or written.

`datasets` is not imported: whatever has `column_names`, a length and items is such a data set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from capdistill.data.caption_files import DataReport, Policy, image_name, usable_captions
from capdistill.data.dataset import CaptionData, Example, require_some
from capdistill.data.image_names import StoredImage
from capdistill.errors import ConfigError, DataError, shortened

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "filepath", "path", "file")
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "sentences_raw",
    "sentences",
    "text",
    "txt",
    "raw",
    "comment",
)
_NUMBERED = re.compile(r"(caption|sentence|text)_?\d+")
_IDS = ("image_id", "img_id", "imgid", "cocoid", "filename", "file_name", "__key__", "id")
_WITHIN = ("raw", "caption", "text", "sentence")  # keys of a caption that is an object


def accept_rows(data: Any) -> Any:
    """`Rows` of a Hugging Face data set; anything else as it is.

    Example:
        >>> accept_rows([("dog.jpg", "a dog")])
        [('dog.jpg', 'a dog')]

    Raises:
        ConfigError: a data set of several splits, or one that is only streamed.
        DataError: as `Rows`.
    """
    columns = getattr(data, "column_names", None)
    if isinstance(data, CaptionData) or columns is None:
        return data
    if isinstance(columns, Mapping):
        raise ConfigError(
            f"{type(data).__name__} with the splits {', '.join(columns)} was given as data. Give "
            f"one of its splits, such as data[{next(iter(columns), 'train')!r}]."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ConfigError(
            f"{type(data).__name__} has no length and no items by number: it is streamed. Load it "
            "without streaming=True, or write it to shards once and read those."
        )
    return Rows(data)


class Rows(CaptionData):
    """Images and captions in the rows of a Hugging Face `datasets.Dataset`.

    `fit`, `evaluate` and the others take such a data set as it is; this class names its columns
    where their names do not tell. Rows with the same image id are captions of one image. Images are
    read when they are needed.

    Example:
        >>> import numpy as np
        >>> class Table:  # what matters of a datasets.Dataset
        ...     column_names = ["image", "sentences"]
        ...     rows = [{"image": np.zeros((8, 8), np.uint8), "sentences": ["a dog", "a pet"]}]
        ...     def __len__(self):
        ...         return len(self.rows)
        ...     def __getitem__(self, key):
        ...         return [r[key] for r in self.rows] if isinstance(key, str) else self.rows[key]
        >>> data = Rows(Table())
        >>> data.captions, data[0][0].shape
        (['a dog', 'a pet'], torch.Size([3, 8, 8]))

    Args:
        dataset: Its images may be decoded, `{"bytes": ..., "path": ...}`, or paths; its captions
            text, a list of texts, a list of objects with a text, or several columns (`caption_0`,
            `caption_1`, ...).
        image: The column of the images; by default one of the usual names.
        captions: The columns of the captions; by default those of the usual names. False for
            images without captions.
        image_id: The column of the ids; by default one of the usual names, or the number of the
            row.
        errors: "skip" leaves out what cannot be used and reports it; "raise" raises it.

    Raises:
        DataError: there is no such column, or nothing can be used.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image: str | None = None,
        captions: str | Sequence[str] | Literal[False] | None = None,
        image_id: str | None = None,
        errors: Policy = "skip",
    ) -> None:
        if not hasattr(dataset, "column_names"):
            raise DataError(
                f"Rows: {type(dataset).__name__} was given; expected a data set of Hugging Face "
                "datasets, with rows and column_names."
            )
        names = [str(name) for name in dataset.column_names]
        image = _column(names, image, _IMAGES, "image")
        texts = _caption_columns(names, captions)
        ids = _ids(dataset, names, image_id)
        report = DataReport(errors)
        name = str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "rows")
        found: dict[str, list[str]] = {}
        first_rows: dict[str, int] = {}
        for row, several in enumerate(_captions(dataset, texts)):
            usable = usable_captions(several, report, name, f"row {row}", ids[row])
            if usable or not texts:
                first_rows.setdefault(ids[row], row)
                found.setdefault(ids[row], []).extend(usable)
        examples = []
        for key, kept in found.items():
            stored = RowImage(dataset, first_rows[key], image, key)
            examples.append(Example(key, stored, kept) if kept else Example.unlabelled(key, stored))
        require_some(examples, name, report, f"Its columns are {', '.join(names)}.")
        super().__init__(examples, name=name, report=report)


class RowImage(StoredImage):
    """The image of a row.

    Args:
        dataset: The data set.
        row: Number of the row.
        column: Column of the image.
        name: The image's id, for messages.
    """

    def __init__(self, dataset: Any, row: int, column: str, name: str) -> None:
        self.dataset, self.row, self.column, self.name = dataset, row, column, name

    def load(self) -> Any:
        """The image as the data set gives it."""
        return self.dataset[self.row][self.column]

    def digest(self) -> str:
        """Of the data set's fingerprint and the row, or of the pixels if it has none."""
        fingerprint = getattr(self.dataset, "_fingerprint", None)
        if isinstance(fingerprint, str):
            return f"{fingerprint} {self.row} {self.column}"
        from capdistill.data.images import read_image

        pixels = read_image(self)
        about = hashlib.sha256(str(tuple(pixels.shape)).encode())
        about.update(pixels.contiguous().numpy().data)
        return about.hexdigest()[:32]

    def __str__(self) -> str:
        return f"row {self.row} ({self.name})"


def _column(names: list[str], given: str | None, usual: Iterable[str], what: str) -> str:
    if given is not None and given in names:
        return given
    found = next((name for name in usual if name in names), None) if given is None else None
    if found is not None:
        return found
    wanted = f"'{given}'" if given is not None else f"any of {', '.join(usual)}"
    raise DataError(
        f"The columns are {', '.join(names)}; expected {wanted} for the {what}. Name the column: "
        f"cd.data.Rows(dataset, {what}='...')."
    )


def _caption_columns(names: list[str], given: Any) -> list[str]:
    if given is False:
        return []
    if given is not None:
        several = [given] if isinstance(given, str) else list(given)
        return [_column(names, each, (), "captions") for each in several]
    numbered = [name for name in names if _NUMBERED.fullmatch(name)]
    return numbered or [_column(names, None, CAPTION_COLUMNS, "captions")]


def _ids(dataset: Any, names: list[str], given: str | None) -> list[str]:
    """The id of each row. "id" may be that of a caption, so it is taken if no two are equal."""
    if given is not None:
        _column(names, given, (), "image_id")
    column = given or next((name for name in _IDS if name in names), None)
    numbers = [str(row) for row in range(len(dataset))]
    if column is None:
        return numbers
    ids = [image_name(value) for value in dataset[column]]
    usable = [each for each in ids if each is not None]
    if given is None and (len(usable) < len(ids) or (column == "id" and len({*ids}) < len(ids))):
        return numbers
    if len(usable) < len(ids):
        row = ids.index(None)
        raise DataError(
            f"image_id='{column}': row {row} holds {shortened(dataset[column][row])}; expected "
            "text or a whole number."
        )
    return usable


def _captions(dataset: Any, columns: list[str]) -> Iterator[list[Any]]:
    """The captions of each row, read without its image."""
    if not columns:
        yield from ([] for _ in range(len(dataset)))
        return
    for values in zip(*(dataset[column] for column in columns), strict=True):
        yield [text for value in values for text in caption_texts(value)]


def caption_texts(value: Any) -> list[Any]:
    """The captions in a value: a text, a list, or objects that hold a text.

    Example:
        >>> caption_texts([{"raw": "a dog", "tokens": ["a", "dog"]}, "a pet"])
        ['a dog', 'a pet']
    """
    if isinstance(value, Mapping):  # {"raw": ..., "tokens": ...}, or lists of both
        key = next((key for key in _WITHIN if key in value), None)
        return [value] if key is None else caption_texts(value[key])
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in caption_texts(each)]
    return [value]
