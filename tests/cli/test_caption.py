from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from capdistill import Captioner
from capdistill.cli import main
from capdistill.data.pixels import read_pixels
from tests.cli.cli_commands import TINY, refused


def test_caption_prints_path_tab_caption(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(student / "best"), *photos]) == 0
    expected = Captioner.load(student / "best").caption(photos)
    pairs = zip(photos, expected, strict=True)
    assert capsys.readouterr().out == "".join(f"{path}\t{text}\n" for path, text in pairs)


def test_images_may_stand_behind_options(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["caption", str(student / "best")]
    assert main([*command, *photos, "--batch-size", "1"]) == 0
    before = capsys.readouterr().out
    assert main([*command, "--batch-size", "1", *photos]) == 0
    assert capsys.readouterr().out == before
    with pytest.raises(SystemExit):
        main([*command, "--batch-sise", "1", *photos])
    assert "Did you mean --batch-size?" in capsys.readouterr().err


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


def test_a_run_stands_for_its_best_captioner(
    student: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for given in (student, student / "best", student / "best" / "captioner.json"):
        assert main(["caption", str(given), *photos]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


def test_a_run_with_a_final_captioner_alone_stands_for_that(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(student / "final", tmp_path / "final")
    assert main(["caption", str(tmp_path), photos[0]]) == 0
    assert capsys.readouterr().out.startswith(photos[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rnu", "there is no such directory. Did you mean '{}/run'?"),
        ("empty", "holds no saved captioner. Expected a directory"),
        ("file.txt", "holds no saved captioner. Expected a directory"),
        ("file.txt/best", "there is no such directory"),
        ("run", "is a run that has not saved a captioner yet"),
        ("x" * 300, "the path cannot be used"),
    ],
)
@pytest.mark.parametrize("command", ["caption", "evaluate", "compare", "distill", "train"])
def test_a_directory_without_a_captioner_is_named(
    command: str, given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("run", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    (tmp_path / "file.txt").write_text("")
    path, out = str(tmp_path / given), ["--data", "sample", "--out", str(tmp_path / "out")]
    words = {
        "caption": ["caption", path, "dog.jpg"],
        "evaluate": ["evaluate", path, "--data", "sample"],
        "compare": ["compare", path, path, *out],
        "distill": ["distill", "--teacher", path, "--student", "debug_student", *out],
        "train": ["train", "--preset", path, *out],
    }[command]
    assert main(words) == 1
    assert message.format(tmp_path) in capsys.readouterr().err


def test_a_folder_stands_for_its_images_sorted(
    student: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    names = ["b.JPG", "a.jpg", "inner/c.png", ".hidden.jpg", ".cache/d.jpg", "notes.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[0], folder / name)
    (folder / "broken.jpg").write_text("<html>404</html>")
    expected = [str(folder / name) for name in ("a.jpg", "b.JPG", "inner/c.png")]
    assert main(["caption", str(student), str(folder), photos[1]]) == 1
    shown = capsys.readouterr()
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == [*expected, photos[1]]
    assert str(folder / "broken.jpg") in shown.err
    assert "1 of 5 images" in shown.err
    (folder / "broken.jpg").unlink()
    assert main(["caption", str(student), str(folder)]) == 0
    assert main(["caption", str(student), str(tmp_path / "photos" / ".cache")]) == 0
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    assert "holds no image" in refused(["caption", str(student), str(tmp_path / "none")], capsys)


def test_paths_can_come_from_stdin(
    student: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(photos) + "\n\n"))
    assert main(["caption", str(student), "-"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == photos
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "list on stdin holds no image" in refused(["caption", str(student), "-"], capsys)


@pytest.mark.parametrize("options", [["--num-return", "3"], ["--details", "--beam-size", "3"]])
def test_all_captions_are_printed_with_their_scores(
    student: Path, photos: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(student), *photos, *options, "--max-length", "5"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    count = 3 if "--num-return" in options else 1
    results = Captioner.load(student / "best").caption(
        photos, details=True, beam_size=3, num_return=count, max_length=5
    )
    assert rows == [
        [path, str(rank), f"{each.score:.4f}", f"{each.log_prob:.4f}", each.text]
        for path, result in zip(photos, results, strict=True)
        for rank, each in enumerate(result.n_best, start=1)
    ]
    assert len(rows) == count * len(photos)


def test_captions_are_printed_as_they_are_made(
    student: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[Path] = []

    def reading(source: Any) -> Any:
        if isinstance(source, Path):  # the captioner is given the pixels
            if len(read) == 1:
                assert capsys.readouterr().out.startswith(photos[0])
            read.append(source)
        return read_pixels(source)

    monkeypatch.setattr("capdistill.data.pixels.read_pixels", reading)
    assert main(["caption", str(student), *photos, "--batch-size", "1"]) == 0
    assert len(read) == 2


def test_many_images_as_json_show_progress(
    student: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("capdistill.cli.caption._EVERY", 2)
    assert main(["caption", str(student), *photos, photos[0], "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "captioned 2 of 3 images\n"
    assert len(json.loads(shown.out)) == 3


def test_a_caption_of_any_characters_goes_to_any_terminal(
    student: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    monkeypatch.setattr(
        Captioner, "caption_stream", lambda self, images, **_: ["\U0001f415 \ud83d" for _ in images]
    )
    assert main(["caption", str(student), photos[0]]) == 0
    assert buffer.getvalue().endswith(b"\t\\U0001f415 \\ud83d\n")
    assert main(["caption", str(student), photos[0], "--json"]) == 0
    [row] = json.loads(buffer.getvalue()[buffer.getvalue().index(b"[") :])
    assert row["caption"] == "\U0001f415 \ud83d"


# -- captions to train on -------------------------------------------------------------------------


def test_out_writes_the_captions_of_the_training_images(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from capdistill import data, teachers

    decoding = ["--beam-size", "3", "--num-return", "2", "--max-length", "6"]
    command = ["caption", str(teacher), "--data", "sample", "--limit", "4", "--device", "cpu"]
    command += [*decoding, "--out", str(tmp_path / "captions.jsonl")]
    assert main(command) == 0
    assert f"{tmp_path}/captions.jsonl: sample/train: 4 images" in capsys.readouterr().out
    train = data.sample().train.subset(4)
    found = teachers.read_captions(tmp_path / "captions.jsonl", train, num_return=2)
    expected = Captioner.load(teacher / "best").caption(
        [example.path for example in train.examples],
        details=True,
        **{"beam_size": 3, "num_return": 2, "max_length": 6},
    )
    for example, one in zip(found.examples, expected, strict=True):
        texts = tuple(dict.fromkeys(h.text for h in one.n_best if h.finished and h.text))
        assert example.captions == (texts or example.references)

    assert main([*command, "--json"]) == 0  # the file is complete
    assert json.loads(capsys.readouterr().out)["unreadable"] == 0
    assert "max_length was 6 and is 7" in refused([*command, "--max-length", "7"], capsys)
    assert main([*command, "--max-length", "7", "--overwrite"]) == 0


def test_out_also_takes_images_without_captions(
    teacher: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    out = tmp_path / "captions.jsonl"
    command = ["caption", str(teacher), *photos, str(broken), "--out", str(out)]
    assert main([*command, "--device", "cpu", "--max-length", "6"]) == 1
    assert "broken.jpg" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["image_id"] for row in rows] == [*photos, str(broken)]
    assert rows[0]["cider_d"] is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "Give IMAGE files"),
        (["--data", "sample"], "needs --out FILE"),
        (["--out", "c.jsonl"], "either --data PATH or IMAGE"),
        (["dog.jpg", "--data", "sample", "--out", "c.jsonl"], "either --data PATH or IMAGE"),
        (["--data", "sample", "--out", "c.jsonl", "--details"], "do not go with --out"),
        (["dog.jpg", "--overwrite"], "--overwrite belongs to --out"),
        (["dog.jpg", "--limit", "3"], "belong to --data"),
        (["dog.jpg", "--temperature", "0.5"], "sample is False. Give --sample too, or leave temp"),
        (["dog.jpg", "--early-stopping", "never"], "because beam_size is 1"),
        (["--data", "sample", "--limit", "2", "--out", "c.jsonl", "--seed", "3"], "Give --sample"),
        (["dog.jpg", "--out", "c.jsonl", "--images", "photos"], "belong to --data"),
    ],
)
def test_images_data_and_out_that_do_not_go_together_are_refused(
    teacher: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(["caption", str(teacher), *more], capsys)


def test_a_run_file_trains_on_the_captions_of_a_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from capdistill.data import sample
    from capdistill.teachers.caption_file import Row

    captions = tmp_path / "captions.jsonl"
    said = (["a dog", "a cat"], [-1.0, -2.0], [3, 3])
    rows = [Row("i.jpg", image, *said) for image in sample().train.image_ids[:6]]
    captions.write_bytes(b"".join(row.line() for row in rows))
    values = {"path": str(captions), "num_return": 2, "mix": 1}
    command = ["train", "--preset", "debug_student", *TINY, "--set", "tokenizer.min_count=2"]
    for key, value in values.items():
        command += ["--set", f"data.teacher_captions.{key}={value}"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["teacher_captions"] == {**values, "keep": None, "reweight": None}
    assert saved["train"]["captions_per_image"] == 3  # two of the teacher and a human one
    capsys.readouterr()
    wrong = [*command, "--set", "data.teacher_captions.mix=-1", "--out", str(tmp_path / "other")]
    assert "mix" in refused(wrong, capsys)


def test_photos_and_an_apis_captions_become_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    photos, captions = tmp_path / "photos", tmp_path / "api.jsonl"
    photos.mkdir()
    rows = []
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(photos / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"a dog {'sits' if number % 2 else ''}"})
    captions.write_text("\n".join(map(json.dumps, rows)))
    where = [str(photos) if value == "sample" else value for value in TINY]
    command = ["train", "--preset", "debug_student", *where, "--format", "images"]
    command += ["--set", "tokenizer.min_count=1", "--set", "data.val_share=0.3"]
    command += ["--set", f"data.teacher_captions.path={captions}"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["teacher_captions"]["path"] == str(captions)
    rows = [json.loads(r) for r in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert "cider_d" in next(row for row in rows if row["kind"] == "epoch")["scores"]
    words = json.loads((tmp_path / "run" / "best" / "tokenizer.json").read_text())["words"]
    assert set(words) == {"a", "dog", "sits"}
    capsys.readouterr()
