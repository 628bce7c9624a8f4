import gzip
import math
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capdistill.errors import ConfigError, DataError, UnknownName
from capdistill.metrics import (
    DIRECTIONS,
    CaptionScorer,
    CiderD,
    DocumentFrequencies,
    Metric,
    bleu,
    bleu_rouge_meteor,
    cider_d,
    coco_results,
    diversity,
    meteor_1_5,
    meteor_nltk,
    paired_bootstrap,
    rouge_l,
)
from capdistill.training.monitor import resolve_monitor
from capdistill.training.validation import directions

REFERENCES = {"a": ["a dog runs", "the dog is running"], "b": ["a red car", "one car"]}
CAPTIONS = {"a": "a dog runs", "b": "a blue car"}


def test_strings_tokens_dicts_and_lists_give_equal_scores() -> None:
    metrics = ("bleu", "rouge_l", "cider_d")
    words = {i: [text.split() for text in each] for i, each in REFERENCES.items()}
    by_id = CaptionScorer(REFERENCES, metrics=metrics)(CAPTIONS)
    tokens = CaptionScorer(words, metrics=metrics)({i: t.split() for i, t in CAPTIONS.items()})
    listed = CaptionScorer(list(REFERENCES.values()), metrics=metrics)(list(CAPTIONS.values()))
    assert dict(by_id) == dict(tokens) == dict(listed)


def test_the_order_of_a_dict_changes_nothing() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d"])
    turned = dict(reversed(CAPTIONS.items()))
    assert scorer(turned).per_image == scorer(CAPTIONS).per_image


def test_a_scorer_can_be_used_again_and_pickled() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=("bleu", "rouge_l", "cider_d"))
    first = dict(scorer(CAPTIONS))
    scorer({"a": "", "b": "car"})
    assert dict(scorer(CAPTIONS)) == first
    assert dict(pickle.loads(pickle.dumps(scorer))(CAPTIONS)) == first


def test_captions_may_come_piece_by_piece() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=("bleu", "rouge_l", "cider_d"))
    scorer.update({"b": "a blue car"})
    scorer.update({})
    scorer = pickle.loads(pickle.dumps(scorer))
    scorer.update({"a": ["a", "dog", "runs"]})
    found = scorer.compute()
    assert found.per_image == scorer(CAPTIONS).per_image
    assert scorer.compute() == found
    scorer.reset()
    with pytest.raises(DataError, match=r"2 of 2 images have no caption yet: 'a', 'b'"):
        scorer.compute()


def test_pieces_of_a_list_are_given_by_place() -> None:
    scorer = CaptionScorer(list(REFERENCES.values()), metrics=["rouge_l"])
    scorer.update({1: "a blue car"})
    scorer.update({0: "a dog runs"})
    assert scorer.compute() == scorer(list(CAPTIONS.values()))
    with pytest.raises(DataError, match=r"list was given; expected \{image: caption\}"):
        scorer.update(["a dog runs"])


@pytest.mark.parametrize(
    ("captions", "says"),
    [
        ({"a": "once more", "b": "x"}, r"Captioned already: 'a'.*reset"),
        ({"z": "x", "b": "x"}, r"without references: 'z'"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused_whole(captions: dict, says: str) -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["rouge_l"])
    scorer.update({"a": "a dog"})
    with pytest.raises(DataError, match=says):
        scorer.update(captions)
    with pytest.raises(DataError, match=r"1 of 2 images .*: 'b'\."):
        scorer.compute()


def test_functions_give_the_scores_of_the_scorer() -> None:
    calls = {"bleu": bleu, "rouge_l": rouge_l, "cider_d": cider_d, "meteor_nltk": meteor_nltk}
    for name, function in calls.items():
        expected = CaptionScorer(REFERENCES, metrics=[name])(CAPTIONS)
        found = function(REFERENCES, CAPTIONS)
        assert found == expected
        assert found.per_image == expected.per_image


def test_meteor_without_paraphrases_goes_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capdistill.metrics.meteor15.find_paraphrases", lambda: None)
    scores = meteor_1_5(REFERENCES, CAPTIONS)
    assert list(scores) == ["meteor_1_5_nopara"]
    assert "capdistill[coco]" in scores.notes[0]
    everything = CaptionScorer(REFERENCES)
    assert set(everything.directions) == set(DIRECTIONS) - {"meteor_1_5"}
    assert everything.notes == ()


def test_a_monitor_that_needs_paraphrases_names_the_score_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("capdistill.metrics.meteor15.find_paraphrases", lambda: None)
    known = directions(["cider_d", "meteor_1_5"])
    assert resolve_monitor("meteor_1_5_nopara", known) == ("meteor_1_5_nopara", True)
    with pytest.raises(UnknownName, match="monitor 'meteor_1_5_nopara'"):
        resolve_monitor("meteor_1_5", known)


def test_meteor_with_a_table_of_paraphrases_has_the_plain_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "paraphrase-en.gz"
    path.write_bytes(gzip.compress(b"0.5\na red car\nsome vehicle\n"))
    monkeypatch.setenv("CAPDISTILL_METEOR_PARAPHRASES", str(path))
    captions = {"a": "a dog runs", "b": "some vehicle"}
    found = CaptionScorer(REFERENCES, metrics=["meteor_1_5", "meteor_1_5_nopara"])(captions)
    assert list(found) == ["meteor_1_5", "meteor_1_5_nopara"]
    assert found["meteor_1_5"] > found["meteor_1_5_nopara"]


@pytest.mark.parametrize(
    ("captions", "named"),
    [({"a": "x"}, "'b'"), ({**CAPTIONS, "z": "x"}, "'z'"), (["x", "y"], "'a', 'b'")],
)
def test_ids_that_do_not_match_are_listed(captions: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        CaptionScorer(REFERENCES, metrics=["bleu"])(captions)


def test_only_the_first_of_many_ids_are_listed() -> None:
    many = {str(i): ["x"] for i in range(100)}
    with pytest.raises(DataError, match=r"'4', \.\.\. \(100\)"):
        CaptionScorer(many, metrics=["bleu"])({})


@pytest.mark.parametrize(
    ("references", "says"),
    [
        ({}, "No references"),
        ({"a": []}, "1 images have no reference"),
        ({"a": "a dog"}, "expected a list"),
        ({"a": [3]}, "expected a string"),
    ],
)
def test_references_of_the_wrong_kind_are_refused(references: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        CaptionScorer(references)


def test_a_whole_caption_among_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="has a space"):
        CaptionScorer(REFERENCES, metrics=["bleu"])({"a": ["a dog runs"], "b": ["a"]})


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'cider_d'.*bleu"):
        CaptionScorer(REFERENCES, metrics=["cider"])


def test_a_score_can_be_asked_for_by_its_own_name() -> None:
    assert list(CaptionScorer(REFERENCES, metrics=["bleu_4"])(CAPTIONS)) == ["bleu_4"]


def test_an_absent_score_names_those_there_are() -> None:
    scores = CaptionScorer(REFERENCES, metrics=["bleu"])(CAPTIONS)
    assert scores.get("cider_d") is None
    with pytest.raises(UnknownName, match="bleu_1"):
        scores["cider_d"]


def test_one_image_says_what_cider_needs() -> None:
    alone = CaptionScorer({"a": REFERENCES["a"]}, metrics=["cider_d"])({"a": "a dog runs"})
    assert "several images" in alone.notes[0]
    assert CaptionScorer(REFERENCES, metrics=["cider_d"])(CAPTIONS).notes == ()


def test_given_document_frequencies_make_one_image_meaningful() -> None:
    frequencies = DocumentFrequencies.from_counts({"a": 90, "dog": 10}, documents=100)
    cider = CiderD([[["a", "dog"]]], document_frequencies=frequencies)
    assert cider([["a", "dog"]])["cider_d"][0] > 1


def test_every_metric_works_offline_and_without_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("capdistill.metrics.meteor15.find_paraphrases", lambda: None)
    scores = CaptionScorer(REFERENCES)(CAPTIONS)
    assert set(scores) == set(DIRECTIONS) - {"meteor_1_5"}
    assert scores.notes == ()


def _length(references: dict, hypotheses: dict) -> dict:
    counts = {image: float(len(text.split())) for image, text in hypotheses.items()}
    return {"length": (sum(counts.values()) / len(counts), counts)}


def test_a_metric_of_the_users_own_gets_raw_text_and_has_a_direction() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["rouge_l", Metric(_length, {"length": "lower"})])
    scores = scorer(CAPTIONS)
    assert scorer.directions == {"rouge_l": "higher", "length": "lower"}
    assert scores["length"] == 3.0
    assert scores.per_image["length"] == {"a": 3.0, "b": 3.0}


def test_a_metric_without_a_direction_is_refused() -> None:
    for wrong in ({"length": "up"}, {}, {"": "higher"}, {3: "higher"}, "length", ["length"]):
        with pytest.raises(ConfigError, match="'higher' or 'lower'"):
            Metric(_length, wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="direction"):
        CaptionScorer(REFERENCES, metrics=[Metric(_length, {"other": "lower"})])(CAPTIONS)


def test_a_metric_that_leaves_out_an_image_is_refused() -> None:
    def partial(references: dict, hypotheses: dict) -> dict:
        return {"half": (1.0, [1.0])}

    scorer = CaptionScorer(REFERENCES, metrics=[Metric(partial, {"half": "higher"})])
    with pytest.raises(DataError, match="scores of 1 images"):
        scorer(CAPTIONS)


def test_scores_show_the_corpus_and_not_every_image():
    scores = CaptionScorer({"a": ["a dog"]}, metrics=["rouge_l"])({"a": "a dog"})
    assert repr(scores) == "Scores(rouge_l=1.0000)"


def _kind(value: object) -> str:
    return type(value).__name__


NO_TEXT = [None, math.nan, 3, True, b"a dog", b"", {"raw": "a dog"}, object(), [3], ["a", None]]
PRINTED = ["['a dog', 'a cat']", "{'raw': 'a dog'}", "b'a dog'"]


@pytest.mark.parametrize("value", [*NO_TEXT, *PRINTED], ids=_kind)
def test_a_caption_that_is_not_text_is_refused_with_its_image(value: object) -> None:
    captions, references = {"a": "a dog", "b": value}, {**REFERENCES, "b": ["a red car", value]}
    scorer = CaptionScorer(REFERENCES, metrics=["bleu"])
    for refused in (
        lambda: scorer(captions),
        lambda: scorer.update(captions),
        lambda: CaptionScorer(references, metrics=["bleu"]),
        lambda: DocumentFrequencies.count(references),
        lambda: paired_bootstrap(REFERENCES, CAPTIONS, captions, ["bleu"]),
        lambda: diversity(captions),
        *(lambda score=score: score(REFERENCES, captions) for score in (bleu, rouge_l, cider_d)),
        *(lambda score=score: score(references, CAPTIONS) for score in (meteor_nltk, meteor_1_5)),
    ):
        with pytest.raises(DataError, match=r"image 'b'.*expected a string"):
            refused()
    with pytest.raises(DataError, match=r"Training caption 2 .*expected a string"):
        diversity(CAPTIONS, training_captions=["a dog", value])


@pytest.mark.parametrize("value", [None, math.nan, 3, b"a dog", {"raw": "a dog"}], ids=_kind)
def test_references_that_are_no_list_are_refused_with_their_image(value: object) -> None:
    with pytest.raises(DataError, match=r"references of image 'b' are .*expected a list"):
        CaptionScorer({**REFERENCES, "b": value})


@pytest.mark.parametrize("value", [None, 3, "ab", b"ab"], ids=_kind)
def test_captions_that_are_no_list_are_refused(value: object) -> None:
    with pytest.raises(DataError, match="expected a mapping by image"):
        CaptionScorer([["a"], ["b"]], metrics=["bleu"])(value)
    with pytest.raises(DataError, match="expected a mapping by image"):
        CaptionScorer(value)


def test_pairs_give_the_scores_of_a_mapping() -> None:
    expected = CaptionScorer(REFERENCES, metrics=["cider_d"])(CAPTIONS)
    scorer = CaptionScorer(list(REFERENCES.items()), metrics=["cider_d"])
    for pairs in (list(CAPTIONS.items()), CAPTIONS.items(), iter(CAPTIONS.items())):
        assert scorer(pairs).per_image == expected.per_image
    numbered = CaptionScorer(list(REFERENCES.values()), metrics=["cider_d"])
    assert numbered(list(enumerate(CAPTIONS.values())))["cider_d"] == expected["cider_d"]


def test_an_image_given_twice_is_refused_by_its_id() -> None:
    references, captions = list(REFERENCES.items()), list(CAPTIONS.items())
    scorer = CaptionScorer(REFERENCES, metrics=["bleu"])
    for refused in (
        lambda: CaptionScorer([*references, references[1]]),
        lambda: scorer([*captions, ("b", "a car")]),
        lambda: paired_bootstrap(references, captions, [*captions, captions[1]], ["bleu"]),
        lambda: DocumentFrequencies.count([*references, references[1]]),
    ):
        with pytest.raises(DataError, match="image 'b' twice"):
            refused()
    with pytest.raises(DataError, match="image 1 twice"):
        diversity([(1, "a dog"), (1, "a cat")])


def test_two_tokens_of_a_listed_caption_are_no_pair() -> None:
    scorer = CaptionScorer([["a dog"], ["a cat"]], metrics=["bleu_1"])
    assert scorer([("a", "dog"), ("a", "cat")])["bleu_1"] == pytest.approx(1)


def test_one_n_gram_counted_twice_is_refused() -> None:
    with pytest.raises(DataError, match="'a dog' twice"):
        DocumentFrequencies.from_counts({"a dog": 3, ("a", "dog"): 2}, documents=10)


def test_two_metrics_that_give_one_score_are_refused() -> None:
    own = Metric(_length, {"length": "lower"})
    shadow = Metric(lambda references, hypotheses: {}, {"bleu_1": "higher"})
    for metrics, name in (([own, own], "length"), (["bleu", shadow], "bleu_1")):
        with pytest.raises(ConfigError, match=f"two metrics give a score called '{name}'"):
            CaptionScorer(REFERENCES, metrics=metrics)


@pytest.mark.parametrize(
    "metrics", ["bleu", ["bleu"], ("bleu",), {"bleu"}, "bleu,", iter(["bleu"])]
)
def test_one_metric_is_given_alone_or_in_a_list(metrics: Any) -> None:
    scorer = CaptionScorer(REFERENCES, metrics=metrics)
    assert list(scorer(CAPTIONS)) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]


def test_names_of_metrics_are_also_text_and_an_own_metric_stands_alone() -> None:
    assert list(CaptionScorer(REFERENCES, metrics="bleu_4, rouge_l")(CAPTIONS)) == [
        "bleu_4",
        "rouge_l",
    ]
    own = Metric(_length, {"length": "lower"})
    assert list(CaptionScorer(REFERENCES, metrics=own)(CAPTIONS)) == ["length"]
    first, second = (dict.fromkeys(REFERENCES, text) for text in ("a dog", "a car"))
    assert list(paired_bootstrap(REFERENCES, first, second, "rouge_l", samples=9)) == ["rouge_l"]


@pytest.mark.parametrize(
    "metrics", ["", " , ", b"bleu", {"bleu": 1}, 3, _length, [_length], [None]], ids=_kind
)
def test_metrics_of_another_type_are_refused(metrics: object) -> None:
    with pytest.raises(ConfigError, match=r"metrics.*expected"):
        CaptionScorer(REFERENCES, metrics=metrics)


@pytest.mark.parametrize("captions", [None, ["a dog"], "a dog"])
def test_results_of_coco_are_made_of_captions_by_image(captions: Any) -> None:
    with pytest.raises(DataError, match=r"expected \{image: caption\}"):
        coco_results(captions)


def test_every_metric_works_without_a_home_directory() -> None:
    program = """
import os, pwd
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
for name in ("HOME", "XDG_CACHE_HOME", "NLTK_DATA"):
    os.environ.pop(name, None)
assert os.path.expanduser("~") == "~"
from capdistill.metrics import CaptionScorer
names = ["bleu", "rouge_l", "cider_d", "meteor_nltk", "meteor_1_5_nopara"]
scorer = CaptionScorer({"a": ["dogs ran"], "b": ["a sofa"]}, metrics=names)
scores = scorer({"a": "dog", "b": "couch"})
assert scores["meteor_nltk"] > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)


STEM_ENDINGS = (
    "ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness "
    "fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance "
    "ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize ed ing eed ied ies "
    "sses ss s y e ll"
)


def test_stems_are_those_of_nltk() -> None:
    from nltk.stem.porter import PorterStemmer

    stemmer, draw = PorterStemmer(), random.Random(0)
    words = {word for line in bleu_rouge_meteor._lines()[::20] for word in line.lower().split()}
    for ending in STEM_ENDINGS.split():
        for _ in range(100):
            start = "".join(draw.choices("abeiosytlzrn'", k=draw.randint(0, 6)))
            words |= {start + ending, start + ending + draw.choice(["s", "ed", "ing", "ly"])}
    words |= {"skies", "dying", "innings", "news", "3,000", "n't", "é", "-lrb-", "yyyy", ""}
    assert {w: bleu_rouge_meteor._stem(w) for w in words} == {w: stemmer.stem(w) for w in words}
