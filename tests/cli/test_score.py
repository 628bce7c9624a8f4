"""`capdistill score`: values from pycocoevalcap 1.2 (loadRes, its tokeniser, its three scorers)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from capdistill.cli import main
from capdistill.metrics import CaptionScorer, paired_bootstrap
from tests.cli.cli_commands import refused

REFERENCES = {
    "images": [{"id": 7}, {"id": 12}, {"id": 25}, {"id": 31}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A brown dog runs on the grass."},
        {"id": 2, "image_id": 12, "caption": "Two children play with a red ball"},
        {"id": 3, "image_id": 7, "caption": "A dog, running outside!"},
        {"id": 4, "image_id": 25, "caption": "a man rides a bicycle down the street"},
        {"id": 5, "image_id": 12, "caption": "Kids can't stop playing ball in a park (red ball)"},
        {"id": 6, "image_id": 31, "caption": "a boat on a lake"},
        {"id": 7, "image_id": 25, "caption": "a cyclist on a city road"},
    ],
}
RESULTS = [
    {"image_id": 25, "caption": "a man on a bicycle"},
    {"image_id": 7, "caption": "A brown dog runs on the grass ."},
    {"image_id": 12, "caption": "two kids play ball"},
]
CORPUS = {
    "bleu_1": 0.7788007829740548,
    "bleu_2": 0.6480014206994323,
    "bleu_3": 0.5468263493383613,
    "bleu_4": 0.5193787270791111,
    "rouge_l": 0.7035617983711204,
    "cider_d": 2.523284971435414,
}
CIDER = {"7": 5.308123850427753, "12": 0.8382091376923888, "25": 1.4235219261861007}
COCO = ["--metrics", "bleu", "rouge_l", "cider_d"]


def files(folder: Path, references: Any = REFERENCES, results: Any = RESULTS) -> list[str]:
    """The two files; text is written as it is."""
    paths = [folder / "references.json", folder / "results.json"]
    for path, content in zip(paths, (references, results), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [str(path) for path in paths]


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["score", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_the_coco_tools_on_the_images_that_have_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scored(capsys, *files(tmp_path), *COCO, "--per-image")
    assert found["schema"] == "capdistill.scores/1"
    assert found["scores"] == pytest.approx(CORPUS, abs=1e-9)
    assert found["per_image"]["cider_d"] == pytest.approx(CIDER, abs=1e-9)
    assert (found["images"], found["images_without_result"]) == (3, 1)
    assert found["health"]["captions"] == 3


def test_scores_are_those_of_the_scorer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references: dict[int, list[str]] = {}
    for row in REFERENCES["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    del references[31]
    names = ["bleu", "rouge_l", "cider_d", "meteor_nltk", "meteor_1_5_nopara"]
    expected = CaptionScorer(references, metrics=names)(
        {row["image_id"]: row["caption"] for row in RESULTS}
    )
    found = scored(capsys, *files(tmp_path), "--metrics", *names)
    assert found["scores"] == pytest.approx(dict(expected), abs=1e-12)
    assert "per_image" not in found


def test_ids_may_be_numbers_or_strings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "image_id": str(row["image_id"])} for row in RESULTS]
    found = scored(capsys, *files(tmp_path, results=rows), *COCO)
    assert found["scores"] == pytest.approx(CORPUS, abs=1e-9)


def test_the_table_has_scores_images_and_health(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    command = ["score", *files(tmp_path), *COCO, "--per-image", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "cider_d  2.5233" in shown
    assert "12     0.4724" in shown
    assert "3 of 4 images have a result" in shown
    assert "13 different words" in shown
    assert json.loads(out.read_text())["scores"] == pytest.approx(CORPUS, abs=1e-9)


def test_an_empty_caption_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*RESULTS[:2], {"image_id": 12, "caption": ""}]
    found = scored(capsys, *files(tmp_path, results=rows), *COCO, "--per-image")
    assert found["per_image"]["cider_d"]["12"] == 0.0
    assert found["health"]["empty"] == pytest.approx(1 / 3)


def _lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def test_json_lines_and_objects_by_image_are_read_like_coco_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects: dict[str, dict[str, Any]] = {"references": {}, "results": {}}
    for row in REFERENCES["annotations"]:
        objects["references"].setdefault(str(row["image_id"]), []).append(row["caption"])
    objects["results"] = {str(row["image_id"]): row["caption"] for row in RESULTS}
    listed = {image: [text] for image, text in objects["results"].items()}
    rows = (
        _lines(tmp_path / "references.jsonl", REFERENCES["annotations"]),
        _lines(tmp_path / "results.ndjson", RESULTS),
    )
    for pair in (rows, files(tmp_path, *objects.values()), files(tmp_path, results=listed)):
        found = scored(capsys, *pair, *COCO)
        assert found["scores"] == pytest.approx(CORPUS, abs=1e-9)
        assert (found["images"], found["images_without_result"]) == (3, 1)


def test_a_bad_row_of_json_lines_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references, _ = files(tmp_path)
    results = tmp_path / "results.jsonl"
    results.write_text('{"image_id": 7, "caption": "a dog"}\n\n{"image_id": 12, ')
    assert f"{results}, row 3 is not JSON" in refused(["score", references, str(results)], capsys)
    results.write_text("")
    assert "holds no result" in refused(["score", references, str(results)], capsys)
    assert "results[0]: expected an object" in refused(
        ["score", references, _lines(results, [{"image_id": 7}])], capsys
    )


OTHER = [
    {"image_id": "7", "caption": "a dog"},
    {"image_id": "12", "caption": "two children play with a red ball"},
    {"image_id": "25", "caption": "a man"},
]


def with_other(folder: Path, other: Any = OTHER) -> list[str]:
    """The two files, and another system's results of the same images in another order."""
    path = folder / "other.json"
    path.write_text(json.dumps(other))
    return [*files(folder), "--against", str(path)]


def test_two_systems_have_the_intervals_of_the_paired_bootstrap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scored(capsys, *with_other(tmp_path), *COCO, "--bootstrap", "50", "--per-image")
    references: dict[str, list[str]] = {}
    for image in ("25", "7", "12"):
        texts = [r["caption"] for r in REFERENCES["annotations"] if str(r["image_id"]) == image]
        references[image] = texts
    ours, theirs = ({str(r["image_id"]): r["caption"] for r in rows} for rows in (RESULTS, OTHER))
    expected = paired_bootstrap(references, theirs, ours, COCO[1:], samples=50)
    assert list(found["differences"]) == list(expected) == list(found["scores"])
    for name, each in expected.items():
        assert found["differences"][name] == {
            "difference": each.difference,
            "interval": list(each.interval),
            "p_value": each.p_value,
        }
        ends = {"results": list(each.b_interval), "against": list(each.a_interval)}
        assert found["intervals"][name] == ends
        assert (found["against"]["scores"][name], found["scores"][name]) == (each.a, each.b)
    assert found["bootstrap"] == {"samples": 50, "seed": 0, "confidence": 0.95, "notes": []}
    assert set(found["against"]["per_image"]["cider_d"]) == {"7", "12", "25"}


def test_results_against_themselves_do_not_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scored(capsys, *with_other(tmp_path, RESULTS), *COCO)
    nothing = {"difference": 0, "interval": [0, 0], "p_value": 1}
    assert all(each == nothing for each in found["differences"].values())
    assert found["bootstrap"]["samples"] == 1000
    assert "per_image" not in found
    assert "per_image" not in found["against"]


def test_the_table_of_two_systems_has_their_intervals_and_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    metrics = ["--metrics", "rouge_l", "meteor_1_5_nopara", "--per-image"]
    assert main(["score", *with_other(tmp_path), *metrics]) == 0
    table, ours, theirs, remarks = capsys.readouterr().out.split("\n\n")
    head, *scores = table.splitlines()
    assert head.split() == ["results", "against", "results", "minus", "against"]
    figure = r" +[-+]?\d\.\d{4} \[-?\d\.\d{4}, \d\.\d{4}\]"
    assert len(scores) == 2
    assert all(re.fullmatch(rf"\w+({figure}){{3}}, p = [01]\.\d{{3}}", row) for row in scores)
    assert ours.startswith("image, results")
    assert theirs.startswith("image, against")
    assert "95 % intervals from 1,000 paired bootstrap samples" in remarks


@pytest.mark.parametrize("cut", ["results", "against"])
def test_systems_of_different_images_are_not_compared(
    cut: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = with_other(tmp_path, OTHER[1:] if cut == "against" else OTHER)
    if cut == "results":
        Path(words[1]).write_text(json.dumps(RESULTS[:1] + RESULTS[2:]))
    said = refused(["score", *words], capsys)
    place = "first: '7'. Only in the second: none"
    assert (place if cut == "against" else "first: none. Only in the second: '7'") in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--against"),
        (("--against", "missing.json"), "--bootstrap=0 was given"),
    ],
)
def test_samples_need_a_second_system_and_a_number(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["score", *files(tmp_path), "--bootstrap", "0", *words], capsys)


def changed(row: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**each, **(fields if i == row else {})} for i, each in enumerate(RESULTS)]


def annotated(**fields: Any) -> dict[str, Any]:
    return {**REFERENCES, "annotations": [{"image_id": 7, "caption": "a dog", **fields}]}


BAD_RESULTS = {
    "no JSON": ("not JSON", "is not JSON (line 1"),
    "empty file": ("", "is not JSON (line 1"),
    "an object": ({"annotations": RESULTS}, "expected a list of"),
    "no result": ([], "holds no result"),
    "no objects": (["a dog"], "results[0]: expected an object with 'image_id' and 'caption'"),
    "no caption": ([{"image_id": 7}], "results[0]: expected an object"),
    "two results": ([*RESULTS, RESULTS[0]], "results[3]: image '25' has a result already"),
    "two, one as text": (changed(1, image_id="25"), "results[1]: image '25' has a result"),
    "foreign ids": (changed(1, image_id=99), "1 of 3 results are of images that"),
    "a key twice": ('{"7": "a dog", "7": "a cat"}', "an object has the key '7' twice"),
    "a list printed": (changed(1, caption="['a dog', 'a cat']"), "printed into a string"),
    "two in an object": ({"7": ["a dog", "a cat"]}, "image '7' has a result already"),
    "an object of others": ({"7": "a dog", "12": 3}, "image '12': caption is 3 (int)"),
    "no text": (
        changed(1, caption=None),
        "results[1]: caption is None (NoneType); expected a string",
    ),
    "a list": (changed(1, caption=["a dog"]), "results[1]: caption is ['a dog']"),
    "fraction": (changed(0, image_id=25.0), "image_id is 25.0; expected a whole number"),
    "true": (changed(0, image_id=True), "image_id is True"),
    "half a character": (changed(0, image_id="\ud800"), r"image_id is '\ud800'"),
}
BAD_REFERENCES = {
    "no JSON": ("{", "is not JSON (line 1"),
    "a list": (RESULTS, "not a COCO captions file; expected the lists ('images', 'annotations')"),
    "no images": ({"annotations": []}, "found ['annotations']"),
    "no id": ({**REFERENCES, "images": [{}]}, "images[0]: expected an object with 'id'"),
    "two entries": ({**REFERENCES, "images": [{"id": 7}, {"id": "7"}]}, "'7' is listed already"),
    "null in an object": ({"7": ["a dog"], "12": None}, "image '12': caption is None"),
    "no text": (annotated(caption=3), "annotations[0]: caption is 3 (int); expected a string"),
    "no reference": (annotated(), "have no caption under 'annotations': '25', '12'"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_results_that_cannot_be_used_are_named(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, message = BAD_RESULTS[case]
    said = refused(["score", *files(tmp_path, results=results)], capsys)
    assert said.startswith(f"capdistill score: {tmp_path / 'results.json'}")
    assert message in said


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_references_that_cannot_be_used_are_named(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references, message = BAD_REFERENCES[case]
    said = refused(["score", *files(tmp_path, references=references)], capsys)
    assert said.startswith(f"capdistill score: {tmp_path / 'references.json'}")
    assert message in said


def test_a_file_that_is_read_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = files(tmp_path)
    assert "one of the files to score" in refused(["score", *pair, "--out", pair[1]], capsys)
    assert json.loads(Path(pair[1]).read_text()) == RESULTS
    three = with_other(tmp_path)
    assert "one of the files to score" in refused(["score", *three, "--out", three[-1]], capsys)


def test_a_metric_that_there_is_not_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["score", *files(tmp_path), "--metrics", "spice"], capsys)
    assert "No metric 'spice'" in said


def test_captions_of_evaluate_can_be_scored(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    command = ["evaluate", str(student / "best"), "--data", "sample", "--device", "cpu"]
    assert main([*command, "--no-measure", "--json", "--captions", str(results)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["health"]["novel"] is not None  # the sample has a split to train on
    rows = json.loads(results.read_text())
    assert {str(row["image_id"]): row["caption"] for row in rows} == found["captions"]
    references = {
        "images": [{"id": image} for image in found["references"]],
        "annotations": [
            {"image_id": image, "caption": text}
            for image, texts in found["references"].items()
            for text in texts
        ],
    }
    again = scored(capsys, *files(tmp_path, references, rows), *COCO)
    assert again["scores"] == pytest.approx({n: found["scores"][n] for n in CORPUS}, abs=1e-9)
