"""Rewards of many captions per image against the scores that a call gives one caption per image."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.errors import ConfigError, DataError, UnknownName
from capdistill.metrics import CaptionScorer, DocumentFrequencies, Metric

NAMES = ["bleu", "rouge_l", "cider_d", "meteor_nltk", "meteor_1_5_nopara"]
REFERENCES = {
    "a": ["A dog runs.", "the dog is running", "a brown dog"],
    "b": ["a red car"],
    "c": ["two men sit on a bench", "men sitting"],
}
WORDS = st.lists(st.sampled_from(["a", "dog", "red", "car", "men", "sit", "zebra"]), max_size=8)
CAPTIONS = st.lists(st.tuples(st.sampled_from("abc"), WORDS.map(" ".join)), max_size=12)


def single_scores(scorer: CaptionScorer, image: str, caption: str, name: str) -> float:
    """The score of a caption in a call where the other images have some caption."""
    return scorer({i: caption if i == image else "a" for i in REFERENCES}).per_image[name][image]


@settings(deadline=None, max_examples=60)
@given(CAPTIONS)
def test_a_reward_is_the_score_that_a_call_gives_the_image(captions: list[Any]) -> None:
    scorer = CaptionScorer(REFERENCES, metrics=NAMES)
    ids, texts = [i for i, _ in captions], [text for _, text in captions]
    for name in scorer.directions:
        expected = [single_scores(scorer, image, text, name) for image, text in captions]
        assert scorer.rewards(ids, texts, name).tolist() == pytest.approx(expected, abs=1e-12)


def test_frequencies_of_a_training_set_are_used() -> None:
    known = {**REFERENCES, "d": ["a bench"], "e": ["a dog on a red bench"]}
    frequencies = DocumentFrequencies.count(known)
    whole = CaptionScorer(known, metrics=["cider_d"])
    some = CaptionScorer(
        {"a": REFERENCES["a"]}, metrics=["cider_d"], document_frequencies=frequencies
    )
    texts = ["a dog runs", "the red dog"]
    found = some.rewards(["a", "a"], texts)
    assert found.tolist() == pytest.approx(whole.rewards(["a", "a"], texts).tolist(), abs=1e-12)
    assert found.min() > 0


def test_order_batches_and_repeated_captions_change_nothing() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d"])
    ids, texts = ["c", "a", "c", "b", "a"], ["two men", "a dog", "two men", "car", "the dog runs"]
    found = scorer.rewards(ids, texts)
    assert found[0] == found[2] > 0
    assert scorer.rewards(ids[::-1], texts[::-1])[::-1].tolist() == found.tolist()
    apart = [scorer.rewards([i], [text])[0] for i, text in zip(ids, texts, strict=True)]
    assert apart == found.tolist()
    once = scorer(dict.fromkeys(REFERENCES, "a dog"))
    scorer.rewards(["a"] * 9, ["unseen words here"] * 9)
    assert scorer(dict.fromkeys(REFERENCES, "a dog")).per_image == once.per_image


def test_a_mixture_is_the_weighted_sum() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d", "bleu_4", "rouge_l"])
    ids, texts = ["a", "a", "b"], ["a brown dog", "the dog is", "a red bus"]
    mixture = scorer.rewards(ids, texts, {"cider_d": 1.0, "bleu_4": 0.5, "rouge_l": -2})
    each = {name: scorer.rewards(ids, texts, name) for name in ("cider_d", "bleu_4", "rouge_l")}
    assert np.allclose(mixture, each["cider_d"] + 0.5 * each["bleu_4"] - 2 * each["rouge_l"])
    assert each["rouge_l"].min() > 0


def test_empty_captions_score_0_and_no_captions_give_nothing() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d", "bleu", "rouge_l"])
    for name in ("cider_d", "rouge_l"):
        assert scorer.rewards(["a", "b"], ["", "."], name).tolist() == [0, 0]
    assert scorer.rewards(["a"], [""], "bleu_4")[0] == pytest.approx(0, abs=1e-9)
    assert scorer.rewards([], []).shape == (0,)


def test_images_of_a_list_are_given_by_place_and_tokens_are_taken_as_they_are() -> None:
    scorer = CaptionScorer(list(REFERENCES.values()), metrics=["cider_d"])
    named = CaptionScorer(REFERENCES, metrics=["cider_d"])
    tokens = [["a", "dog", "runs"], ["A", "dog", "runs"]]
    texts = named.rewards(["a", "b"], ["A dog runs.", "a red car"]).tolist()
    assert scorer.rewards([0, 1], [tokens[0], "a red car"]).tolist() == texts
    lower, upper = scorer.rewards([0, 0], tokens)
    assert lower > upper


def test_unknown_images_are_named() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d"])
    with pytest.raises(DataError, match=r"Without references: 'x', 'y'\. Give each caption"):
        scorer.rewards(["a", "x", "y", "x"], ["a"] * 4)
    with pytest.raises(DataError, match=r"3 captions with 2 image ids"):
        scorer.rewards(["a", "b"], ["a"] * 3)
    with pytest.raises(DataError, match=r"image 'b'.*expected a string"):
        scorer.rewards(["a", "b"], ["a", math.nan])


def test_a_score_that_the_scorer_does_not_compute_is_refused() -> None:
    scorer = CaptionScorer(REFERENCES, metrics=["bleu"])
    with pytest.raises(UnknownName, match=r"rewards: no score 'cider_d'.*bleu_1"):
        scorer.rewards(["a"], ["a dog"])
    with pytest.raises(UnknownName, match=r"no score 'bleu4'.*'bleu_4'"):
        scorer.rewards(["a"], ["a dog"], {"bleu_1": 1, "bleu4": 1})


def test_a_metric_of_the_users_own_sees_each_caption_with_its_references() -> None:
    def known(references: dict, hypotheses: dict) -> dict:
        shares = [float(hypotheses[i] in references[i]) for i in hypotheses]
        return {"known": (sum(shares), shares), "other": (0.0, [9.0] * len(shares))}

    own = Metric(known, {"known": "higher", "other": "higher"})
    scorer = CaptionScorer(REFERENCES, metrics=["bleu", own])
    ids, texts = ["b", "b", "a"], ["a red car", "a car", "A dog runs."]
    assert scorer.rewards(ids, texts, "known").tolist() == [1, 0, 1]


@pytest.mark.parametrize("weight", ["1", None, float("nan"), True])
def test_weights_are_finite_numbers(weight: Any) -> None:
    scorer = CaptionScorer({"a": ["a dog"]}, metrics=["cider_d"])
    with pytest.raises(ConfigError, match="the weight of 'cider_d'"):
        scorer.rewards(["a"], ["a dog"], {"cider_d": weight})


@pytest.mark.parametrize("score", [None, {}, 3, ["cider_d"]])
def test_a_score_has_a_name(score: Any) -> None:
    scorer = CaptionScorer({"a": ["a dog"]}, metrics=["cider_d"])
    with pytest.raises(ConfigError, match="score="):
        scorer.rewards(["a"], ["a dog"], score)


@pytest.mark.parametrize(("ids", "texts"), [("a", ["a dog"]), (["a"], "x"), (None, None)])
def test_captions_and_ids_are_lists(ids: Any, texts: Any) -> None:
    scorer = CaptionScorer({"a": ["a dog"]}, metrics=["cider_d"])
    with pytest.raises(DataError, match="expected a list of them"):
        scorer.rewards(ids, texts)
