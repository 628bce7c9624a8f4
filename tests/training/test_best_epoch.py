"""Case 11: which epoch is the best, when a run stops, and that a NaN is no progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from capdistill import Captioner, Trainer
from capdistill.errors import ConfigError, UnknownName
from capdistill.metrics import Metric
from capdistill.training.history import History
from capdistill.training.monitor import Monitor, resolve_monitor
from tests.training import tiny_models as tiny

NAN = math.nan
TABLE = [
    ("CIDEr", [0.10, 0.35, NAN, 0.30, 0.36, 0.20, 0.20, 0.20, 0.50], 4, 7),
    ("loss", [2.0, 1.5, NAN, 1.4, 1.6, 1.6, 1.6, 1.0], 3, 6),
    ("CIDEr", [NAN, 0.10, 0.05, 0.04, 0.03], 1, 4),
    ("CIDEr", [NAN, NAN, NAN, NAN], None, 2),
    ("BLEU-4", [0.2, 0.2, 0.2, 0.2], 0, 3),
]
KEYS = {"CIDEr": "cider_d", "BLEU-4": "bleu_4", "loss": "loss"}
TRAIN, VAL = [tiny.make_batch([3, 1])], [tiny.make_batch([2, 2], first=5)]
MUTED = pytest.mark.filterwarnings("ignore:Epoch|No epoch|The best epoch:UserWarning")


class Scripted(Trainer):
    """A trainer whose validation gives a series; it keeps the weights of every epoch."""

    def __init__(
        self,
        captioner: Captioner,
        monitored: str,
        series: list[float],
        losses: list[float] | None = None,
    ) -> None:
        options = {**tiny.QUIET, "epochs": len(series), "patience": 3, "learning_rate": 0.01}
        super().__init__(captioner, monitor=monitored, **options)
        self.series, self.losses = series, losses or [1.0] * len(series)
        self.weights: dict[int, Any] = {}

    def validate(self, source: Any) -> tuple[dict[str, Any], dict[str, float]]:
        self.weights[self.epoch] = tiny.weights_of(self.captioner)
        value, name = self.series[self.epoch], KEYS[self.config.monitor]
        val = {"loss": self.losses[self.epoch], "terms": {}, "images": 2, "skipped": 0}
        scores = {"bleu_4": 0.5, "cider_d": 0.5}
        (val if name == "loss" else scores)[name] = value
        return val, scores


@MUTED
@pytest.mark.parametrize("trend", [0.0, -0.1, 0.1], ids=["level", "falling", "rising"])
@pytest.mark.parametrize(("monitored", "series", "best", "stops"), TABLE)
def test_best_epoch_and_early_stop(
    saveable: Callable[..., Captioner],
    tmp_path: Path,
    monitored: str,
    series: list[float],
    best: int | None,
    stops: int,
    trend: float,
) -> None:
    losses = [2.0 + trend * epoch for epoch in range(len(series))]
    trainer = Scripted(saveable(), monitored, series, losses)
    history = trainer.fit(TRAIN, VAL, out=tmp_path)
    assert history.epochs[-1]["epoch"] == stops
    assert (history.best and history.best["epoch"]) == best
    assert history.epochs[-1]["best"]["epoch"] == best
    kept = trainer.weights[stops if best is None else best]
    assert tiny.same_bits(trainer.captioner.state_dict(), kept)
    assert tiny.same_bits(Captioner.load(tmp_path / "best").state_dict(), kept)
    final = Captioner.load(tmp_path / "final").state_dict()
    assert tiny.same_bits(final, trainer.weights[stops])


@MUTED
def test_without_a_directory_the_best_weights_are_kept_in_memory() -> None:
    trainer = Scripted(tiny.make_student(), "CIDEr", [0.1, 0.3, 0.2, 0.2])
    trainer.fit(TRAIN, VAL)
    assert tiny.same_bits(trainer.captioner.state_dict(), trainer.weights[1])


def test_a_nan_is_reported_and_so_is_having_no_best_epoch() -> None:
    with pytest.warns(UserWarning, match="NaN") as caught:
        Scripted(tiny.make_student(), "CIDEr", [NAN, NAN, NAN, NAN]).fit(TRAIN, VAL)
    said = [str(warning.message) for warning in caught]
    assert said[0] == "Epoch 1: cider_d is NaN, which counts as no progress."
    assert said[-1].startswith("No epoch had a number for cider_d")
    assert "last weights were kept" in said[-1]


class StopAfter:
    """What a user does who stops a run by hand."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, trainer: Trainer, row: Any) -> None:
        trainer.stopping |= row["epoch"] == self.epoch


@MUTED
def test_a_resumed_run_keeps_its_best_epoch_and_its_patience(
    saveable: Callable[..., Captioner], tmp_path: Path
) -> None:
    monitored, series, best, stops = TABLE[0]
    first = Scripted(saveable(), monitored, series)
    first.fit(TRAIN, VAL, out=tmp_path, callbacks=[StopAfter(5)])
    assert len(first.history.epochs) == 6

    again = Scripted(saveable(seed=9), monitored, series)
    history = again.fit(TRAIN, VAL, out=tmp_path, resume=True)
    assert [row["epoch"] for row in history.epochs] == list(range(stops + 1))
    assert history.best is not None
    assert history.best["epoch"] == best
    kept = first.weights[4]
    assert tiny.same_bits(again.captioner.state_dict(), kept)
    assert tiny.same_bits(Captioner.load(tmp_path / "best").state_dict(), kept)


@MUTED
@pytest.mark.filterwarnings("ignore:The resumed run continues with other options:UserWarning")
def test_a_run_that_stopped_early_stays_stopped(
    saveable: Callable[..., Captioner], tmp_path: Path
) -> None:
    monitored, series, _, stops = TABLE[2]
    Scripted(saveable(), monitored, series).fit(TRAIN, VAL, out=tmp_path)
    written = (tmp_path / "run.json").read_bytes()
    again = Scripted(saveable(), monitored, [*series, 9.0, 9.0])
    with pytest.warns(UserWarning, match="max_grad_norm.*complete already, so they change nothing"):
        history = again.fit(TRAIN, VAL, out=tmp_path, resume=True, max_grad_norm=7.0)
    assert (tmp_path / "run.json").read_bytes() == written
    assert history.epochs[-1]["epoch"] == stops
    assert again.weights == {}


def test_an_unknown_score_fails_before_the_first_step_with_the_names() -> None:
    trainer = Trainer(tiny.make_student(), monitor="cidre", **tiny.QUIET)
    with pytest.raises(UnknownName, match=r"'cidre'.*Did you mean 'cider'.*bleu_4.*loss"):
        trainer.fit(TRAIN, VAL)
    assert trainer.step_count == 0


def test_a_score_of_ones_own_is_watched_in_the_direction_it_declares() -> None:
    lengths = iter([5.0, 3.0, 4.0])

    def length(references: Any, hypotheses: Any) -> Any:
        value = next(lengths)
        return {"length": (value, dict.fromkeys(hypotheses, value))}

    trainer = Trainer(tiny.make_student(), monitor="length", epochs=3, **tiny.QUIET)
    trainer.metrics = ("bleu_1", Metric(length, {"length": "lower"}))
    history = trainer.fit(TRAIN, VAL)
    assert set(history.epochs[0]["scores"]) == {"bleu_1", "length"}
    assert history.best is not None
    assert history.best["epoch"] == 1


@given(st.lists(st.floats(0, 10) | st.just(NAN), min_size=1, max_size=12), st.booleans())
def test_the_best_epoch_is_the_first_extreme_of_the_numbers(
    series: list[float], higher: bool
) -> None:
    monitor = Monitor("x", higher=higher)
    for value in series:
        monitor.update(value)
    numbers = [value for value in series if not math.isnan(value)]
    best = (max if higher else min)(numbers, default=None)
    assert monitor.best == best
    assert monitor.best_epoch == (None if best is None else series.index(best))


def test_a_score_that_is_not_measured_says_how_to_have_it_measured():
    with pytest.raises(UnknownName, match=r"'rouge_l' is measured.*metrics=\(\.\.\., 'rouge_l'\)"):
        resolve_monitor("rouge_l", {"cider_d": True})


def test_a_score_of_ones_own_is_monitored_by_its_own_name() -> None:
    assert resolve_monitor("Words-1", {"Words-1": True, "cider_d": True}) == ("Words-1", True)
    assert resolve_monitor("CIDEr", {"Words-1": True, "cider_d": True}) == ("cider_d", True)
    with pytest.raises(ConfigError, match="'loss', which is the validation loss"):
        resolve_monitor("cider_d", {"loss": True, "cider_d": True})


def test_an_image_without_a_caption_in_validation_is_a_warning_and_scores_as_empty() -> None:
    def poisoned(module: Any, given: Any, maps: Tensor) -> Tensor:
        even = given[0].flatten(2).std(2).amax(1) == 0  # (I,)
        return maps.masked_fill(even[:, None, None, None], NAN)

    student, batch = tiny.make_student(), tiny.make_batch([2, 2, 2], first=5)
    student.encoder.conv.register_forward_hook(poisoned)
    trainer = Trainer(student, monitor="bleu_1", **tiny.QUIET)
    scored: dict[str, str] = {}

    def record(references: Any, captions: dict[str, str], metrics: Any) -> dict[str, float]:
        scored.update(captions)
        return {"bleu_1": 0.5}

    trainer._scorer = record  # type: ignore[assignment]
    batch.images[[0, 2]] = 255
    with pytest.warns(UserWarning, match=r"empty caption and 1 more like it\. Image '5': .* NaN"):
        trainer.fit(TRAIN, [batch], epochs=1, min_length=1)
    assert [bool(text) for text in scored.values()] == [False, True, False]


# -- scores near 0 ----------------------------------------------------------------------------


@MUTED
def test_while_scores_are_near_0_the_validation_loss_decides() -> None:
    """As in a small first run: the loss falls long before a caption scores."""
    scores = [0.0068, 0.0, 0.001, 0.002, 0.0, 0.004, 0.03, 0.12, 0.25, 0.24]
    losses = [5.7, 5.2, 4.9, 4.7, 4.5, 4.3, 4.2, 4.15, 4.13, 4.2]
    trainer = Scripted(tiny.make_student(), "CIDEr", scores, losses)
    history = trainer.fit(TRAIN, VAL)
    assert [row["improved"] for row in history.epochs] == [True] * 9 + [False]
    assert history.best is not None
    assert history.best["epoch"] == 8
    assert history.stopped == "all 10 epochs are done"


@MUTED
def test_a_loss_that_no_longer_falls_ends_a_run_whose_scores_stay_near_0() -> None:
    losses = [5.0, 4.0, 3.0, 3.1, 3.2, 3.3, 3.4]
    trainer = Scripted(tiny.make_student(), "CIDEr", [0.01, 0.0, 0.0, 0.02, 0.03, 0.0, 0.0], losses)
    history = trainer.fit(TRAIN, VAL)
    assert history.best is not None
    assert (history.best["epoch"], history.epochs[-1]["epoch"]) == (2, 5)
    assert history.stopped == "no progress in cider_d for 3 epochs (patience=3)"


def test_a_loss_of_nan_in_the_first_epoch_does_not_stay_the_best() -> None:
    monitor = Monitor("cider_d", meaningful=0.05)
    assert [monitor.update(0.0, loss) for loss in (NAN, 4.0, 5.0, 3.0)] == [True, True, False, True]


def test_a_first_epoch_that_stays_best_while_the_loss_falls_is_a_warning() -> None:
    losses = [5.0, 4.0, 3.0, 2.0]
    with pytest.warns(
        UserWarning, match=r"best epoch by cider_d is the first.*from 5\.000 to 2\.000"
    ):
        Scripted(tiny.make_student(), "CIDEr", [0.3, 0.2, 0.2, 0.2], losses).fit(TRAIN, VAL)


def test_the_reason_of_every_end_is_recorded_and_printed(
    saveable: Callable[..., Captioner], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[Any, list[float], str]] = [
        ([], [0.1, 0.2], "all 2 epochs are done"),
        ([StopAfter(0)], [0.1, 0.2], "a callback asked for it"),
        ([], [0.3, 0.2, 0.2, 0.2, 0.9], "no progress in cider_d for 3 epochs (patience=3)"),
    ]
    for number, (callbacks, series, reason) in enumerate(cases):
        trainer = Scripted(saveable(), "CIDEr", series)
        out = tmp_path / str(number)
        history = trainer.fit(TRAIN, VAL, out=out, callbacks=callbacks, progress=None)
        assert history.stopped == reason
        assert History.load(out / "history.jsonl").stopped == reason
        assert f"stopped: {reason}" in capfd.readouterr().err


def test_the_monitored_score_is_measured_without_being_asked_for() -> None:
    trainer = Trainer(tiny.make_student(), monitor="rouge_l", metrics=["bleu"], **tiny.QUIET)
    history = trainer.fit(TRAIN, VAL, epochs=1)
    assert set(history.epochs[0]["best"]) == {"epoch", "rouge_l"}
    trainer = Trainer(tiny.make_student(), monitor="loss", metrics=["bleu_1"], **tiny.QUIET)
    assert set(trainer.fit(TRAIN, VAL, epochs=1).epochs[0]["scores"]) == {"bleu_1"}
    trainer.metrics = "rouge_l"
    assert set(trainer.fit(TRAIN, VAL, epochs=1).epochs[0]["scores"]) == {"rouge_l"}
