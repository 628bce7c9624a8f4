"""Beam search: case 12 by hand, every hypothesis enumerated, and the same search in loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.errors import ConfigError
from capdistill.generation import GenerationConfig, GenerationSpec, beam_search, generate, search
from capdistill.generation.choice import _keys, stable_topk
from capdistill.generation.search import BeamSearch, unfinished_images
from tests.generation.decoding_cases import (
    END,
    FORMS,
    LIMIT,
    PAD,
    START,
    A,
    B,
    Toy,
    all_same,
    decoder_a,
    decoder_b,
    ends_after,
    every_hypothesis,
    pictures,
    plain_beams,
    real,
    run_toy,
    same,
)

NORMALISATIONS = st.sampled_from(["none", "average", "gnmt"])


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_hypothesis_with_a_score(beam_size, broken):
    def table(position, number):
        return (0, 0, 0.1, broken if position == number else 0.5, 0.4)

    lost = [run_toy(table, 6, (number,), beam_size=beam_size)[0].score for number in (0, 1, 5)]
    assert not any(map(math.isfinite, lost))
    sound = run_toy(table, 6, (0, 9), beam_size=beam_size)[1]
    assert same(sound, run_toy(table, 6, (9,), beam_size=beam_size)[0])


@pytest.mark.parametrize("beam_size", [1, 3, 5, 10])
@pytest.mark.parametrize("normalisation", ["none", "average", "gnmt"])
def test_case_12_a_where_nothing_ends_the_best_unfinished_caption_is_given(
    beam_size, normalisation
):
    (found,) = run_toy(decoder_a, 6, beam_size=beam_size, length_normalisation=normalisation)
    assert (found.tokens, found.finished) == ((A,) * 6, False)
    assert found.log_prob == pytest.approx(-3.0649537, abs=1e-7)
    (short,) = run_toy(decoder_a, 1, beam_size=beam_size, length_normalisation=normalisation)
    assert short.tokens == (A,)


@pytest.mark.parametrize(
    ("options", "tokens", "log_prob", "score"),
    [
        ({"length_normalisation": "none"}, (), -0.9162907, -0.9162907),
        ({"length_normalisation": "average"}, (A,) * 4, -1.2315496, -0.2463099),
        ({"length_normalisation": "none", "min_length": 1}, (A,) * 4, -1.2315496, -1.2315496),
        ({"length_normalisation": "average", "min_length": 1}, (A,) * 4, -1.2315496, -0.2463099),
    ],
)
def test_case_12_b_plain_sums_prefer_nothing_and_averages_do_not(options, tokens, log_prob, score):
    (found,) = run_toy(decoder_b, 8, beam_size=5, length_penalty=1.0, **options)
    assert (found.tokens, found.finished) == (tokens, True)
    assert found.log_prob == pytest.approx(log_prob, abs=1e-7)
    assert found.score == pytest.approx(score, abs=1e-7)


@settings(deadline=None, max_examples=12)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 99),
    normalisation=NORMALISATIONS,
    alpha=st.sampled_from([0.5, 1.0, 2.0]),
    stop=st.sampled_from([False, "never"]),
)
def test_law_8_as_many_beams_as_captions_find_the_best_of_all(
    form, seed, normalisation, alpha, stop
):
    decoder, (picture,) = real(form, seed, vocabulary=5), pictures(1, seed)
    config = GenerationConfig(
        beam_size=4**3,  # four tokens may be said, three places: V^T
        num_return=40,
        length_normalisation=normalisation,
        length_penalty=alpha,
        early_stopping=stop,
    )
    spec = GenerationSpec(START, END, 3, config, banned=(START,))
    (found,) = generate(decoder, picture[None], spec)
    every = sorted(every_hypothesis(decoder, picture, spec, 5), key=lambda h: -h.score)
    assert len(every) == 1 + 3 + 9 + 27
    assert len(found.n_best) == 40
    assert all_same(found.n_best, every)


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 999),
    beams=st.integers(2, 5),
    normalisation=NORMALISATIONS,
    alpha=st.sampled_from([0.0, 0.6, 1.0, 1.7, -0.5]),
    stop=st.sampled_from([False, True, "never"]),
    banned=st.sampled_from([(), (PAD, START)]),
)
def test_the_batched_search_is_the_search_in_loops(
    form, seed, beams, normalisation, alpha, stop, banned
):
    decoder, images = real(form, seed), pictures(3, seed)
    config = GenerationConfig(
        beam_size=beams,
        num_return=beams,
        length_normalisation=normalisation,
        length_penalty=alpha,
        early_stopping=stop,
    )
    spec = GenerationSpec(START, END, LIMIT, config, banned=banned)
    for found, picture in zip(generate(decoder, images, spec), images, strict=True):
        expected = plain_beams(decoder, picture, spec)
        assert same(found, expected[0])
        assert all_same(found.n_best, expected)


@settings(deadline=None, max_examples=25)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 999),
    groups=st.sampled_from([(4, 2), (3, 3), (6, 3), (6, 2)]),
    strength=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    stop=st.sampled_from([False, True, "never"]),
)
def test_diverse_groups_are_those_of_the_paper_in_loops(form, seed, groups, strength, stop):
    decoder, images = real(form, seed), pictures(3, seed)
    beams, count = groups
    config = GenerationConfig(
        beam_size=beams,
        num_return=beams,
        beam_groups=count,
        diversity_penalty=strength,
        early_stopping=stop,
    )
    spec = GenerationSpec(START, END, LIMIT, config, banned=(PAD, START))
    for found, picture in zip(generate(decoder, images, spec), images, strict=True):
        expected = plain_beams(decoder, picture, spec)
        assert all_same(found.n_best, expected)


def test_diverse_groups_say_other_words_at_the_same_place():
    decoder, images = real("transformer", 3), pictures(6)
    options = {"beam_size": 3, "num_return": 3, "max_length": 4, "start_id": START, "end_id": END}
    found = beam_search(decoder, images, beam_groups=3, diversity_penalty=100.0, **options)
    for hypothesis in found:
        firsts = [each.tokens[:1] for each in hypothesis.n_best]
        assert len(set(firsts)) == 3


@settings(deadline=None, max_examples=30)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 999),
    images=st.integers(2, 9),
    options=st.sampled_from(
        [
            {"beam_size": 1},
            {"beam_size": 3, "num_return": 3},
            {"beam_size": 4, "num_return": 2, "early_stopping": "never", "no_repeat_ngram": 2},
            {"beam_size": 4, "num_return": 4, "beam_groups": 2, "diversity_penalty": 0.5},
            {"sample": True, "num_return": 3, "seed": 5, "top_p": 0.9},
        ]
    ),
)
def test_law_8_an_image_alone_or_in_a_batch_gets_the_same_hypotheses(form, seed, images, options):
    decoder, features = real(form, seed), pictures(images, seed)
    spec = GenerationSpec(START, END, LIMIT, GenerationConfig(**options), banned=(PAD, START))
    keys = torch.arange(images) * 7
    together = generate(decoder, features, spec, keys)
    for i in range(images):
        (alone,) = generate(decoder, features[i : i + 1], spec, keys[i : i + 1])
        assert same(together[i], alone)
        assert all_same(together[i].n_best, alone.n_best)


def kept_of(kept, image: int) -> dict[tuple, float]:
    """Words and end of what is kept of an image -> score."""
    columns = (kept.tokens, kept.lengths, kept.ended, kept.scores)
    rows = zip(*(column[image].tolist() for column in columns), strict=True)
    return {(*tokens[:n], ended): score for tokens, n, ended, score in rows}


@settings(deadline=None, max_examples=20)
@given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 999))
def test_what_is_kept_never_changes_and_is_displaced_by_better_alone(form, seed):
    decoder, images = real(form, seed), pictures(2, seed)
    spec = GenerationSpec(START, END, LIMIT, GenerationConfig(beam_size=3, early_stopping="never"))
    seen: list[list[dict]] = []

    class Watched(BeamSearch):
        def _keep(self, *args):
            super()._keep(*args)
            seen.append([kept_of(self.kept, i) for i in range(len(self.kept.images))])

    with torch.no_grad():
        Watched(decoder, images, spec).run()
    for before, after in pairwise(seen):
        if len(before) == len(after):  # no image has left
            for old, new in zip(before, after, strict=True):
                gone = [s for tokens, s in old.items() if tokens not in new and s > -math.inf]
                assert all(new[tokens] == old[tokens] for tokens in old if tokens in new)
                assert max(gone, default=-math.inf) <= min(new.values())


def test_images_that_are_done_leave_the_batch_with_their_beams():
    toy = Toy(ends_after)
    found = run_toy(toy, 12, numbers=[2, 0, 5], beam_size=2, early_stopping=True)
    assert [h.finished for h in found] == [True] * 3
    assert [len(h.tokens) for h in found] == [2, 0, 5]
    assert toy.rows_seen[0] == 3  # one row an image reads the start
    assert toy.rows_seen[1] == 6
    assert toy.rows_seen[-1] == 2
    assert len(toy.rows_seen) < 12


def test_ties_go_to_the_smaller_id_and_the_earlier_beam():
    (found,) = run_toy(lambda *_: (0.2,) * 5, 2, beam_size=3, num_return=3, min_length=2)
    assert [h.tokens for h in found.n_best] == [(0, 0), (0, 1), (0, 3)]


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, -1.0, -1.5, 2.0, -math.inf]), min_size=7, max_size=7),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_best_are_those_of_a_stable_sort(rows, count, dtype):
    scores = torch.tensor(rows, dtype=dtype)
    values, index = stable_topk(scores, count)
    for row, found, at in zip(rows, values.tolist(), index.tolist(), strict=True):
        expected = sorted(range(7), key=lambda i: (-row[i], i))[:count]
        alive = [i for i in expected if row[i] > -math.inf]
        assert at[: len(alive)] == alive
        assert found == [row[i] for i in expected] + [-math.inf] * (count - len(expected))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_keys_are_distinct_and_in_the_order_of_score_and_index(scores):
    keys = _keys(torch.tensor([scores])).tolist()[0]
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert sorted(range(len(scores)), key=lambda i: -keys[i]) == expected
    assert len(set(keys)) == len(keys)


def test_a_beam_larger_than_the_vocabulary_is_filled_as_far_as_there_are_captions():
    (found,) = run_toy(decoder_a, 1, beam_size=10, num_return=10)
    assert [h.tokens for h in found.n_best[:2]] == [(A,), (B,)]
    assert found.n_best[2].log_prob == -math.inf


def test_a_vocabulary_that_is_banned_whole_is_refused():
    with pytest.raises(ConfigError, match="All 9 ids are banned"):
        beam_search(
            real("parallel", 0),
            pictures(1),
            start_id=START,
            end_id=END,
            max_length=3,
            beam_size=2,
            banned=range(9),
        )


def test_no_image_gives_no_caption():
    assert run_toy(decoder_a, 3, numbers=[], beam_size=3) == []


@pytest.mark.parametrize("form", sorted(FORMS))
def test_half_precision_features_give_finite_scores(form):
    decoder = real(form, 0).bfloat16()
    found = beam_search(
        decoder,
        pictures(3).bfloat16(),
        start_id=START,
        end_id=END,
        max_length=LIMIT,
        beam_size=3,
    )
    assert all(math.isfinite(h.score) and h.log_prob <= 0 for h in found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample": True, "num_return": 2},
        {"beam_size": 3, "num_return": 3},
        {"beam_size": 4, "num_return": 4, "beam_groups": 2, "diversity_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("every", [4, 100])
def test_whether_done_images_leave_at_once_late_or_never_changes_nothing(
    options, every, monkeypatch
):
    """An accelerator is looked at every few words only; here the CPU is treated so."""
    decoder, images = real("transformer", 5), pictures(7)
    spec = GenerationSpec(START, END, 12, GenerationConfig(**options), banned=(PAD, START))
    expected = generate(decoder, images, spec)
    assert len({len(hypothesis.tokens) for hypothesis in expected}) > 1

    def late(done, position):
        return unfinished_images(done, position) if position % every == every - 1 else None

    monkeypatch.setattr(search, "unfinished_images", late)
    for one, other in zip(generate(decoder, images, spec), expected, strict=True):
        assert same(one, other)
        assert all_same(one.n_best, other.n_best)
