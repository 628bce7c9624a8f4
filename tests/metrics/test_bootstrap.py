"""The paired bootstrap against loops that score every resampled corpus, and against theory."""

import itertools
import json
import math

import numpy as np
import pytest

from capdistill.errors import ConfigError, DataError, UnknownName
from capdistill.metrics import (
    CaptionScorer,
    DocumentFrequencies,
    Metric,
    PairedScores,
    paired_bootstrap,
)
from capdistill.metrics.bootstrap import changed

SUBJECTS = ("a dog", "two children", "a man in red", "people", "the brown dog", "a woman")
VERBS = ("runs", "play with a ball", "rides a bicycle", "stand", "is running", "jumps")
PLACES = ("on grass", "in the snow", "down the street", "near the water", "", "outside")
SAYINGS = [" ".join(words).strip() for words in itertools.product(SUBJECTS, VERBS, PLACES)]
CLASSIC = ("bleu", "rouge_l", "cider_d", "meteor_nltk", "meteor_1_5_nopara")
IMAGES, SAMPLES, SEED = 12, 40, 7


def corpus(images: int = IMAGES, seed: int = 0) -> tuple[list[list[str]], list[str], list[str]]:
    """References, a system that often repeats one of them, and one that seldom does."""
    chance = np.random.default_rng(seed)
    said = [[str(s) for s in chance.choice(SAYINGS, 5, replace=False)] for _ in range(images)]
    good = [texts[0] if chance.random() < 0.5 else texts[3] for texts in said]
    bad = [texts[0] if chance.random() < 0.2 else texts[4] for texts in said]
    return [texts[:3] for texts in said], good, bad


@pytest.fixture(scope="module")
def rescored() -> tuple[PairedScores, dict[str, np.ndarray]]:
    """What was found, and both systems' scores of each sample by scoring it: (2, samples)."""
    references, a, b = corpus()
    a[3] = ""  # some samples have it twice, some not at all
    found = paired_bootstrap(references, a, b, CLASSIC, samples=SAMPLES, seed=SEED)
    frequencies = DocumentFrequencies.count(references)
    samples = np.random.default_rng(SEED).integers(IMAGES, size=(SAMPLES, IMAGES))
    scores: dict[str, list] = {name: [] for name in found}
    for sample in samples:  # an image that is drawn twice counts as two
        scorer = CaptionScorer(
            [references[i] for i in sample], metrics=CLASSIC, document_frequencies=frequencies
        )
        both = [scorer([system[i] for i in sample]) for system in (a, b)]
        for name, each in scores.items():
            each.append([one[name] for one in both])
    return found, {name: np.array(each).T for name, each in scores.items()}


NAMES = (
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "cider_d",
    "meteor_nltk",
    "meteor_1_5_nopara",
)


@pytest.mark.parametrize("name", NAMES)
def test_intervals_are_those_of_scoring_every_sample(name: str, rescored) -> None:
    found, scores = rescored
    a, b = scores[name]
    for interval, drawn in (
        (found[name].a_interval, a),
        (found[name].b_interval, b),
        (found[name].interval, b - a),
    ):
        assert interval == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_p_value_counts_the_samples_on_the_other_side_of_zero(name: str, rescored) -> None:
    found, scores = rescored
    a, b = scores[name]
    rarer = min(np.sum(b - a <= 1e-12), np.sum(b - a >= -1e-12))
    assert found[name].p_value == min(1, 2 * (rarer + 1) / (SAMPLES + 1))


def test_scores_are_the_scorers(rescored) -> None:
    found, _ = rescored
    references, a, b = corpus()
    a[3] = ""
    scorer = CaptionScorer(references, metrics=CLASSIC)
    ours, theirs = scorer(a), scorer(b)
    assert tuple(found) == NAMES == tuple(ours)
    for name, each in found.items():
        assert (each.a, each.b) == (ours[name], theirs[name])
        assert each.difference == theirs[name] - ours[name]


def test_equal_systems_do_not_differ() -> None:
    references, a, _ = corpus(50)
    for each in paired_bootstrap(references, a, list(a), CLASSIC, samples=200).values():
        assert (each.difference, each.interval, each.p_value) == (0, (0, 0), 1)
        assert each.a_interval == each.b_interval


def test_systems_the_other_way_round_give_the_opposite() -> None:
    references, a, b = corpus(30)
    there = paired_bootstrap(references, a, b, ["bleu_4", "rouge_l"], samples=99)
    back = paired_bootstrap(references, b, a, ["bleu_4", "rouge_l"], samples=99)
    for name, each in there.items():
        low, high = back[name].interval
        assert each.interval == pytest.approx((-high, -low), abs=1e-12)
        assert each.p_value == back[name].p_value
        assert each.a_interval == back[name].b_interval


def test_a_system_that_is_always_better_has_the_least_p_value() -> None:
    references, _, _ = corpus(20)
    perfect = [texts[0] for texts in references]
    found = paired_bootstrap(references, [""] * 20, perfect, ["rouge_l"], samples=999)["rouge_l"]
    assert (found.interval, found.p_value) == ((1, 1), 2 / 1000)


def test_the_same_seed_gives_the_same_samples_and_another_does_not() -> None:
    references, a, b = corpus()
    first, again, other = (paired_bootstrap(references, a, b, ["bleu"], seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["bleu_4"].interval != other["bleu_4"].interval


def test_many_images_are_drawn_in_parts_without_a_difference(monkeypatch) -> None:
    references, a, b = corpus()
    whole = paired_bootstrap(references, a, b, ["bleu", "cider_d"], samples=50)
    monkeypatch.setattr("capdistill.metrics.bootstrap._CELLS", 3 * IMAGES)
    parts = paired_bootstrap(references, a, b, ["bleu", "cider_d"], samples=50)
    for name, each in whole.items():
        assert each.interval == pytest.approx(parts[name].interval, abs=1e-12)
        assert each.p_value == parts[name].p_value


def of_numbers(a: np.ndarray, b: np.ndarray, **options) -> PairedScores:
    """The bootstrap of a metric whose score of an image is a number, the caption itself."""

    def number(references: dict, hypotheses: dict) -> dict:
        each = {image: float(text) for image, text in hypotheses.items()}
        return {"number": (sum(each.values()) / len(each), each)}

    captions = [[str(value) for value in values] for values in (a, b)]
    metric = Metric(number, {"number": "higher"})
    return paired_bootstrap([["x"]] * len(a), *captions, [metric], **options)


def test_an_interval_of_a_mean_is_the_one_of_theory() -> None:
    chance = np.random.default_rng(0)
    a = chance.normal(0.5, 0.1, 1000)
    b = a + chance.normal(0.01, 0.05, 1000)
    found = of_numbers(a, b, samples=4000)["number"]
    for interval, values in ((found.a_interval, a), (found.interval, b - a)):
        half = 1.96 * values.std() / math.sqrt(1000)
        assert interval == pytest.approx(values.mean() + np.array([-half, half]), abs=half / 20)


def test_equally_good_systems_are_told_apart_as_seldom_as_was_promised() -> None:
    chance = np.random.default_rng(1)
    pairs = [chance.normal(size=(2, 60)) for _ in range(300)]
    p_values = [of_numbers(*pair, samples=199)["number"].p_value for pair in pairs]
    for level in (0.05, 0.2, 0.5):
        expected = 3 * math.sqrt(level * (1 - level) / 300)  # three standard errors
        assert np.mean(np.array(p_values) < level) == pytest.approx(level, abs=expected)


def test_a_p_value_goes_with_its_interval() -> None:
    chance = np.random.default_rng(2)
    for _ in range(100):
        a, b = chance.normal([[0.0], [0.4]], 1.0, (2, 30))
        found = of_numbers(a, b, samples=199)["number"]
        if not 0.03 < found.p_value < 0.07:
            low, high = found.interval
            assert (found.p_value < 0.05) == (not low <= 0 <= high)


def _metric(corpus_score: float) -> Metric:
    def own(references: dict, hypotheses: dict) -> dict:
        return {"own": (corpus_score, dict.fromkeys(hypotheses, 0.5))}

    return Metric(own, {"own": "higher"})


@pytest.mark.parametrize("score", [0.5 + 1e-8, math.nan])
def test_a_score_that_is_no_mean_over_images_has_a_note_and_no_interval(score: float) -> None:
    references, a, b = corpus()
    found = paired_bootstrap(references, a, b, ["rouge_l", _metric(score)], samples=20)
    assert list(found) == ["rouge_l"]
    assert found.notes == ("own has no interval: it is not the mean of its per-image scores.",)
    with pytest.raises(UnknownName, match=r"No interval for 'own'.*not the mean"):
        found["own"]


def test_a_score_that_is_a_mean_over_images_has_an_interval() -> None:
    references, a, b = corpus()
    found = paired_bootstrap(references, a, b, [_metric(0.5)], samples=20)
    assert found["own"].interval == (0, 0)


def test_images_may_stand_in_any_order() -> None:
    references, a, b = (dict(enumerate(each)) for each in corpus())
    turned = {image: b[image] for image in reversed(b)}
    assert paired_bootstrap(references, a, b, CLASSIC) == paired_bootstrap(
        references, a, turned, CLASSIC
    )


def test_one_image_gets_a_note() -> None:
    found = paired_bootstrap([["a dog"]], ["a dog"], ["a cat"], ["bleu_1"])
    assert found["bleu_1"].interval == pytest.approx((-0.5, -0.5), abs=1e-6)
    assert "single image" in found.notes[0]


def test_what_was_found_prints_as_a_table_and_is_plain_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.__stdout__", None)
    monkeypatch.setenv("COLUMNS", "200")
    references, a, b = corpus()
    found = paired_bootstrap(references, a, b, ["bleu_4"], samples=100, confidence=0.9)
    _, row, remark = str(found).splitlines()
    low, high = found["bleu_4"].interval
    assert row.startswith("bleu_4")
    assert f"{found['bleu_4'].difference:+.4f} [{low:.4f}, {high:.4f}], p = " in row
    assert remark.startswith("In brackets: 90 % intervals from 100 paired bootstrap samples")
    content = json.loads(json.dumps(found.to_json()))
    assert content["scores"]["bleu_4"]["interval"] == [low, high]
    assert (content["images"], content["samples"], content["seed"]) == (IMAGES, 100, 0)


@pytest.mark.parametrize("width", [80, 100])
def test_the_printed_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.__stdout__", None)
    monkeypatch.setenv("COLUMNS", str(width))
    references, a, b = corpus()
    found = paired_bootstrap(references, a, b, ["bleu", "cider_d"], samples=20)
    table = str(found).rsplit("In brackets", 1)[0]
    assert max(map(len, table.splitlines())) <= width
    assert len(repr(found).splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("samples", value) for value in (0, -5, True, 1e3, "1000", None, math.nan)),
        *(("confidence", value) for value in (95, 0, 1, "0.9", True, math.nan, math.inf)),
        *(("seed", value) for value in (-1, 1.5, "0", True)),
    ],
)
def test_an_option_out_of_range_is_an_error(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"paired_bootstrap: {option}="):
        paired_bootstrap([["a"]], ["a"], ["a"], **{option: value})


def test_a_difference_within_rounding_has_no_p_value_below_1() -> None:
    def nearly(references: dict, hypotheses: dict) -> dict:
        each = {i: 0.5 + 1e-10 * (text == "b") for i, text in hypotheses.items()}
        return {"nearly": (sum(each.values()) / len(each), each)}

    references = [["x"]] * 20
    own = Metric(nearly, {"nearly": "higher"})
    found = paired_bootstrap(references, ["a"] * 20, ["b"] * 20, [own])["nearly"]
    assert (found.interval, found.p_value) == ((0, 0), 1)


def test_bleu_that_is_only_its_smoothing_does_not_differ() -> None:
    references = [["a dog runs on the grass today"]] * 20
    a, b = ["x y z v w"] * 20, ["x y z v w u t s r q"] * 20
    found = paired_bootstrap(references, a, b, ["bleu"])
    assert 0 < abs(found["bleu_4"].difference) < 1e-3
    assert {each.p_value for each in found.values()} == {1}


def test_scores_near_0_do_not_differ() -> None:
    references = [["a dog runs on grass"], *[["two children play ball"]] * 999]
    a = ["x y z"] * 1000
    found = paired_bootstrap(references, a, [*a[:-1], "x ball"], samples=200)
    assert 0 < found["bleu_1"].difference < 1e-3
    assert {each.p_value for each in found.values()} == {1}


def test_rounded_differences_have_no_negative_zero() -> None:
    assert changed(-1e-6, (-1e-6, 1e-6), 1.0) == "+0.0000 [0.0000, 0.0000], p = 1.000"


def test_the_bootstrap_aligns_no_caption_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from capdistill.metrics.meteor15 import metric

    calls = []
    align = metric.align
    monkeypatch.setattr(metric, "align", lambda matches: calls.append(1) or align(matches))
    references, a, b = corpus()
    paired_bootstrap(references, a, b, ["meteor_1_5_nopara"], samples=10)
    assert len(calls) == 2 * sum(map(len, references))


def test_a_caption_too_few_is_an_error() -> None:
    with pytest.raises(DataError, match="not of the same images"):
        paired_bootstrap([["a"], ["b"]], ["a", "b"], ["a"], ["bleu"])
