from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capdistill.data import Flickr8k
from capdistill.data.flickr8k import LISTS
from capdistill.errors import DataError
from tests.data.data_pictures import picture

ROWS = [
    "1001.jpg#0\tA brown dog runs .",
    "1001.jpg#1\tA dog\trunning on grass .",
    "1001.jpg#2\tA dog is outside ,  alone .",
    "1001.jpg#3\t",
    "2258277193_586949ec62.jpg.1#0\tA man on a bike .",
    "",
    "my #1 dog.jpg#0\tA puppy \U0001f415 sleeps .",
    "1002.jpg#0\t\u4e00\u53ea \u72d7 \u5728 \u8349\u5730 \u4e0a .",
]
NAMES = ("1001.jpg", "my #1 dog.jpg", "1002.jpg")


def folder(root: Path, rows: list[str] = ROWS, images: str = "images") -> Path:
    """The token file as people really have it: byte-order mark, CRLF, no last newline."""
    for name in NAMES:
        picture(root / images / name)
    (root / "Flickr8k.token.txt").write_bytes(("\ufeff" + "\r\n".join(rows)).encode("utf-8"))
    return root


@pytest.mark.parametrize("images", ["Flicker8k_Dataset", "Images", "images", "."])
def test_the_token_file_gives_exactly_its_images_and_captions(tmp_path: Path, images: str) -> None:
    data = Flickr8k(folder(tmp_path, images=images)).all

    assert {name: len(texts) for name, texts in data.references.items()} == {
        "1001.jpg": 3,
        "my #1 dog.jpg": 1,
        "1002.jpg": 1,
    }
    assert data.references["1001.jpg"][1].split() == ["A", "dog", "running", "on", "grass", "."]
    assert data.references["my #1 dog.jpg"] == ("A puppy \U0001f415 sleeps .",)
    assert data.references["1002.jpg"] == (ROWS[-1].split("\t")[1],)
    assert not any(mark in text for text in data.captions for mark in "\ufeff\r")


def test_the_report_names_the_empty_row_and_the_phantom_image(tmp_path: Path) -> None:
    report = Flickr8k(folder(tmp_path)).report
    assert report.counts == {"empty caption": 1, "phantom row": 1}
    assert "row 4: empty caption (1001.jpg)" in str(report)
    assert "row 5: phantom row (2258277193_586949ec62.jpg.1, no such image)" in str(report)


def test_an_image_without_a_file_is_named_once(tmp_path: Path) -> None:
    rows = [*ROWS, "gone.jpg#0\tA dog .", "gone.jpg#1\tA cat ."]
    report = Flickr8k(folder(tmp_path, rows)).report
    assert report.counts["missing image"] == 1
    assert "row 9: missing image (gone.jpg)" in str(report)


def test_strict_reading_raises_the_first_problem_but_not_the_phantom(tmp_path: Path) -> None:
    good = [row for row in ROWS if not row.endswith("#3\t")]
    assert len(Flickr8k(folder(tmp_path, good), errors="raise").all) == 3
    with pytest.raises(DataError, match=r"row 4: empty caption \(1001\.jpg\)"):
        Flickr8k(folder(tmp_path), errors="raise")


def test_a_header_row_is_reported_as_row_1(tmp_path: Path) -> None:
    data = Flickr8k(folder(tmp_path, ["image_id\tcaptions", *ROWS]))
    assert len(data.all) == 3
    assert "row 1: header row" in str(data.report)


def test_rows_that_are_no_captions_are_reported(tmp_path: Path) -> None:
    report = Flickr8k(folder(tmp_path, [*ROWS, "1001.jpg#7 no tab", "who\tA dog ."])).report
    assert report.counts["malformed row"] == 2


def test_a_repeated_row_is_taken_once(tmp_path: Path) -> None:
    data = Flickr8k(folder(tmp_path, [*ROWS, ROWS[0], "1001.jpg#1\tAnother text ."]))
    assert data.report.counts["duplicate id"] == 2
    assert len(data.all.references["1001.jpg"]) == 4


def test_a_code_page_file_names_the_row_and_is_read_when_told(tmp_path: Path) -> None:
    folder(tmp_path)
    rows = ["1001.jpg#0\tA dog .", "1001.jpg#1\tA caf\u00e9 ."]
    (tmp_path / "Flickr8k.token.txt").write_bytes("\n".join(rows).encode("latin-1"))
    with pytest.raises(DataError, match=r"Flickr8k\.token\.txt, row 2: .*encoding="):
        Flickr8k(tmp_path)
    assert Flickr8k(tmp_path, encoding="latin-1").all.captions[1] == "A caf\u00e9 ."


def test_odd_line_separators_stay_within_their_caption(tmp_path: Path) -> None:
    rows = ["1001.jpg#0\ta\u2028b\x85c", "1002.jpg#0\td\x0ce\x1cf"]
    captions = sorted(Flickr8k(folder(tmp_path, rows)).all.captions)
    assert captions == ["a\u2028b\x85c", "d\x0ce\x1cf"]


def test_reading_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    program = (
        "import sys; from capdistill.data import Flickr8k\n"
        "data = Flickr8k(sys.argv[1]).all\n"
        "sys.stdout.buffer.write(repr(sorted(data.references.items())).encode('utf-8'))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(folder(tmp_path))]
    out = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert out.decode("utf-8") == repr(sorted(Flickr8k(tmp_path).all.references.items()))


def official(root: Path, **lists: list[str]) -> Path:
    folder(root, images="Flicker8k_Dataset")
    for split, names in lists.items():
        (root / LISTS[split]).write_text("\n".join(names) + "\n")
    return root


def test_the_official_lists_make_the_splits(tmp_path: Path) -> None:
    data = Flickr8k(official(tmp_path, train=["1001.jpg"], val=["1002.jpg"]))
    assert data.train.image_ids == ("1001.jpg",)
    assert data.val.image_ids == ("1002.jpg",)
    assert "official split; 1 image more in no list" in str(data)


def test_an_absent_split_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    data = Flickr8k(official(tmp_path, train=["1001.jpg"]))
    assert "test: absent, Flickr_8k.testImages.txt was not found" in str(data)
    with pytest.raises(DataError, match=r"no split 'test': Flickr_8k\.testImages\.txt was not"):
        data.test  # noqa: B018


def test_a_listed_split_without_its_images_hurts_only_when_asked_for(tmp_path: Path) -> None:
    data = Flickr8k(official(tmp_path, train=["1001.jpg"], test=["x.jpg", "y.jpg"]))
    assert len(data.train) == 1
    with pytest.raises(DataError, match=r"no image of Flickr_8k\.testImages\.txt is there"):
        data.test  # noqa: B018
    with pytest.raises(DataError, match=r"(?s)Flickr8k: no image with a caption.*x\.jpg"):
        Flickr8k(official(tmp_path / "b", test=["x.jpg"]))


def test_an_image_in_two_lists_or_in_none_of_the_files_is_reported(tmp_path: Path) -> None:
    data = Flickr8k(official(tmp_path, train=["1001.jpg"], val=["1002.jpg", "1001.jpg", "x.jpg"]))
    assert data.val.image_ids == ("1002.jpg",)
    assert data.report.counts["duplicate id"] == 1
    assert "row 3: image without caption or file (x.jpg)" in str(data.report)


def kaggle(root: Path, n: int) -> Path:
    for i in range(n):
        picture(root / "Images" / f"{i}.jpg", size=(4, 4))
    rows = "".join(f"{i}.jpg,A dog , number {i} .\n" for i in range(n))
    (root / "captions.txt").write_text("image,caption\n" + rows)
    return root


def test_kaggles_layout_is_split_by_a_seed_and_says_so(tmp_path: Path) -> None:
    data = Flickr8k(kaggle(tmp_path, 16), seed=3)
    sizes = {name: len(data.get(name)) for name in data}
    assert sizes == {"train": 12, "val": 2, "test": 2}
    assert "random split 6 : 1 : 1 with seed 3" in str(data)
    assert data.train.image_ids == Flickr8k(tmp_path, seed=3).train.image_ids
    assert data.train.image_ids != Flickr8k(tmp_path, seed=4).train.image_ids
    assert sorted(data.all.references["7.jpg"]) == ["A dog , number 7 ."]


def test_a_karpathy_file_beside_the_images_is_read(tmp_path: Path) -> None:
    splits = dict(zip(NAMES, ("train", "val", "test"), strict=True))
    entries = [
        {"filename": name, "split": split, "sentences": [{"raw": f"a dog in {split}"}]}
        for name, split in splits.items()
    ]
    folder(tmp_path)
    (tmp_path / "Flickr8k.token.txt").unlink()
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": entries}))
    data = Flickr8k(tmp_path)
    assert data.test.references == {"1002.jpg": ("a dog in test",)}


def test_a_folder_of_no_known_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of Flickr8k\.token\.txt"):
        Flickr8k(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        Flickr8k(tmp_path / "nowhere")


def test_images_that_are_elsewhere_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tA dog .\n")
    with pytest.raises(DataError, match=r"(?s)no image .* looked for in .*missing image \(1\.jpg"):
        Flickr8k(tmp_path)


def test_a_data_set_can_be_pickled(tmp_path: Path) -> None:
    data = Flickr8k(folder(tmp_path))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.all.references == data.all.references
    assert str(copy) == str(data)


@pytest.mark.shared
def test_the_real_flickr8k_has_its_known_size(shared: Callable[[str], Path]) -> None:
    data = Flickr8k(shared("data/flickr8k"))
    assert (len(data.train), len(data.train.captions)) == (6000, 30000)
    assert (len(data.val), len(data.val.captions)) == (1000, 5000)
    assert not data.report.problems
    assert data.val[0][0].shape == (3, 224, 224)
