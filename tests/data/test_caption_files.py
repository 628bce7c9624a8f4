from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capdistill.data.caption_files import clean, lines, parse_json, read_text, split_fields
from capdistill.errors import ConfigError, DataError

ODD = "\u2028\x85\x0c\x1c\x0b"
cells = st.text(st.sampled_from('ab ",;\n\t#é犬' + ODD), min_size=1, max_size=8)


@given(st.lists(st.lists(cells, min_size=2, max_size=4), max_size=5), st.sampled_from(",;\t"))
def test_what_a_spreadsheet_writes_is_read_back(rows: list[list[str]], delimiter: str) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    wanted = [row for row in rows if any(cell.strip() for cell in row)]
    assert [fields for _, fields in split_fields(file.getvalue(), delimiter)] == wanted


@given(st.text(st.sampled_from('a",\r\n '), max_size=40))
def test_no_text_of_cells_is_lost_or_hangs(text: str) -> None:
    fields = [cell for _, row in split_fields(text, ",") for cell in row]
    assert sum(cell.count("a") for cell in fields) == text.count("a")


def test_a_stray_quote_does_not_swallow_the_rows_below() -> None:
    text = '1.jpg,"A dog\n2.jpg,"A cat"\n3.jpg,"Sit" says he\n'
    rows = [fields for _, fields in split_fields(text, ",")]
    assert rows == [["1.jpg", '"A dog'], ["2.jpg", "A cat"], ["3.jpg", '"Sit" says he']]


def test_rows_are_numbered_by_their_first_line() -> None:
    text = 'a,"x\r\ny"\r\n\r\nb,z'
    assert [number for number, _ in split_fields(text, ",")] == [1, 4]


def test_rows_end_at_line_feeds_only() -> None:
    text = f"a{ODD}b\r\nc\rd\n\n e"
    assert list(lines(text)) == [(1, f"a{ODD}b"), (2, "c\rd"), (4, " e")]


def test_a_raw_caption_keeps_every_character_but_line_breaks() -> None:
    assert clean(f" a{ODD}b\tc\r\nd\n\ne ") == f"a{ODD}b\tc d e"


def test_a_wrong_encoding_names_file_row_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("one\ntwo\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"captions\.txt, row 3: byte 0xe9 .* encoding='cp1252'"):
        read_text(path)
    assert read_text(path, "latin-1").split("\n")[2] == "caf\u00e9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(("" if encoding != "utf-8" else "\ufeff").encode() + "image".encode(encoding))
    assert read_text(path, encoding) == "image"


def test_an_unknown_encoding_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="encoding='utf8000'"):
        read_text(tmp_path / "a.txt", "utf8000")


@pytest.mark.parametrize("text", ["{", "[" * 200_000, ""])
def test_what_is_not_json_is_named(text: str) -> None:
    with pytest.raises(DataError, match=r"x\.json is not JSON"):
        parse_json(text, "x.json")


def test_a_missing_caption_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        read_text(tmp_path / "none.txt")


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_the_mark_of_utf_16_decides_where_nothing_was_said(tmp_path: Path, order: str) -> None:
    (tmp_path / "a.json").write_bytes('\ufeff["é"]'.encode(order))
    assert read_text(tmp_path / "a.json") == '["é"]'


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x1f\x8b\x08", b"\xd0\xcf\x11\xe0"])
def test_a_packed_file_is_called_so(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(start + b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.csv is (a|compressed) .*, not text\. Unpack"):
        read_text(tmp_path / "a.csv")
