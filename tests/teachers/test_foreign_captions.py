"""A file of captions that another program wrote is a teacher for sequence-level training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import capdistill as cd
from capdistill.data import CaptionData, Example
from capdistill.errors import ConfigError, DataError
from capdistill.metrics import CaptionScorer
from capdistill.teachers import read_captions
from capdistill.teachers.foreign_captions import read_texts

NAMES = ("1.png", "2.png", "3.png")
TEXTS = {"1.png": ["a red dog", "one dog"], "2.png": ["a cat"], "3.png": ["it is blue"]}


@pytest.fixture
def pictures(tmp_path: Path) -> CaptionData:
    examples = []
    for number, name in enumerate(NAMES):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 12), (80 * number, 0, 0)).save(path)
        examples.append(Example(f"id{number}", path, (f"a dog {number}", "a red dog sits")))
    return CaptionData(examples, name="pictures")


def by_line(key: str = "caption") -> str:
    rows = [{"image": n, key: text} for n, texts in TEXTS.items() for text in texts]
    return "\n".join(json.dumps(row) for row in rows)


FORMS: dict[str, tuple[str, Any]] = {
    "a caption a line": ("c.jsonl", by_line()),
    "text as an API says": ("c.ndjson", by_line("text")),
    "an image a line": (
        "c.jsonl",
        "\n".join(json.dumps({"file_name": n, "captions": t}) for n, t in TEXTS.items()),
    ),
    "an object": ("c.json", json.dumps(TEXTS)),
    "paths elsewhere": ("c.json", json.dumps({f"some/where/{n}": t for n, t in TEXTS.items()})),
    "paths of Windows": ("c.json", json.dumps({f"C:\\photos\\{n}": t for n, t in TEXTS.items()})),
    "ids": ("c.json", json.dumps({f"id{n}": t for n, t in enumerate(TEXTS.values())})),
    "COCO results": (
        "c.json",
        json.dumps([{"image_id": n, "caption": t} for n, ts in TEXTS.items() for t in ts]),
    ),
    "a COCO file": (
        "c.json",
        json.dumps(
            {
                "images": [{"id": i, "file_name": n} for i, n in enumerate(TEXTS)],
                "annotations": [
                    {"id": 9, "image_id": i, "caption": t}
                    for i, ts in enumerate(TEXTS.values())
                    for t in ts
                ],
            }
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(
    form: str, pictures: CaptionData, tmp_path: Path
) -> None:
    name, content = FORMS[form]
    (tmp_path / name).write_text(content)
    made = read_captions(tmp_path / name, pictures, num_return=5)
    assert [example.captions for example in made.examples] == [tuple(t) for t in TEXTS.values()]
    assert made.references == pictures.references
    assert made.counts["captions"] == 4


def test_images_that_the_file_lacks_keep_their_captions_and_are_counted(
    pictures: CaptionData, tmp_path: Path
) -> None:
    file = tmp_path / "c.jsonl"
    rows = [{"image": "1.png", "captions": ["a dog", " ", None, "a dog", "two\nlines"]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    made = read_captions(file, pictures, num_return=3, mix=1)
    assert made.examples[0].captions[:2] == ("a dog", "two lines")
    assert len(made.examples[0].captions) == 3
    assert made.examples[1].captions == pictures.examples[1].captions
    expected = {"captions": 2, "mixed": 1, "without": 2, "empty": 2, "duplicates": 1}
    assert {name: made.counts[name] for name in expected} == expected


def test_captions_that_an_api_refused_are_counted_as_empty(
    pictures: CaptionData, tmp_path: Path
) -> None:
    rows = [{"image": n, "caption": t} for n, t in zip(NAMES, ["a dog", "", None], strict=True)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = read_captions(tmp_path / "c.jsonl", pictures)
    assert made.examples[0].captions == ("a dog",)
    assert (made.counts["empty"], made.counts["without"]) == (2, 2)


def test_a_file_of_another_kind_is_not_taken_for_one_of_ours(
    pictures: CaptionData, tmp_path: Path
) -> None:
    (tmp_path / "c.csv").write_text("image,caption\n1.png,a dog\n")
    with pytest.raises(DataError, match=r"c\.csv, row 1 .*not JSON") as error:
        read_captions(tmp_path / "c.csv", pictures)
    assert "overwrite" not in str(error.value)


def test_the_best_by_cider_is_that_of_the_scorer(pictures: CaptionData, tmp_path: Path) -> None:
    file, texts = tmp_path / "c.json", ["a bird", "a red dog sits", "a dog"]
    file.write_text(json.dumps(dict.fromkeys(NAMES, texts)))
    made = read_captions(file, pictures, keep="cider")
    scorer = CaptionScorer(pictures.references, metrics=["cider_d"])
    for example in made.examples:
        scores = scorer.rewards([example.image_id] * 3, texts).tolist()
        assert example.captions == (texts[scores.index(max(scores))],)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"image": "1.png"}', r"row 1 names no image and caption.*JSON Lines of"),
        ("c.jsonl", '{"image": "1.png", "caption": 3}', r"row 1: the caption is 3"),
        ("c.json", '"a dog"', r"holds 'a dog'.*JSON Lines of"),
        ("c.json", "{", r"c.json is not JSON"),
        ("c.json", '{"9.png": "a dog"}', r"of 1 images, such as '9.png', but of none of the 3"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    name: str, content: str, message: str, pictures: CaptionData, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / name, pictures)


@pytest.mark.parametrize("options", [{"keep": "score"}, {"reweight": 1.0}])
def test_choices_by_log_probability_are_refused(
    options: dict[str, Any], pictures: CaptionData, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(TEXTS))
    with pytest.raises(ConfigError, match="without log-probabilities"):
        read_captions(tmp_path / "c.json", pictures, **options)


def test_photos_without_captions_train_on_those_of_an_api(
    pictures: CaptionData, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(TEXTS))
    photos = cd.data.Images(tmp_path / "pictures")
    made = read_captions(tmp_path / "c.json", photos, num_return=2)
    tokenizer = cd.WordTokenizer.train(made.captions, min_count=1)
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
    trainer = cd.Trainer(student, batch_size=3, epochs=1, device="cpu", progress=False)
    assert trainer.fit(made, made).epochs[0]["scores"]["cider_d"] >= 0
    assert read_texts(tmp_path / "c.json") == TEXTS


def test_captions_of_named_photos_are_found_by_the_names_of_their_files(
    pictures: CaptionData, tmp_path: Path
) -> None:
    """`capdistill caption RUN photos/*.jpg` knows them by their paths."""
    row = {"captions": ["a dog"], "log_probs": [-1.0], "lengths": [3]}
    row |= {"cider_d": None, "duplicates": 0, "empty": 0, "unfinished": 0, "error": None}
    files = [str(example.path) for example in pictures.examples]
    rows = [{**row, "image": f"there/{Path(file).name}", "image_id": file} for file in files]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    photos = cd.data.Images(tmp_path / "pictures")
    made = read_captions(tmp_path / "c.jsonl", photos, keep="score")
    assert [list(example.captions) for example in made.examples] == [["a dog"]] * len(files)
    rows.append({**rows[0], "image": f"elsewhere/{Path(files[0]).name}", "image_id": "other"})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(DataError, match=f"no captions of 1 of {len(files)} images"):
        read_captions(tmp_path / "c.jsonl", photos)
