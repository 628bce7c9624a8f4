"""Following a run: CSV files, TensorBoard, Weights & Biases, and the protocol of callbacks."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capdistill import Captioner, Distiller
from capdistill.errors import ConfigError, MissingExtra
from capdistill.training import Callback, CSVLogger, History, TensorBoardLogger
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
TRAIN = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]


def distilling(student: Captioner, **options: Any) -> Distiller:
    options = {**tiny.QUIET, "epochs": 2, "log_every": 1, **options}
    return Distiller(tiny.make_teacher(), student, losses={"token": "token"}, **options)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Stop(Callback):
    """End the run after an epoch."""

    def on_epoch(self, trainer: Any, row: Any) -> None:
        trainer.stopping = True


class Fail(Callback):
    def on_epoch(self, trainer: Any, row: Any) -> None:
        raise RuntimeError("a callback failed")


# -- tables ----------------------------------------------------------------------------------


def test_csv_files_hold_the_history(saveable: Make, tmp_path: Path) -> None:
    history = distilling(saveable()).fit(TRAIN, TRAIN, out=tmp_path, log="csv")
    for name, kind in (("epochs.csv", "epoch"), ("steps.csv", "step")):
        written, expected = read(tmp_path / name), history.table(kind)
        assert len(written) == len(expected) == {"epoch": 2, "step": 4}[kind]
        for row, values in zip(written, expected, strict=True):
            assert row == {key: str(value) for key, value in values.items()}
    losses = [row["train"]["loss"] for row in history.epochs]
    assert [float(row["train/loss"]) for row in read(tmp_path / "epochs.csv")] == losses


def test_csv_files_are_there_after_each_epoch(saveable: Make, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a callback failed"):
        distilling(saveable()).fit(TRAIN, callbacks=[CSVLogger(tmp_path), Fail()])
    assert len(read(tmp_path / "epochs.csv")) == 1
    assert len(read(tmp_path / "steps.csv")) == 2


def test_a_table_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    history = History()
    history.append({"kind": "epoch", "epoch": 0, "step": 1, "scores": {"a": 1.0}, "problems": []})
    history.append({"kind": "epoch", "epoch": 1, "step": 2, "scores": {"b": float("nan")}})
    history.to_csv(tmp_path / "new" / "table.csv")
    assert (tmp_path / "new" / "table.csv").read_text().splitlines() == [
        "epoch,step,scores/a,scores/b",
        "0,1,1.0,",
        "1,2,,nan",
    ]
    with pytest.raises(ConfigError, match=r"'steps'\. Use 'epoch' or 'step'"):
        history.table("steps")  # type: ignore[arg-type]


def test_pandas_gets_the_same_table() -> None:
    pytest.importorskip("pandas")
    history = History()
    history.append({"kind": "step", "epoch": 0, "step": 1, "terms": {"ce": {"raw": 2.0}}})
    frame = history.to_pandas("step")
    assert frame.to_dict("records") == [{"epoch": 0, "step": 1, "terms/ce/raw": 2.0}]


# -- trackers ----------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name).EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_every_number_at_its_step(saveable: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    history = distilling(saveable()).fit(TRAIN, TRAIN, out=tmp_path, log=["tensorboard"])
    read_back = events(tmp_path / "tensorboard")
    loss = [(e.step, e.value) for e in read_back.Scalars("step/terms/token/raw")]
    expected = [(row["step"], row["terms"]["token"]["raw"]) for row in history.steps]
    assert loss == [(step, pytest.approx(value)) for step, value in expected]
    scores = [(e.step, e.value) for e in read_back.Scalars("epoch/scores/cider_d")]
    expected = [(row["step"], row["scores"]["cider_d"]) for row in history.epochs]
    assert scores == [(step, pytest.approx(value)) for step, value in expected]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_has_each_step_once_in_tensorboard(saveable: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit = {"out": tmp_path, "log": ["tensorboard"]}
    with pytest.raises(RuntimeError, match="a callback failed"):  # the epoch is not saved
        distilling(saveable(), save_every=1).fit(
            TRAIN, callbacks=[TensorBoardLogger(tmp_path / "tensorboard"), Fail()], out=tmp_path
        )
    distilling(saveable()).fit(TRAIN, resume=True, **fit)
    steps = [e.step for e in events(tmp_path / "tensorboard").Scalars("step/loss")]
    assert steps == [1, 2, 3, 4]


class FakeWandB:
    """What the logger uses of wandb."""

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def init(self, **options: Any) -> Any:
        run = SimpleNamespace(id=options.get("id") or f"run{len(self.runs)}", logged=[], ends=[])
        run.options, run.metrics = options, []
        run.define_metric = lambda *args, **more: run.metrics.append((args, more))
        run.log = run.logged.append
        run.finish = lambda exit_code: run.ends.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_wandb_gets_the_options_and_every_row(
    saveable: Make, tmp_path: Path, wandb: FakeWandB
) -> None:
    log = [{"name": "wandb", "project": "dogs", "mode": "offline"}]
    history = distilling(saveable()).fit(TRAIN, TRAIN, out=tmp_path, log=log)
    [run] = wandb.runs
    assert run.options["project"] == "dogs"
    assert run.options["mode"] == "offline"
    assert run.options["dir"] == str(tmp_path)
    assert run.options["config"]["epochs"] == 2
    assert run.metrics == [(("*",), {"step_metric": "step"})]
    steps = [row for row in run.logged if "step/loss" in row]
    assert [(row["step"], row["step/loss"]) for row in steps] == [
        (row["step"], row["loss"]) for row in history.steps
    ]
    epochs = [row for row in run.logged if "epoch/train/loss" in row]
    assert [row["epoch/val/loss"] for row in epochs] == [r["val"]["loss"] for r in history.epochs]
    assert run.ends == [0]


def test_a_resumed_run_is_the_same_run_for_wandb(
    saveable: Make, tmp_path: Path, wandb: FakeWandB
) -> None:
    distilling(saveable()).fit(TRAIN, out=tmp_path, log="wandb", callbacks=[Stop()])
    distilling(saveable()).fit(TRAIN, out=tmp_path, log="wandb", resume=True)
    first, second = wandb.runs
    assert (first.id, first.options.get("resume")) == ("run0", None)
    assert (second.options["id"], second.options["resume"]) == ("run0", "allow")
    assert [row["step"] for row in second.logged if "step/loss" in row] == [3, 4]


def test_wandb_is_told_that_a_run_failed(saveable: Make, wandb: FakeWandB) -> None:
    with pytest.raises(RuntimeError, match="a callback failed"):
        distilling(saveable()).fit(TRAIN, log="wandb", callbacks=[Fail()])
    assert wandb.runs[0].ends == [1]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra_before_a_step(
    name: str, saveable: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    distiller = distilling(saveable())
    with pytest.raises(MissingExtra, match=rf"pip install \"capdistill\[{name}\]\""):
        distiller.fit(TRAIN, out=tmp_path, log=[name])
    assert distiller.step_count == 0


def test_a_missing_pandas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"capdistill\[pandas\]"):
        History().to_pandas()


@pytest.mark.parametrize("log", ["tensorbord", ["csv", "tensorbord"], [{"name": "tensorbord"}]])
def test_an_unknown_logger_is_refused_with_the_nearest(log: Any) -> None:
    with pytest.raises(ConfigError, match=r"'tensorbord'. Did you mean 'tensorboard'\?"):
        distilling(tiny.make_student(), log=log)


def test_an_argument_that_a_logger_lacks_is_refused() -> None:
    distiller = distilling(tiny.make_student(), log=[{"name": "csv", "folder": "x"}])
    with pytest.raises(ConfigError, match=r"log: 'csv' .*unexpected keyword argument 'folder'"):
        distiller.fit(TRAIN)


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_run_without_a_directory_needs_one_for_its_logs(name: str) -> None:
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    distiller = distilling(tiny.make_student())
    with pytest.raises(ConfigError, match=r"has no directory.*Give fit an out="):
        distiller.fit(TRAIN, log=name)
    assert distiller.step_count == 0


# -- the protocol ------------------------------------------------------------------------------


def test_a_callback_hears_of_everything_in_order_and_is_closed() -> None:
    heard: list[str] = []

    class Listener(Callback):
        def on_fit_start(self, trainer: Any) -> None:
            heard.append("start")

        def on_step(self, trainer: Any, row: Any) -> None:
            heard.append(f"step {row['step']}")

        def on_epoch(self, trainer: Any, row: Any) -> None:
            heard.append(f"epoch {row['epoch']}")

        def on_fit_end(self, trainer: Any) -> None:
            heard.append("end")

        def close(self) -> None:
            heard.append("close")

    distilling(tiny.make_student(), epochs=1).fit(TRAIN, callbacks=[Listener()])
    assert heard == ["start", "step 1", "step 2", "epoch 0", "end", "close"]
    heard.clear()
    with pytest.raises(RuntimeError, match="a callback failed"):
        distilling(tiny.make_student(), epochs=1).fit(TRAIN, callbacks=[Listener(), Fail()])
    assert heard == ["start", "step 1", "step 2", "epoch 0", "close"]
