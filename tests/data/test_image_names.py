"""From a name in a caption file to its image: the very name first, else a unique match."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from capdistill.data import CocoCaptions, Example, Flickr8k, Folder, Images, Karpathy
from capdistill.data.image_names import image_finder
from capdistill.errors import DataError
from tests.data.data_pictures import picture


def captioned(root: Path, *rows: str) -> Folder:
    (root / "captions.csv").write_text("image,caption\n" + "\n".join(rows))
    return Folder(root)


def test_names_without_suffix_and_numbers_are_found(tmp_path: Path) -> None:
    for name in ("00012.png", "dog.one.JPG", "images/7.webp"):
        picture(tmp_path / name)
    rows = ("00012,a dog", "12,a pet", "dog.one,a cat", "7,a bird", "007,a wing", "12.0,an animal")
    data = captioned(tmp_path, *rows)
    assert not data.report.problems
    assert {example.path.name: example.captions for example in data.examples} == {
        "00012.png": ("a dog", "a pet", "an animal"),
        "dog.one.JPG": ("a cat",),
        "7.webp": ("a bird", "a wing"),
    }
    assert data.image_ids == ("00012", "dog.one", "7")


@pytest.mark.parametrize("image", [12, "12", 12.0, "00012", "00012.png"])
def test_a_number_in_json_lines_finds_its_image(tmp_path: Path, image: Any) -> None:
    picture(tmp_path / "00012.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": image, "caption": "a dog"}))
    assert Folder(tmp_path).examples[0].path.name == "00012.png"


def test_a_number_in_coco_and_karpathy_files_finds_its_image(tmp_path: Path) -> None:
    picture(tmp_path / "val2014" / "000000000012.jpg")
    content: dict[str, Any] = {"images": [{"id": 12, "file_name": 12}]}
    content["annotations"] = [{"image_id": "12", "caption": "a dog"}]
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert CocoCaptions(tmp_path / "c.json", tmp_path / "val2014").image_ids == ("12",)

    entry = {"filename": 12, "filepath": "val2014", "split": "val", "sentences": ["a dog"]}
    (tmp_path / "k.json").write_text(json.dumps({"images": [entry]}))
    assert Karpathy(tmp_path / "k.json", tmp_path).val.image_ids == ("12",)


def test_an_ambiguous_name_is_named_with_its_matches(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "012.png", "0012.png", "b.jpg"):
        picture(tmp_path / name)
    data = captioned(tmp_path, "a,a dog", "12,a cat", "b,a bird")
    assert data.image_ids == ("b",)
    assert data.report.counts == {"ambiguous image": 2}
    assert "row 2: ambiguous image (a: a.jpg, a.png)" in str(data.report)


def test_the_very_name_wins_over_a_likely_one(tmp_path: Path) -> None:
    for name in ("12", "12.png", "012.png"):
        picture(tmp_path / "new.png").rename(tmp_path / name)
    data = captioned(tmp_path, "12,a dog", "012,a cat", "12.png,a bird")
    assert [example.path.name for example in data.examples] == ["12", "012.png", "12.png"]


@pytest.mark.parametrize("name", ["13", "00012.jpg", "do", "dog.jpg.1", "dog.jpeg", ".", "/"])
def test_another_image_is_never_taken(tmp_path: Path, name: str) -> None:
    for file in ("00012.png", "dog.jpg", "notes.txt"):
        picture(tmp_path / f"{file}.png").rename(tmp_path / file)
    assert image_finder(tmp_path)(name) == []
    assert image_finder(tmp_path)("notes") == []


def test_accents_match_however_they_are_stored(tmp_path: Path) -> None:
    picture(tmp_path / (unicodedata.normalize("NFD", "café") + ".png"))
    data = captioned(tmp_path, unicodedata.normalize("NFC", "café.png") + ",a dog")
    assert len(data) == 1


def test_names_are_found_in_a_locale_that_cannot_encode_them(tmp_path: Path) -> None:
    picture(tmp_path / "犬.png")
    (tmp_path / "captions.csv").write_text("image,caption\n犬.png,a dog\n", encoding="utf-8")
    code = (
        "import sys; from capdistill.data import Folder\n"
        "data = Folder(sys.argv[1]); print(len(data), tuple(data[0][0].shape))"
    )
    variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert out == "1 (3, 64, 64)\n"


def test_lists_of_flickr8k_may_lack_the_suffix(tmp_path: Path) -> None:
    for name in ("1001.jpg", "1002.jpg"):
        picture(tmp_path / "Images" / name)
    (tmp_path / "Flickr8k.token.txt").write_text("1001.jpg#0\tA dog .\n1002#0\tA cat .\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("1001\n1002.jpg\n")
    data = Flickr8k(tmp_path)
    assert data.train.captions == ["A dog .", "A cat ."]


JSON_NO_NAMES: list[Any] = [None, float("nan"), ["a.jpg"], {}, True, ""]


@pytest.mark.parametrize("value", JSON_NO_NAMES, ids=repr)
def test_what_is_no_name_is_a_malformed_row(tmp_path: Path, value: Any) -> None:
    picture(tmp_path / "a.jpg")
    rows = [{"image": value, "caption": "x"}, {"image": "a.jpg", "caption": "a dog"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Folder(tmp_path).report.counts == {"malformed row": 1}

    images = [{"id": value, "file_name": "b.jpg"}, {"id": 1, "file_name": "a.jpg"}]
    images.append({"id": 2, "file_name": value})
    annotations = [{"image_id": 1, "caption": "a dog"}, {"image_id": value, "caption": "x"}]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "c.json").write_text(json.dumps(content))
    report = CocoCaptions(tmp_path / "c.json", tmp_path).report
    assert report.counts == {"malformed row": 2, "caption without image": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"filename": None},
        {"cocoid": None},
        {"cocoid": [1]},
        {"sentences": None},
        {"sentences": "a dog"},
        {"sentences": {"raw": "a dog"}},
        {"filepath": 3},
    ],
    ids=repr,
)
def test_a_karpathy_entry_of_another_form_is_a_malformed_row(tmp_path: Path, change: Any) -> None:
    picture(tmp_path / "a.jpg")
    good = {"filename": "a.jpg", "split": "train", "sentences": ["a dog"], "cocoid": 1}
    content = {"images": [good, {**good, "cocoid": 2, **change}]}
    (tmp_path / "k.json").write_text(json.dumps(content))
    data = Karpathy(tmp_path / "k.json", tmp_path)
    assert data.train.captions == ["a dog"]
    assert data.report.counts == {"malformed row": 1}


@pytest.mark.parametrize("split", [None, ["train"], {}, 3])
def test_a_split_of_another_type_is_unknown(tmp_path: Path, split: Any) -> None:
    picture(tmp_path / "a.jpg")
    good = {"filename": "a.jpg", "split": "train", "sentences": ["a dog"], "cocoid": 1}
    content = {"images": [good, {**good, "cocoid": 2, "split": split}]}
    (tmp_path / "k.json").write_text(json.dumps(content))
    assert Karpathy(tmp_path / "k.json", tmp_path).report.counts == {"unknown split": 1}


READERS = [
    Folder,
    Flickr8k,
    lambda path: Folder(".", path),
    lambda path: CocoCaptions(path, "."),
    lambda path: CocoCaptions("c.json", path),
    lambda path: Karpathy(path, "."),
    lambda path: Karpathy("k.json", path),
    lambda path: Example("7", path, ["a dog"]),
]


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "", None, 3, b"data"], ids=repr)
@pytest.mark.parametrize("read", READERS, ids=range(len(READERS)))
def test_what_cannot_be_a_path_is_our_error_in_every_reader(read: Any, path: Any) -> None:
    if path is None and read is READERS[2]:
        return  # the usual names
    with pytest.raises(DataError):
        read(path)


def test_every_reader_expands_the_home_directory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "a.jpg")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}]}
    rows = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
    (tmp_path / "c.json").write_text(json.dumps({**content, **rows}))
    entry = {"filename": "a.jpg", "split": "train", "sentences": ["a dog"]}
    (tmp_path / "k.json").write_text(json.dumps({"images": [entry]}))
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,a dog\n")
    assert len(CocoCaptions("~/c.json", "~")) == 1
    assert len(Karpathy("~/k.json", "~").train) == 1
    assert len(Folder("~")) == len(Folder("~", "~/captions.csv")) == 1
    assert len(Flickr8k("~").train) == 1
    assert Example("7", "~/a.jpg", ["a dog"]).path == tmp_path / "a.jpg"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_or_folder_named_like_an_image_is_none(tmp_path: Path) -> None:
    picture(tmp_path / "dog.jpg")
    os.mkfifo(tmp_path / "cat.jpg")
    (tmp_path / "cow.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    assert Images(tmp_path).image_ids == ("dog.jpg", "gone.jpg")  # the last is reported when read
    assert captioned(tmp_path, "dog,a dog", "cat,a cat", "cow,a cow").image_ids == ("dog",)


def test_a_name_in_another_case_is_found_where_one_file_matches(tmp_path: Path) -> None:
    for name in ("A.JPG", "b.jpg", "B.jpg"):
        picture(tmp_path / name)
    data = captioned(tmp_path, "a.jpg,a dog", "b.jpg,a cat", "B.JPG,a bird")
    assert [example.path.name for example in data.examples] == ["A.JPG", "b.jpg"]
    assert data.report.counts == {"ambiguous image": 1}


def test_a_name_from_windows_is_found(tmp_path: Path) -> None:
    picture(tmp_path / "summer" / "a.jpg")
    data = captioned(tmp_path, "summer\\a.jpg,a dog")
    assert data.examples[0].path == tmp_path / "summer" / "a.jpg"
    with pytest.raises(DataError, match="missing image"):
        captioned(tmp_path / "summer", "..\\summer\\a.jpg,a dog")


def test_a_path_out_of_the_folder_is_called_so(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"a\.jpg: outside of the folder of the images"):
        captioned(tmp_path / "data", f"{tmp_path / 'elsewhere' / 'a.jpg'},a dog")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "far" / "a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "data")
    assert Images(tmp_path / "data").image_ids == ("link/a.jpg",)
