"""Counting over arrays against counting tuples, and the scores against pycocoevalcap's own code."""

import importlib.util
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.errors import ConfigError
from capdistill.metrics import Bleu, CiderD, DocumentFrequencies, RougeL
from capdistill.metrics.base import count_ngrams
from capdistill.metrics.ngram_counts import NgramIds, ReferenceNgrams

TEXT = st.lists(st.sampled_from("abcde"), max_size=9)
WORDED = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9)
CORPUS = st.lists(st.tuples(st.lists(WORDED, min_size=1, max_size=3), TEXT), min_size=1, max_size=5)
RANDOM = settings(deadline=None, max_examples=150)


@RANDOM
@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5))
def test_numbers_count_as_tuples_do(first: list[list[str]], then: list[list[str]]) -> None:
    ids = NgramIds()
    ids.count(first, keep=True)
    sizes = ids.sizes
    assert sizes == [
        len({g for t in first for g in count_ngrams(t) if len(g) == n}) for n in range(1, 5)
    ]
    for n, counted in enumerate(ids.count(then, keep=False), 1):
        wanted = [Counter({g: c for g, c in count_ngrams(t).items() if len(g) == n}) for t in then]
        expected = sorted((row, c) for row, each in enumerate(wanted) for c in each.values())
        assert sorted(zip(counted.rows.tolist(), counted.counts.tolist(), strict=True)) == expected
        assert len(set(counted.ids.tolist())) == len({g for each in wanted for g in each})
    assert ids.sizes == sizes


needs_coco = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap (extra coco) is absent"
)


@needs_coco
@RANDOM
@given(CORPUS)
def test_scores_of_random_captions_are_those_of_pycocoevalcap(corpus: list[Any]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu as TheirBleu
    from pycocoevalcap.cider.cider import Cider as TheirCider

    references, hypotheses = [list(each) for each in zip(*corpus, strict=True)]
    given = {i: [" ".join(text) for text in each] for i, each in enumerate(references)}
    said = {i: [" ".join(text)] for i, text in enumerate(hypotheses)}
    totals, each = TheirBleu(4).compute_score(given, said, verbose=0)
    ours = Bleu(references)(hypotheses)
    for n in range(4):
        assert ours[f"bleu_{n + 1}"][0] == pytest.approx(totals[n], abs=1e-9)
        assert ours[f"bleu_{n + 1}"][1] == pytest.approx(list(each[n]), abs=1e-9)
    total, scores = TheirCider().compute_score(given, said)
    found = CiderD(references)(hypotheses)["cider_d"]
    assert found[0] == pytest.approx(total, abs=1e-9)
    assert found[1] == pytest.approx(list(scores), abs=1e-9)


@needs_coco
@RANDOM
@given(st.lists(st.tuples(st.lists(WORDED, min_size=1, max_size=3), WORDED), min_size=1))
def test_rouge_l_of_random_captions_is_that_of_pycocoevalcap(corpus: list[Any]) -> None:
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = [list(each) for each in zip(*corpus, strict=True)]
    given = {i: [" ".join(text) for text in each] for i, each in enumerate(references)}
    said = {i: [" ".join(text)] for i, text in enumerate(hypotheses)}
    total, scores = Rouge().compute_score(given, said)
    found = RougeL(references)(hypotheses)["rouge_l"]
    assert found[0] == pytest.approx(total, abs=1e-9)
    assert found[1] == pytest.approx(list(scores), abs=1e-9)


def test_an_empty_caption_scores_0_even_where_a_reference_is_empty() -> None:
    found = RougeL([[[]], [["a"], []]])([[], []])["rouge_l"]
    assert found == (0.0, [0.0, 0.0])


def test_the_four_values_that_follow_from_published_counts() -> None:
    correct, guessed = (5732, 2510, 1043, 423), (9893, 8893, 7893, 6893)
    scores = Bleu.scores_of_sums(np.array([*correct, *guessed, 9893, 9893]))
    assert scores.round(3).tolist() == [0.579, 0.404, 0.279, 0.191]


def test_sums_of_counts_give_the_bleu_of_a_sample() -> None:
    references = [[["a", "dog", "runs", "far"]], [["a", "car"]], [["one", "more", "dog"]]]
    hypotheses = [["a", "dog"], ["the", "car"], ["one", "dog"]]
    scores, counts = Bleu(references)(hypotheses), Bleu(references).counts(hypotheses)
    corpus = Bleu.scores_of_sums(counts.sum(0))
    assert corpus.tolist() == [scores[f"bleu_{n}"][0] for n in (1, 2, 3, 4)]
    some = [0, 2, 2]
    sample = Bleu([references[i] for i in some])([hypotheses[i] for i in some])
    assert Bleu.scores_of_sums(counts[some].sum(0))[1] == pytest.approx(
        sample["bleu_2"][0], abs=1e-15
    )


def test_counted_references_are_shared_only_where_the_frequencies_are_known() -> None:
    frequencies = DocumentFrequencies.count([["a dog"], ["a car"]])
    references = [[["a", "dog"]]]
    counted = ReferenceNgrams(references, frequencies.ids)
    alone = CiderD(references, document_frequencies=frequencies)([["a", "dog"]])
    assert CiderD(counted, document_frequencies=frequencies)([["a", "dog"]]) == alone
    with pytest.raises(ConfigError, match="uncounted"):
        CiderD(ReferenceNgrams(references), document_frequencies=frequencies)


def test_given_frequencies_weigh_every_ngram_of_the_caption_also_those_no_reference_has() -> None:
    # By hand: idf of a, b, c is log(8) - log(1, 2, 4); tf-idf vectors (3, 2) and (3, 1) log 2.
    frequencies = DocumentFrequencies.from_counts({"a": 1, "b": 2, "c": 4}, documents=8)
    found = CiderD([[["a", "b"]]], document_frequencies=frequencies)([["a", "c"]])
    assert found["cider_d"][0] == pytest.approx(10 / 4 * 9 / math.sqrt(13 * 10), abs=1e-12)
