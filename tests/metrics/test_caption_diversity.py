"""Figures are counted by hand."""

import json
import math
from dataclasses import astuple

import pytest

from capdistill.errors import DataError
from capdistill.metrics import diversity

SAID = {
    "1": "A dog runs.",  # a dog runs
    "2": "a dog runs",
    "3": "a red car and a red bus",  # "a red" stands twice
    "4": "...",
}


def test_figures_are_those_counted_by_hand() -> None:
    found = diversity(SAID)
    assert (found.captions, found.words, found.vocabulary) == (4, 13, 7)
    assert found.mean_length == 13 / 4
    assert found.distinct_1 == 7 / 13
    assert found.distinct_2 == 7 / 13  # a dog, dog runs, a red, red car, car and, and a, red bus
    assert (found.distinct_captions, found.repeats, found.empty) == (3 / 4, 1 / 4, 1 / 4)
    assert found.novel is None
    assert found.unfinished is None


def test_pairs_of_words_do_not_reach_into_the_next_caption() -> None:
    assert diversity(["a dog", "runs"]).distinct_2 == 1 / 3


def test_a_word_three_times_in_a_row_repeats_a_pair() -> None:
    assert diversity(["the the the", "the the"]).repeats == 1 / 2


def test_a_number_with_its_fraction_is_two_words_as_in_the_scores() -> None:
    assert diversity(["3 1/2 cups"]).words == 3


def test_novel_captions_have_words_and_are_no_training_caption() -> None:
    assert diversity(SAID, ["A DOG RUNS !", "a (red) car"]).novel == 1 / 4
    assert diversity(SAID, []).novel == 3 / 4
    assert diversity([["a", "-lrb-", "dog"]], ["a ( dog"]).novel == 0.0


def test_training_captions_can_be_tokens_or_an_iterator() -> None:
    assert diversity(["a dog"], iter([["a", "dog"]])).novel == 0.0


@pytest.mark.parametrize("said", [{}, [], {"1": ""}, ["", "..."]])
def test_nothing_said_gives_zeros_and_no_nan(said: object) -> None:
    found = diversity(
        said,
        training_captions=[""],
        finished=dict.fromkeys(said, True) if isinstance(said, dict) else [True] * len(said),
    )
    assert all(math.isfinite(figure) for figure in astuple(found))
    assert found.novel == found.unfinished == found.distinct_1 == found.mean_length == 0.0


def test_unfinished_is_the_share_that_did_not_end() -> None:
    flags = {"4": True, "3": False, "2": True, "1": True}
    assert diversity(SAID, finished=flags).unfinished == 1 / 4
    assert diversity(list(SAID.values()), finished=[False] * 4).unfinished == 1.0


@pytest.mark.parametrize("finished", [{"1": True}, [True] * 4, dict.fromkeys("abcd", True)])
def test_flags_of_other_captions_are_refused(finished: object) -> None:
    with pytest.raises(DataError, match="same ids"):
        diversity(SAID, finished=finished)


@pytest.mark.parametrize("texts", [("a dog", None), (["a dog"], "a dog")])
def test_a_lone_string_is_refused(texts: tuple) -> None:
    with pytest.raises(DataError, match=r"expected a (list|mapping)"):
        diversity(*texts)


def test_json_is_plain_and_has_every_figure() -> None:
    content = json.loads(json.dumps(diversity(SAID, []).to_json(), allow_nan=False))
    assert content["novel"] == 0.75
    assert len(content) == 12


def test_captions_that_end_on_a_function_word_are_counted() -> None:
    found = diversity(["a dog runs with a", "a dog in the", "a dog is", "a dog runs .", "", "the"])
    assert found.cut_short == 4 / 6
    assert diversity(["a man looks at it", "two dogs"]).cut_short == 0.0
