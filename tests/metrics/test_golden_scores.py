"""Cases 8 and 9 and the golden scores: all made with the COCO tool (pycocoevalcap 1.2)."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from capdistill.metrics import CaptionScorer, DocumentFrequencies, cider_d

COCO = ("bleu", "rouge_l", "cider_d")
NO_TABLE = (*COCO, "meteor_nltk", "meteor_1_5_nopara")
REFERENCES = {
    "1": ["a brown dog runs on the grass", "a dog is running outside"],
    "2": ["two children play with a red ball", "kids playing ball in a park"],
    "3": ["a man rides a bicycle down the street", "a cyclist on a city road"],
}
CAPTIONS = {
    "1": "a brown dog runs on the grass",
    "2": "two kids play ball",
    "3": "a man on a bicycle",
}
SPACES = [" ", "\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("x", SPACES)
def test_a_line_break_in_a_caption_moves_no_other(x: str) -> None:
    captions = {**CAPTIONS, "1": f"a brown dog{x}runs on the grass"}
    scores = CaptionScorer(REFERENCES, metrics=COCO)(captions)
    bleu = [scores[f"bleu_{n}"] for n in (1, 2, 3, 4)]
    expected = [0.8290291181, 0.6897939217, 0.5820936189, 0.5528757771]
    assert bleu == pytest.approx(expected, abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(0.7035617984, abs=1e-9)
    assert scores["cider_d"] == pytest.approx(2.6379609183, abs=1e-9)
    each = [scores.per_image["cider_d"][i] for i in "123"]
    assert each == pytest.approx([5.2860324375, 1.2043283913, 1.4235219262], abs=1e-9)


def _changed(captions: dict[str, str], **references: list[str]) -> tuple[dict, dict]:
    return {**REFERENCES, **references}, {**CAPTIONS, **captions}


TWO = REFERENCES["2"]
EDGES = {
    "empty": (*_changed({"2": ""}), 0.5580351457, 0.4366861008, 0.5302663438, 2.2365181212),
    "dots": (*_changed({"2": "..."}), 0.5580351457, 0.4366861008, 0.5302663438, 2.2365181212),
    "all empty": (*_changed(dict.fromkeys("123", "")), 0, 0, 0, 0),
    "one reference of dots": (
        *_changed({}, **{"2": [TWO[0], "..."]}),
        *(0.7301257340, 0.5110659852, 0.7035617984, 2.4616917786),
    ),
    "no word in the references": (
        *_changed({}, **{"2": ["...", "!"]}),
        *(0.7500000000, 0.6206161802, 0.5302663438, 2.3312607651),
    ),
    "one image": (
        *({"1": REFERENCES["1"]}, {"1": CAPTIONS["1"]}),
        *(0.9999999997, 0.9999999997, 1, 0),
    ),
}
BLANK = [
    "",
    " ",
    "\t\r\n",
    "\u200b",
    "\ufeff",
    "\u200d\u2060",
    "\u00a0",
    "\u2028",
    "...",
    "? ! , - --",
    "\x00",
]


@pytest.mark.parametrize("case", EDGES)
def test_empty_and_punctuation_only_texts_score_as_in_the_coco_tool(case: str) -> None:
    references, captions, bleu_1, bleu_4, rouge_l, cider_d = EDGES[case]
    scores = CaptionScorer(references, metrics=COCO)(captions)
    found = [scores[name] for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d")]
    assert found == pytest.approx([bleu_1, bleu_4, rouge_l, cider_d], abs=1e-9)
    assert all(set(each) == set(references) for each in scores.per_image.values())


@pytest.mark.parametrize("case", ["empty", "dots", "all empty"])
def test_meteor_of_an_empty_caption_is_0(case: str) -> None:
    references, captions, *_ = EDGES[case]
    scores = CaptionScorer(references, metrics=["meteor_nltk", "meteor_1_5_nopara"])(captions)
    assert [each["2"] for each in scores.per_image.values()] == [0.0, 0.0]


def test_a_single_image_says_what_cider_needs() -> None:
    references, captions, *_ = EDGES["one image"]
    [note] = CaptionScorer(references, metrics=COCO)(captions).notes
    assert "several images" in note
    assert "document_frequencies" in note


@pytest.mark.parametrize("blank", BLANK)
def test_every_kind_of_blank_caption_scores_as_the_empty_one(blank: str) -> None:
    empty = CaptionScorer(REFERENCES, metrics=NO_TABLE)({**CAPTIONS, "2": ""})
    found = CaptionScorer(REFERENCES, metrics=NO_TABLE)({**CAPTIONS, "2": blank})
    assert found.per_image == empty.per_image
    assert all(each["2"] < 1e-3 for each in found.per_image.values())  # BLEU is smoothed


@pytest.mark.parametrize("blank", BLANK)
@pytest.mark.parametrize("images", ["1", "123"])
def test_blank_references_and_captions_give_numbers(blank: str, images: str) -> None:
    texts = {image: [blank, blank] for image in images}
    for captions in (dict.fromkeys(images, blank), dict.fromkeys(images, "a dog")):
        scores = CaptionScorer(texts, metrics=NO_TABLE)(captions)
        assert all(score == pytest.approx(0.0, abs=1e-3) for score in scores.values())
        each = [score for scored in scores.per_image.values() for score in scored.values()]
        assert len(each) == len(scores) * len(images)
        assert all(map(math.isfinite, each))


def test_published_figures_of_nlg_eval_are_reproduced() -> None:
    references = [
        [
            "this is one reference sentence for sentence1",
            "this is one more reference sentence for sentence1",
        ],
        [
            "this is a reference sentence for sentence2 which was generated by your model",
            "this is the second reference sentence for sentence2",
        ],
    ]
    hypotheses = [
        "this is the model generated sentence1 which seems good enough",
        "this is sentence2 which has been generated by your model",
    ]
    scores = CaptionScorer(references, metrics=COCO)(hypotheses)
    found = [scores[n] for n in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")]
    expected = [0.550000, 0.428174, 0.284043, 0.201143, 0.522104, 1.242192]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def golden(shared: Callable[[str], Path]) -> dict:
    return json.loads(shared("golden/flickr8k_dev_scores.json").read_text(encoding="utf-8"))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["human", "shuffled", "damaged"])
def test_golden_scores_are_met_for_the_corpus_and_for_every_image(golden: dict, name: str) -> None:
    references = {i: [text.split() for text in each] for i, each in golden["references"].items()}
    wanted = golden["sets"][name]
    captions = {i: text.split() for i, text in wanted["hypotheses"].items()}
    scores = CaptionScorer(references, metrics=COCO)(captions)
    _compare_all(dict(scores), wanted["corpus"])
    for image, each in wanted["per_image"].items():
        _compare_all({metric: scores.per_image[metric][image] for metric in scores}, each)


def _compare_all(found: dict, wanted: dict) -> None:
    expected = {f"bleu_{n + 1}": value for n, value in enumerate(wanted["bleu"])}
    expected |= {name: wanted[name] for name in ("rouge_l", "cider_d")}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["human", "shuffled", "damaged"])
def test_meteor_is_nltks_own_with_all_of_wordnet(golden: dict, name: str) -> None:
    references = {i: [text.split() for text in each] for i, each in golden["references"].items()}
    wanted = golden["sets"][name]
    captions = {i: text.split() for i, text in wanted["hypotheses"].items()}
    scores = CaptionScorer(references, metrics=["meteor_nltk"])(captions)
    expected = {image: each["meteor_nltk"] for image, each in wanted["per_image"].items()}
    assert scores.per_image["meteor_nltk"] == pytest.approx(expected, abs=1e-12)
    mean = wanted["corpus"]["meteor_nltk_mean"]
    assert scores["meteor_nltk"] == pytest.approx(mean, abs=1e-12)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["human", "damaged"])
def test_scores_by_saved_frequencies_are_the_golden_ones(
    golden: dict, name: str, tmp_path: Path
) -> None:
    references = {i: [text.split() for text in each] for i, each in golden["references"].items()}
    DocumentFrequencies.count(references).save(tmp_path / "frequencies.npz")
    frequencies = DocumentFrequencies.load(tmp_path / "frequencies.npz")
    wanted = golden["sets"][name]
    some = list(references)[::10]
    scores = cider_d(
        {i: references[i] for i in some},
        {i: wanted["hypotheses"][i].split() for i in some},
        document_frequencies=frequencies,
    )
    expected = {i: wanted["per_image"][i]["cider_d"] for i in some}
    assert scores.per_image["cider_d"] == pytest.approx(expected, abs=1e-9)
