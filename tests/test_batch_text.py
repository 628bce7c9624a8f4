"""A `Batch` that a user makes: captions and references are text, ids are names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from capdistill.errors import DataError
from capdistill.outputs import Batch, part


def batch(**changes: Any) -> Batch:
    values: dict[str, Any] = {
        "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "captions": ("a dog", ""),
        "image_ids": ("1", "2"),
        "references": (("a dog", "the dog"), ("a cat", "")),
    }
    return Batch(**{**values, **changes})


NO_TEXT = [None, float("nan"), 3, ["a dog"], {"raw": "a dog"}, "['a dog', 'a cat']", b"a dog"]


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_captions_and_references_are_text(value: Any) -> None:
    with pytest.raises(DataError, match="Batch: a caption of image '2' is"):
        batch(captions=("a dog", value))
    with pytest.raises(DataError, match="Batch: a reference of image '2' is"):
        batch(references=(("a dog",), ("a cat", value)))


@pytest.mark.parametrize("references", [("a dog", "a cat"), (("a dog",), None), (("a",), 3)])
def test_references_are_a_tuple_of_texts_per_image(references: Any) -> None:
    with pytest.raises(DataError, match="the references of image"):
        batch(references=references)


def test_every_image_has_its_references() -> None:
    with pytest.raises(DataError, match="references of 1 images for 2 images"):
        batch(references=(("a dog",),))


@pytest.mark.parametrize("ids", ["12", (1, 2), ("1", None)], ids=repr)
def test_image_ids_are_strings(ids: Any) -> None:
    with pytest.raises(DataError, match=r"image_ids are .*expected strings"):
        batch(image_ids=ids)


def test_a_good_batch_can_be_moved_and_cut() -> None:
    assert batch().to("cpu").references == batch().references
    assert part(batch(), 1, 2).references == (("a cat", ""),)
    assert batch(captions=["a dog", "a cat"], references=[["a"], ["b"]]).num_images == 2
