from __future__ import annotations

import json
from pathlib import Path

import pytest

from capdistill import Captioner
from capdistill.cli import main


def test_caption_prints_path_tab_caption(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(student / "best"), *photos]) == 0
    expected = Captioner.load(student / "best").caption(photos)
    pairs = zip(photos, expected, strict=True)
    assert capsys.readouterr().out == "".join(f"{path}\t{text}\n" for path, text in pairs)


def test_a_bad_image_is_named_and_the_others_are_captioned(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, absent = tmp_path / "page.jpg", tmp_path / "absent.jpg"
    page.write_text("<html>404</html>")
    images = [photos[0], str(page), str(absent), photos[1]]
    assert main(["caption", str(student / "best"), *images, "--batch-size", "2"]) == 1
    shown = capsys.readouterr()
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == photos
    assert str(page) in shown.err
    assert str(absent) in shown.err
    assert "2 of 4 images" in shown.err


def test_caption_as_json_holds_captions_and_errors(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    assert main(["caption", str(student / "best"), photos[0], str(empty), "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert good["image"] == photos[0]
    assert isinstance(good["caption"], str)
    assert "empty" in bad["error"]


def test_an_unknown_device_is_refused(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(student / "best"), photos[0], "--device", "gpu"]) == 1
    assert "Use 'auto', 'cpu'" in capsys.readouterr().err


def test_options_of_decoding_are_those_of_caption(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--beam-size", "3", "--num-return", "2", "--max-length", "5", "--json", "--details"]
    assert main(["caption", str(student / "best"), *photos, *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = Captioner.load(student / "best").caption(
        photos, details=True, beam_size=3, num_return=2, max_length=5
    )
    for row, found in zip(rows, expected, strict=True):
        assert row["caption"] == found.text
        assert row["log_prob"] == pytest.approx(found.log_prob)
        assert [each["caption"] for each in row["n_best"]] == [h.text for h in found.n_best]


def test_attention_is_drawn_for_each_photo(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["caption", str(student / "best"), "--max-length", "4"]
    assert main([*command, photos[0], "--attention", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, *photos, "--attention", str(tmp_path / "all")]) == 0
    names = {f"{Path(path).stem}.png" for path in photos}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert main([*command, photos[0], "--attention", str(tmp_path / "noname")]) == 1
    assert "Use " in capsys.readouterr().err
