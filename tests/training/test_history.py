"""The records of a run: history rows, run.json, callbacks, progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capdistill import Captioner, Distiller, Trainer
from capdistill.errors import ConfigError, DataError
from capdistill.training.history import History
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
TRAIN = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]
WEIGHTS = {"ce": (1.0, 0.5), "token": 0.7, "hidden": lambda progress: 0.1}


def distilling(student: Captioner, **options: Any) -> Distiller:
    losses = {"token": {"name": "token", "temperature": 2.0}, "hidden": "hidden"}
    options = {**tiny.QUIET, "epochs": 2, "log_every": 1, **options}
    return Distiller(tiny.make_teacher(), student, losses=losses, weights=WEIGHTS, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_every_term_is_written_raw_and_weighted_for_training_and_validation(
    saveable: Make, tmp_path: Path
) -> None:
    history = distilling(saveable()).fit(TRAIN, TRAIN, out=tmp_path)
    written = lines(tmp_path / "history.jsonl")
    assert written == [json.loads(json.dumps(row)) for row in history.rows]
    assert [row["kind"] for row in written] == [*["step", "step", "epoch"] * 2, "end"]
    for row in written[:-1]:
        for part in [row] if row["kind"] == "step" else [row["train"], row["val"]]:
            assert set(part["terms"]) == {"ce", "token", "hidden"}
            weighted = sum(term["weighted"] for term in part["terms"].values())
            assert part["loss"] == pytest.approx(weighted)
    steps = [row for row in written if row["kind"] == "step"]
    shares = [row["terms"]["ce"]["weighted"] / row["terms"]["ce"]["raw"] for row in steps]
    assert shares == pytest.approx([1.0, 0.875, 0.75, 0.625])
    for row in steps:
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert row["gradient_norm"] > 0
        assert set(row["learning_rates"]) == {"encoder", "model"}
    for row in history.epochs:
        assert set(row["scores"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d"}
        assert row["best"]["epoch"] in (0, 1)
        assert row["seconds"] > 0


def test_the_history_can_be_read_while_training(saveable: Make, tmp_path: Path) -> None:
    seen = []

    class Reader:
        def on_step(self, trainer: Trainer, row: Any) -> None:
            seen.append(len(History.load(tmp_path / "history.jsonl")))

    distilling(saveable(), epochs=1).fit(TRAIN * 2, out=tmp_path, callbacks=[Reader()])
    assert seen == [0, 1, 2, 3]


def test_nan_is_null_and_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    history = History(path)
    row = {"kind": "epoch", "step": 1, "epoch": 0, "x": math.nan, "y": [math.inf, {"z": math.nan}]}
    history.append(row)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert History.load(path).rows == [{**row, "x": None, "y": [None, {"z": None}]}]
    assert "NaN" not in path.read_text()
    assert len(History(path, keep_until=1)) == 1
    assert len(History(path, keep_until=0)) == 0


def test_steps_are_logged_now_and_then(saveable: Make) -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, log_every=3)
    history = trainer.fit(TRAIN * 4, epochs=1)
    assert [row["step"] for row in history.steps] == [1, 3, 6]


def test_the_run_file_holds_what_is_needed_to_run_again(saveable: Make, tmp_path: Path) -> None:
    distilling(saveable(), seed=4).fit(TRAIN, out=tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["trainer"] == "Distiller"
    assert run["config"]["seed"] == 4
    assert run["config"]["epochs"] == 2
    assert (run["device"], run["precision"]) == ("cpu", "fp32")
    assert run["weights"]["ce"] == [1.0, 0.5]
    assert run["weights"]["hidden"].startswith("function")
    assert run["losses"]["token"] == {"name": "token", "temperature": 2.0}
    assert [model["name"] for model in run["models"]] == ["student", "teacher"]
    assert run["models"][0]["encoder"] == {"name": "patches", "kwargs": {}}
    assert torch.__version__.startswith(run["versions"]["torch"])


class Counting:
    """A callback with a state."""

    def __init__(self) -> None:
        self.steps = 0
        self.events: list[str] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self.events.append("start")

    def on_step(self, trainer: Trainer, row: Any) -> None:
        self.steps += 1
        row["counted"] = self.steps
        self.events.append("step")

    def on_epoch(self, trainer: Trainer, row: Any) -> None:
        self.events.append("epoch")
        trainer.stopping |= row["epoch"] == 0

    def on_fit_end(self, trainer: Trainer) -> None:
        self.events.append("end")

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Other(Counting):
    def on_epoch(self, trainer: Trainer, row: Any) -> None:
        pass


def test_callbacks_are_called_in_order_add_to_rows_and_keep_their_state(
    saveable: Make, tmp_path: Path
) -> None:
    first = Counting()
    distilling(saveable(), epochs=3).fit(TRAIN, TRAIN, out=tmp_path, callbacks=[first])
    assert first.events == ["start", "step", "step", "epoch", "end"]
    assert [row.get("counted") for row in lines(tmp_path / "history.jsonl")] == [1, 2, None, None]

    again, other = Counting(), Other()
    trainer = distilling(saveable(), epochs=3)
    trainer.fit(TRAIN, TRAIN, out=tmp_path, resume=True, callbacks=[other, again])
    assert again.steps == 2 + 4
    assert other.steps == 4  # it is another class, and had no state


def test_what_a_callback_raises_reaches_the_caller_and_the_captioner_is_ready() -> None:
    class Failing:
        def on_step(self, trainer: Trainer, row: Any) -> None:
            raise ZeroDivisionError("mine")

    trainer = Trainer(tiny.make_student(), **tiny.QUIET)
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.fit(TRAIN, callbacks=[Failing()])
    assert not trainer.captioner.training


def test_a_full_disk_while_logging_is_a_clear_error(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.path = tmp_path / "gone" / "h.jsonl"
    with pytest.raises(ConfigError, match=r"Cannot write.*h\.jsonl.*resume=True"):
        history.append({"kind": "step", "step": 1})


def test_progress_false_is_silent_and_a_log_gets_a_line_an_epoch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Trainer(tiny.make_student(), **tiny.QUIET).fit(TRAIN, epochs=2)
    assert capfd.readouterr() == ("", "")
    Trainer(tiny.make_student(), **{**tiny.QUIET, "progress": None}).fit(TRAIN, TRAIN, epochs=2)
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("epoch")]
    assert [line.split("  train")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("  val" in line and "cider_d" in line and len(line) <= 80 for line in lines)


def test_the_bar_shows_epoch_and_loss_and_counts_every_step(
    capfd: pytest.CaptureFixture[str],
) -> None:
    distilling(tiny.make_student(), progress=True, epochs=1).fit(TRAIN)
    err = capfd.readouterr().err
    assert "2/2" in err
    assert "epoch=1, loss=" in err


def test_the_line_of_a_history_shows_the_monitored_score() -> None:
    history = History()
    row = {"kind": "epoch", "epoch": 0, "step": 1, "scores": {"bleu_4": 0.2, "cider_d": 0.5}}
    history.append({**row, "improved": True, "best": {"epoch": 0, "bleu_4": 0.2}})
    assert repr(history) == "History(1 epoch, 0 logged steps, best epoch 1 (bleu_4 0.2000))"


def test_the_history_of_a_run_is_read_by_its_directory_and_nothing_else_is_taken_for_one(
    saveable: Make, tmp_path: Path
) -> None:
    history = distilling(saveable()).fit(TRAIN, TRAIN, out=tmp_path, epochs=1)
    assert History.load(tmp_path).rows == History.load(tmp_path / "history.jsonl").rows
    assert History.load(tmp_path).stopped == history.stopped == "its epoch is done"
    for wrong in ("nowhere", "best", "run.json"):
        with pytest.raises(DataError, match="history"):
            History.load(tmp_path / wrong)
    (tmp_path / "history.jsonl").write_text('{"kind": "st')  # killed in its first row
    assert History.load(tmp_path).rows == []
