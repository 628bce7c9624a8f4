from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capdistill.data import CocoCaptions, sample
from capdistill.errors import DataError
from tests.data.data_pictures import picture


def coco(root: Path, images: list[Any], annotations: list[Any]) -> Path:
    content = {"images": images, "annotations": annotations}
    (root / "captions_val2017.json").write_text(json.dumps(content))
    return root / "captions_val2017.json"


def image(image_id: int, name: str) -> dict[str, Any]:
    return {"id": image_id, "file_name": name}


def caption(image_id: int, text: str) -> dict[str, Any]:
    return {"id": 1, "image_id": image_id, "caption": text}


def test_captions_join_their_images_by_id(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    path = coco(
        tmp_path,
        [image(7, "a.jpg"), image(9, "b.jpg")],
        [caption(9, "a cat"), caption(7, "a\ndog "), caption(9, "a pet")],
    )
    data = CocoCaptions(path, tmp_path)
    assert data.references == {"9": ("a cat", "a pet"), "7": ("a dog",)}
    assert str(data) == "captions_val2017: 2 images, 3 captions"


def test_each_problem_is_named_by_its_entry(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    path = coco(
        tmp_path,
        [image(7, "a.jpg"), image(7, "again.jpg"), image(8, "gone.jpg"), {"id": 3}],
        [caption(7, "a dog"), caption(99, "nothing"), caption(7, " "), caption(8, "x"), None],
    )
    report = str(CocoCaptions(path, tmp_path).report)
    assert "images[1]: duplicate id (7, again.jpg)" in report
    assert "images[3]: malformed row (no file_name)" in report
    assert "annotations[1]: caption without image (image id 99)" in report
    assert "annotations[2]: empty caption (a.jpg)" in report
    assert "annotations[3]: missing image (gone.jpg)" in report
    assert "annotations[4]: malformed row" in report
    with pytest.raises(DataError, match="duplicate id"):
        CocoCaptions(path, tmp_path, errors="raise")


def test_an_image_that_nobody_captioned_is_reported(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    images = [image(1, "a.jpg"), image(2, "b.jpg")]
    data = CocoCaptions(coco(tmp_path, images, [caption(1, "a dog")]), tmp_path)
    assert "image without caption (b.jpg)" in str(data.report)


def test_a_karpathy_file_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text('{"images": [], "dataset": "coco"}')
    with pytest.raises(DataError, match=r"k\.json: not a COCO captions file; .*'dataset'"):
        CocoCaptions(tmp_path / "k.json", tmp_path)


def test_the_sample_has_its_photos_captions_and_attribution() -> None:
    data = sample()
    assert (len(data.train), len(data.val)) == (39, 8)
    assert not set(data.train.image_ids) & set(data.val.image_ids)
    assert all(len(texts) == 5 for texts in data.all.references.values())
    folder = data.train.examples[0].path.parent.parent
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    content = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    for entry in content["images"]:
        assert entry["file_name"] in attribution
        assert entry["flickr_url"] in attribution
        assert entry["license"] == 4
    assert sum(file.stat().st_size for file in folder.rglob("*.*")) < 900_000


def test_every_photo_of_the_sample_can_be_read() -> None:
    assert not sample().all.verify().problems


@pytest.mark.shared
def test_the_full_size_photos_give_the_same_captions(shared: Callable[[str], Path]) -> None:
    root = shared("data/coco_ccby")
    data = CocoCaptions(root / "captions.json", root / "images", errors="raise")
    assert {k: sorted(v) for k, v in data.references.items()} == {
        k: sorted(v) for k, v in sample().all.references.items()
    }
