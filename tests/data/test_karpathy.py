from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capdistill.data import CaptionData, Karpathy, Loader
from capdistill.errors import DataError
from capdistill.tokenizer import WordTokenizer
from tests.data.data_pictures import picture

IMAGES = [
    ("a.jpg", "train2014", "train", 9, 5),
    ("b.jpg", "val2014", "restval", 25, 7),
    ("c.jpg", "val2014", "val", 30, 1),
    ("d.jpg", None, "test", 34, 4),
    ("e.jpg", "val2014", "restval", 36, 1),
]


def entry(name: str, folder: str | None, split: str, cocoid: int, n: int) -> dict[str, Any]:
    raw = [f"w{i} {name[0]}" for i in range(n)]
    made: dict[str, Any] = {"filename": name, "split": split, "cocoid": cocoid}
    made["sentences"] = [{"raw": text, "tokens": text.split()} for text in raw]
    return made if folder is None else {**made, "filepath": folder}


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    for name, folder, *_ in IMAGES:
        picture(tmp_path / "coco" / (folder or "") / name, size=(8, 8))
    return store(tmp_path, [entry(*row) for row in IMAGES])


def store(root: Path, images: list[Any]) -> Path:
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    return root / "dataset_coco.json"


def size(data: CaptionData) -> tuple[int, int]:
    return len(data), len(data.captions)


def test_restval_belongs_to_training(json_file: Path) -> None:
    data = Karpathy(json_file, json_file.parent / "coco")
    assert data.train.image_ids == ("9", "25", "36")
    assert (size(data.train), size(data.val), size(data.test)) == ((3, 13), (1, 1), (1, 4))
    assert "restval in train" in str(data)
    assert "train: 3 images, 13 captions" in data.summary()


def test_restval_is_left_out_when_asked(json_file: Path) -> None:
    data = Karpathy(json_file, json_file.parent / "coco", restval=False)
    assert size(data.train) == (1, 5)
    assert size(data.val) == (1, 1)


def test_files_are_found_with_and_without_their_folder(json_file: Path) -> None:
    data = Karpathy(json_file, json_file.parent / "coco")
    assert data.train.examples[1].path == json_file.parent / "coco" / "val2014" / "b.jpg"
    assert data.test.examples[0].path == json_file.parent / "coco" / "d.jpg"


def test_images_of_unequal_caption_numbers_make_a_batch(
    json_file: Path, tokenizer: WordTokenizer
) -> None:
    train = Karpathy(json_file, json_file.parent / "coco").train
    (batch,) = Loader(train, tokenizer, image_size=8, train=True, captions_per_image=5)
    assert batch.captions_per_image == 5
    for n, image_id in enumerate(batch.image_ids):
        chosen = batch.captions[5 * n : 5 * n + 5]
        assert len(set(chosen)) == min(5, len(train.references[image_id]))


def test_over_the_epochs_every_caption_is_used(json_file: Path, tokenizer: WordTokenizer) -> None:
    train = Karpathy(json_file, json_file.parent / "coco").train
    loader = Loader(train, tokenizer, image_size=8, train=True, captions_per_image=2)
    used = {text for n in range(50) for batch in loader.epoch(n) for text in batch.captions}
    assert used == set(train.captions)


def test_evaluation_has_all_references(json_file: Path, tokenizer: WordTokenizer) -> None:
    data = Karpathy(json_file, json_file.parent / "coco")
    (batch,) = Loader(data.train, tokenizer, image_size=8)
    assert batch.references is not None
    assert [len(texts) for texts in batch.references] == [5, 7, 1]
    (batch,) = Loader(data.val, tokenizer, image_size=8)
    assert batch.references == (("w0 c",),)
    assert batch.captions_per_image == 1


def test_bad_entries_are_reported_by_their_place(json_file: Path) -> None:
    images = [
        entry(*IMAGES[0]),
        entry("a.jpg", "train2014", "val", 9, 2),
        entry("b.jpg", "val2014", "other", 25, 2),
        entry("b.jpg", "val2014", "train", 26, 0),
        {"filename": "c.jpg"},
        "text",
        {**entry(*IMAGES[2]), "sentences": [{"raw": " "}, {"tokens": ["a", "cat"]}, 7]},
    ]
    data = Karpathy(store(json_file.parent, images), json_file.parent / "coco")
    assert data.report.counts == {
        "duplicate id": 1,
        "unknown split": 1,
        "image without caption": 1,
        "malformed row": 2,
        "empty caption": 1,
        "invalid caption": 1,
    }
    assert "images[4]: malformed row (no split, sentences)" in str(data.report)
    assert data.val.captions == ["a cat"]


def test_file_names_are_the_ids_without_coco_ids(json_file: Path) -> None:
    made = entry(*IMAGES[0])
    del made["cocoid"]
    data = Karpathy(store(json_file.parent, [made]), json_file.parent / "coco")
    assert data.train.image_ids == ("a.jpg",)


@pytest.mark.parametrize("content", ["[]", '{"images": {}}', '{"annotations": []}', "{"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json"):
        Karpathy(tmp_path / "x.json", tmp_path)
