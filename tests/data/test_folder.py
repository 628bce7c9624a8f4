from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capdistill.data import Folder
from capdistill.data.caption_files import DataReport
from capdistill.data.folder import separated_rows
from capdistill.errors import DataError
from tests.data.data_pictures import picture

CHINESE = "\u4e00\u53ea\u72d7\u5728\u5954\u8dd1 \U0001f415"
TEXT = (
    '\ufeffimage,caption\r\n1.jpg,"A man , a hat and a dog ."\r\n'
    '1.jpg,"He said ""sit"" to the dog ."\r\n'
    f'2.jpg,"first line\r\nsecond line"\r\n2.jpg,{CHINESE}\r\n'
)
REFERENCES = {
    "1.jpg": ("A man , a hat and a dog .", 'He said "sit" to the dog .'),
    "2.jpg": ("first line second line", CHINESE),
}


def folder(root: Path, text: str, name: str = "captions.csv") -> Path:
    for image in ("1.jpg", "2.jpg"):
        picture(root / image, size=(4, 4))
    (root / name).write_bytes(text.encode("utf-8"))
    return root


def test_quotes_commas_and_line_breaks_are_read_as_written(tmp_path: Path) -> None:
    data = Folder(folder(tmp_path, TEXT))
    assert data.references == REFERENCES
    assert not data.report.problems


def test_an_unquoted_comma_keeps_the_whole_rest(tmp_path: Path) -> None:
    data = Folder(folder(tmp_path, TEXT + "1.jpg,A dog , two cats and a bird .\r\n"))
    assert data.references["1.jpg"][-1] == "A dog , two cats and a bird ."


def test_an_unquoted_comma_beside_a_third_column_is_refused_by_row(tmp_path: Path) -> None:
    text = "image,caption,score\n1.jpg,A dog,1\n1.jpg,A dog , two cats,1\n"
    data = Folder(folder(tmp_path, text))
    assert data.captions == ["A dog"]
    assert "row 3: malformed row (4 columns, expected 3" in str(data.report)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_are_recognised(tmp_path: Path, delimiter: str) -> None:
    lines = ["image,caption", '1.jpg,"A man , a hat and a dog ."']
    text = lines[0].replace(",", delimiter) + "\n" + lines[1].replace(",", delimiter, 1)
    data = Folder(folder(tmp_path, text))
    assert data.captions == ["A man , a hat and a dog ."]


def test_columns_go_by_name_not_by_place(tmp_path: Path) -> None:
    text = 'caption,score,image\n"A dog , alone",7,1.jpg\n'
    assert Folder(folder(tmp_path, text)).references == {"1.jpg": ("A dog , alone",)}


def test_a_caption_column_first_keeps_its_unquoted_commas(tmp_path: Path) -> None:
    text = "Caption , Image\nA dog , two cats,1.jpg\n"
    assert Folder(folder(tmp_path, text)).references == {"1.jpg": ("A dog , two cats",)}


def test_the_flickr30k_file_is_read_but_for_its_odd_row(tmp_path: Path) -> None:
    text = "image_name| comment_number| comment\n1.jpg| 0| A man .\n1.jpg| 4   A dog .\n"
    data = Folder(folder(tmp_path, text, "results.csv"), "results.csv")
    assert data.captions == ["A man ."]
    assert "row 3: malformed row (2 columns, expected 3" in str(data.report)


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: the columns found are 'photo,words'"):
        Folder(folder(tmp_path, "photo,words\n1.jpg,a\n"))


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1.*1\.jpg,A dog.*Add such a first row"):
        Folder(folder(tmp_path, "1.jpg,A dog\n2.jpg,A cat\n"))


def test_json_lines_give_one_caption_or_several(tmp_path: Path) -> None:
    rows = [
        {"image": "1.jpg", "caption": "a\u2028b"},
        {"file_name": "2.jpg", "text": ["c", "d\ne"]},
        {"image": "1.jpg"},
        [1],
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n{broken\n"
    data = Folder(folder(tmp_path, text, "captions.jsonl"))
    assert data.references == {"1.jpg": ("a\u2028b",), "2.jpg": ("c", "d e")}
    assert [problem.place for problem in data.report] == ["row 3", "row 4", "row 5"]


def test_images_may_stand_in_a_folder_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "3.jpg")
    data = Folder(folder(tmp_path, "image,caption\n3.jpg,a dog\n"), "captions.csv")
    assert data.examples[0].path == tmp_path / "images" / "3.jpg"


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "sub/../../secret.jpg", ""])
def test_names_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.jpg")
    root = folder(tmp_path / "data" / "sub", f"image,caption\n1.jpg,a\n{name},b\n")
    assert Folder(root).report.counts == {"missing image": 1}


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of captions\.csv"):
        Folder(tmp_path)
    with pytest.raises(DataError, match=r"captions\.csv, row 1"):
        Folder(folder(tmp_path, ""))
    with pytest.raises(DataError, match="no image with a caption"):
        Folder(folder(tmp_path, "image,caption\n"))


unquoted = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1).filter(
    lambda caption: not caption.lstrip(" ").startswith('"')
)


@given(st.lists(unquoted, max_size=5))
def test_captions_without_quotes_survive_whole(captions: list[str]) -> None:
    text = "image,caption\n" + "".join(f"1.jpg,{caption}\n" for caption in captions)
    assert [row.caption for row in separated_rows(Path("c.csv"), text, DataReport())] == captions


ROWS = [{"image": "1.jpg", "caption": ["A dog", "A pet"]}, {"image": "2.jpg", "caption": "A cat"}]


def test_a_json_file_may_hold_a_list_of_rows(tmp_path: Path) -> None:
    content = json.dumps([*ROWS, {"image": "3.jpg"}])
    data = Folder(folder(tmp_path, content, "captions.json"))
    assert data.references == {"1.jpg": ("A dog", "A pet"), "2.jpg": ("A cat",)}
    assert "captions.json, [2]: malformed row" in str(data.report)


def test_a_json_file_of_another_form_is_sent_to_its_reader(tmp_path: Path) -> None:
    content = json.dumps({"images": [], "annotations": []})
    with pytest.raises(DataError, match=r"the keys \['images', 'annotations'\].*CocoCaptions"):
        Folder(folder(tmp_path, content, "captions.json"))


def test_a_row_of_json_lines_that_is_not_json_says_why(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(row) + "," * (number == 0) for number, row in enumerate(ROWS))
    data = Folder(folder(tmp_path, content, "captions.jsonl"))
    assert "row 1: malformed row" in str(data.report)
    assert "is not JSON (Extra data" in str(data.report)
