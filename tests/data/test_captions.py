"""What counts as a caption, at every door: each reader, `Example`, `CaptionData`, `Batch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capdistill.data import CocoCaptions, Example, Flickr8k, Folder, Karpathy
from capdistill.data.caption_files import caption_problem
from capdistill.errors import DataError
from tests.data.data_pictures import picture

NAN = float("nan")
NO_TEXT = [None, NAN, 3, True, {"raw": "a dog"}, ["a dog", "a cat"], "['a dog', 'a cat']", "nan"]
PRINTED = ["['a dog', 'a cat']", "{'raw': 'a dog'}", "None", "nan", "NaN", "<NA>", "b'a dog'"]
Reader = Callable[..., Any]


def coco(root: Path, captions: list[Any], **options: Any) -> Any:
    annotations = [{"image_id": 1, "caption": caption} for caption in captions]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": annotations}
    (root / "coco.json").write_text(json.dumps(content))
    return CocoCaptions(root / "coco.json", root, **options)


def karpathy(root: Path, captions: list[Any], **options: Any) -> Any:
    sentences = [{"raw": caption, "tokens": ["a", "token"]} for caption in captions]
    content = {"images": [{"filename": "a.jpg", "split": "train", "sentences": sentences}]}
    (root / "k.json").write_text(json.dumps(content))
    return Karpathy(root / "k.json", root, **options).train


def sentences(root: Path, captions: list[Any], **options: Any) -> Any:
    content = {"images": [{"filename": "a.jpg", "split": "train", "sentences": captions}]}
    (root / "k.json").write_text(json.dumps(content))
    return Karpathy(root / "k.json", root, **options).train


def json_lines(root: Path, captions: list[Any], **options: Any) -> Any:
    rows = [{"image": "a.jpg", "caption": [[c]] if isinstance(c, list) else c} for c in captions]
    (root / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Folder(root, "c.jsonl", **options)


def json_list(root: Path, captions: list[Any], **options: Any) -> Any:
    (root / "c.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": captions}))
    return Folder(root, "c.jsonl", **options)


def comma_separated(root: Path, captions: list[Any], **options: Any) -> Any:
    rows = "".join(f'a.jpg,"{caption}"\n' for caption in captions)
    (root / "c.csv").write_text("image,caption\n" + rows)
    return Folder(root, "c.csv", **options)


def tokens(root: Path, captions: list[Any], **options: Any) -> Any:
    rows = "".join(f"a.jpg#{n}\t{caption}\n" for n, caption in enumerate(captions))
    (root / "Flickr8k.token.txt").write_text(rows)
    return Flickr8k(root, **options).train


OF_JSON = [coco, karpathy, sentences, json_lines, json_list]
OF_TEXT = [comma_separated, tokens]
CASES = [(reader, value) for reader in OF_JSON for value in NO_TEXT]
CASES += [(reader, value) for reader in OF_TEXT for value in PRINTED]
CASES = [(r, v) for r, v in CASES if not (r is sentences and isinstance(v, dict))]


@pytest.mark.parametrize(
    ("read", "value"), CASES, ids=lambda case: getattr(case, "__name__", repr(case))
)
def test_what_is_not_text_is_no_caption_in_any_reader(
    tmp_path: Path, read: Reader, value: Any
) -> None:
    picture(tmp_path / "a.jpg")
    data = read(tmp_path, ["a good dog", value])
    assert data.captions == ["a good dog"]
    assert data.report.counts == {"invalid caption": 1}
    (problem,) = data.report
    assert "a.jpg" in problem.detail
    assert problem.place
    with pytest.raises(DataError, match="invalid caption"):
        read(tmp_path, ["a good dog", value], errors="raise")


@pytest.mark.parametrize("read", [*OF_JSON, *OF_TEXT], ids=lambda read: read.__name__)
def test_an_image_without_any_caption_is_not_data(tmp_path: Path, read: Reader) -> None:
    picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"(?s)no image with a caption.*1 invalid caption"):
        read(tmp_path, ["None" if read in OF_TEXT else None])


@pytest.mark.parametrize("text", ["[a dog]", "nan bread on a plate", "a nan", "No dog", "(1)", "x"])
def test_odd_text_is_a_caption(text: str) -> None:
    assert caption_problem(text) is None


@pytest.mark.parametrize("value", [*NO_TEXT, *PRINTED, "", " \n"], ids=repr)
def test_an_example_takes_text_only(value: Any) -> None:
    with pytest.raises(DataError, match="image '7'"):
        Example("7", Path("a.jpg"), ("a dog", value))


@pytest.mark.parametrize("captions", ["a dog", None, {"a dog": 1}, ()], ids=repr)
def test_an_example_takes_a_list_of_captions(captions: Any) -> None:
    with pytest.raises(DataError, match="image '7'"):
        Example("7", Path("a.jpg"), captions)


@pytest.mark.parametrize("image_id", [None, NAN, "", " ", True, ["7"]], ids=repr)
def test_an_example_has_a_name(image_id: Any) -> None:
    with pytest.raises(DataError, match="is not a name"):
        Example(image_id, Path("a.jpg"), ["a dog"])


def test_tokens_stand_for_a_missing_raw_text_and_are_text_themselves(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    data = sentences(tmp_path, [{"tokens": ["a", "cat"]}, {"tokens": ["a", 3]}, {}, {"tokens": 3}])
    assert data.captions == ["a cat"]
    assert data.report.counts == {"invalid caption": 3}
