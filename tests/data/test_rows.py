"""Rows of a Hugging Face data set, as `fit`, `evaluate` and `caption` take them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import capdistill as cd
from capdistill.data.images import read_image
from capdistill.data.rows import Rows, accept_rows
from capdistill.errors import ConfigError, DataError
from tests.training import tiny_models as tiny

SIDE = 8


class Table:
    """What matters of a `datasets.Dataset`: columns, rows, and that images decode when read."""

    def __init__(self, columns: dict[str, list[Any]], fingerprint: str | None = None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.decoded: list[int] = []
        if fingerprint is not None:
            self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            assert "image" not in key or key == "image_id", "the column of images was decoded"
            return self.columns[key]
        self.decoded.append(key)
        return {name: values[key] for name, values in self.columns.items()}

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


PICTURES = [picture(i) for i in range(3)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"caption": ["a", "b", "c"]}, [("a",), ("b",), ("c",)]),
        ({"captions": [["a", "b"], ["c"], ["d"]]}, [("a", "b"), ("c",), ("d",)]),
        ({"sentences": [[{"raw": "a", "tokens": ["x"]}], [{"raw": "b"}], []]}, [("a",), ("b",)]),
        ({"sentences": [{"raw": ["a", "b"]}, {"raw": "c"}, None]}, [("a", "b"), ("c",)]),
        (
            {"caption_0": ["a", "b", "c"], "caption_1": ["d", " ", None]},
            [("a", "d"), ("b",), ("c",)],
        ),
    ],
)
def test_captions_come_from_any_usual_form(columns: Any, expected: Any) -> None:
    data = Rows(Table({"image": PICTURES, **columns}))
    assert [example.captions for example in data.examples] == expected


def test_images_are_pillow_images_bytes_or_paths_and_the_same(tmp_path: Any) -> None:
    PICTURES[2].save(tmp_path / "2.png")
    mixed = [PICTURES[0], encoded(1), str(tmp_path / "2.png")]
    data = Rows(Table({"image": mixed, "caption": ["a", "b", "c"]}))
    for number in range(3):
        assert torch.equal(data[number][0], read_image(PICTURES[number]))
    assert torch.equal(read_image({"image": PICTURES[0], "id": 3}), read_image(PICTURES[0]))


def test_rows_with_one_image_id_are_one_image_and_its_first_row_is_read() -> None:
    table = Table({"image": PICTURES, "image_id": [7, 8, 7], "caption": ["a", "b", "c"]})
    data = Rows(table)
    assert table.decoded == []
    assert data.references == {"7": ("a", "c"), "8": ("b",)}
    assert torch.equal(data[0][0], read_image(PICTURES[0]))


def test_a_column_id_that_repeats_is_that_of_captions() -> None:
    assert Rows(Table({"image": PICTURES, "id": [1, 1, 2], "text": ["a", "b", "c"]})).image_ids == (
        "0",
        "1",
        "2",
    )
    assert Rows(Table({"image": PICTURES, "id": [5, 3, 2], "text": ["a", "b", "c"]})).image_ids == (
        "5",
        "3",
        "2",
    )


def test_columns_can_be_named_and_captions_left_out() -> None:
    table = Table({"photo": PICTURES, "alt": ["a", "b", "c"], "nr": ["x", "y", "z"]})
    with pytest.raises(DataError, match=r"columns are photo, alt, nr; expected any of image"):
        Rows(table)
    with pytest.raises(DataError, match=r"expected 'title' for the captions"):
        Rows(table, image="photo", captions="title")
    data = Rows(table, image="photo", captions="alt", image_id="nr")
    assert data.references == {"x": ("a",), "y": ("b",), "z": ("c",)}
    assert Rows(table, image="photo", captions=False).captions == []


def test_what_cannot_be_used_is_reported_by_row() -> None:
    data = Rows(Table({"image": [*PICTURES, b"no image"], "caption": ["a", 7, "nan", "d"]}))
    assert [problem.place for problem in data.report] == ["row 1", "row 2"]
    assert [problem.kind for problem in data.report] == ["invalid caption"] * 2
    loader = cd.data.Loader(data, tiny.TOKENIZER, image_size=SIDE)
    assert [batch.image_ids for batch in loader] == [("0",)]
    assert "row 3" in str(loader.skipped)


def test_a_run_takes_rows_as_they_are(tmp_path: Any) -> None:
    table = Table({"image": PICTURES, "caption": ["a red dog", "a blue cat", "a lime dog"]}, "f1")
    pairs = list(zip(PICTURES, table.columns["caption"], strict=True))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 2, "augment": False, **tiny.QUIET}
    losses = []
    for data in (pairs, table):
        student = tiny.make_student()
        history = cd.Trainer(student, **options).fit(data, data)
        losses.append([row["train"]["loss"] for row in history.epochs])
        result = cd.evaluate(student, data, metrics=["bleu"], measure=False, progress=False)
        assert len(result.captions) == 3
    assert losses[0] == losses[1]
    assert len(student.caption(table)) == 3
    curriculum = cd.data.Curriculum(table, "length")
    assert len(curriculum.ranking) == 3
    options |= {"cache_features": True, "cache_dir": str(tmp_path)}
    frozen = tiny.make_student(trainable=False)
    cd.Trainer(frozen, **options).fit(table)
    table.decoded.clear()
    cd.Trainer(tiny.make_student(trainable=False), **options).fit(table)
    assert table.decoded == []  # known by its fingerprint


def test_splits_and_streams_are_refused_with_the_fix() -> None:
    splits = type("DatasetDict", (), {"column_names": {"train": [], "test": []}})()
    with pytest.raises(ConfigError, match=r"splits train, test.*data\['train'\]"):
        accept_rows(splits)
    stream = type("IterableDataset", (), {"column_names": ["image"]})()
    with pytest.raises(ConfigError, match=r"streamed.*shards"):
        accept_rows(stream)
    for other in (None, "name", [1]):
        with pytest.raises(DataError, match="expected a data set of Hugging Face"):
            Rows(other)
