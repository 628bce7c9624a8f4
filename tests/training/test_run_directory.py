"""Whose a run directory is: what refuses, resumes, replaces and cleans it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData, Example, Loader
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.losses.base import DistillationLoss
from capdistill.training.checkpoint import load_state, save_state
from capdistill.training.history import History
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 3, "learning_rate": 0.01}
STOP_EARLY = "ignore:Interrupted:UserWarning"


def distiller(student: Captioner, losses: Any = None, weights: Any = None, **more: Any) -> Any:
    teacher = more.pop("teacher", None) or tiny.make_teacher()
    losses = {"token": "token"} if losses is None else losses
    return Distiller(teacher, student, losses=losses, weights=weights, **{**OPTIONS, **more})


class At:
    """Do something after a step or an epoch."""

    def __init__(self, do: Callable[[Any], None], step: int = -1, epoch: int = -1) -> None:
        self.do, self.step, self.epoch = do, step, epoch

    def on_step(self, trainer: Any, row: Any) -> None:
        if row["step"] == self.step:
            self.do(trainer)

    def on_epoch(self, trainer: Any, row: Any) -> None:
        if row["epoch"] == self.epoch:
            self.do(trainer)


def stop(trainer: Any) -> None:
    trainer.stopping = True


def ctrl_c(trainer: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- a new run and the results of an earlier one --------------------------------------------


@pytest.mark.parametrize("held", ["state.pt", "state.previous.pt", "best", "final"])
def test_a_directory_with_results_is_refused_before_anything_changes(
    saveable: Make, colours: CaptionData, tmp_path: Path, held: str
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / held).mkdir() if "." not in held else (out / held).write_bytes(b"mine")
    before = files(out)
    for resume in (False, "auto") if "." not in held else (False,):
        trainer = distiller(saveable())
        with pytest.raises(ConfigError, match=rf"{held}.*resume=True.*out=.*overwrite=True"):
            trainer.fit(colours, out=out, resume=resume)
        assert trainer.step_count == 0
    assert files(out) == before


def test_overwrite_replaces_all_that_the_earlier_run_wrote(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    seen: list[set[str]] = []
    look = At(lambda trainer: seen.append({p.name for p in (tmp_path / "run").iterdir()}), step=1)
    trainer = distiller(saveable(seed=5), epochs=1)
    trainer.fit(colours, out=tmp_path / "run", overwrite=True, callbacks=[look])
    assert seen == [{"notes.txt", "run.json", "history.jsonl", "state.pt"}]
    assert len(History.load(tmp_path / "run" / "history.jsonl").epochs) == 1
    kept = Captioner.load(tmp_path / "run" / "best").state_dict()
    assert tiny.same_bits(kept, trainer.captioner.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": []},
        {"monitor": "cidre"},
        {"val": [1, 2]},
        {"device": "toaster"},
        {"resume": "no"},
        {"callbacks": [3]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_run_that_cannot_start_leaves_the_earlier_one_as_it_was(
    saveable: Make, colours: CaptionData, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path / "run")
    before = files(tmp_path / "run")
    options = {"train": colours, "val": colours, "overwrite": True, **wrong}
    with pytest.raises((ConfigError, ValueError)):
        distiller(saveable()).fit(out=tmp_path / "run", **options)
    assert files(tmp_path / "run") == before


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_a_directory_that_another_run_writes_is_refused(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ways: list[dict[str, Any]] = [{"resume": "auto"}, {"resume": True}, {}, {"overwrite": True}]

    def try_too(trainer: Any) -> None:
        before = files(out)
        for how in ways:
            with pytest.raises(ConfigError, match=r"run is in use.*another out="):
                distiller(saveable()).fit(colours, out=out, **how)
        assert files(out) == before

    history = distiller(saveable()).fit(colours, out=out, callbacks=[At(try_too, step=1)])
    assert len(history.epochs) == 3
    again = distiller(saveable()).fit(colours, out=out, resume=True)
    assert len(again.epochs) == 3


def test_a_run_stays_in_its_directory_if_the_working_directory_changes(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    away = At(lambda trainer: os.chdir(tmp_path / "pictures"), step=1)
    distiller(saveable(), epochs=1).fit(colours, out="run", callbacks=[away])
    assert Captioner.load(tmp_path / "run" / "best").name == "student"
    assert not (tmp_path / "pictures" / "run").exists()


@pytest.mark.parametrize("resume", [1, "yes", None, np.True_])
def test_resume_is_true_false_or_auto(saveable: Make, tmp_path: Path, resume: Any) -> None:
    with pytest.raises(ConfigError, match="Expected resume=True, False or 'auto'"):
        distiller(saveable()).fit([tiny.make_batch([2])], out=tmp_path, resume=resume)


def test_resume_and_overwrite_contradict_each_other(saveable: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contradict"):
        distiller(saveable()).fit([tiny.make_batch([2])], out=tmp_path, resume=True, overwrite=True)


def test_a_start_removes_what_killed_writers_left(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    before = {path.name for path in tmp_path.iterdir()}
    left = [
        ".state.new.pt.0a1b2c3d",
        ".history.jsonl.00ff00ff",
        "state.new.pt",
        ".run.json.12345678",
    ]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".check.abc").mkdir()
    (tmp_path / ".mine").write_text("not a temporary file")
    distiller(saveable()).fit(colours, colours, out=tmp_path, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {*before, ".mine"}


# -- resuming another run --------------------------------------------------------------------


class Scaled(DistillationLoss):
    """A loss that no registry made."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        difference = (student.logits - teacher.logits).square().mean(-1)
        return self.scale * difference[batch.target_mask].sum()


def other_teacher() -> Captioner:
    return tiny.make_teacher(seed=77)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"losses": {"token": {"name": "token", "temperature": 2.0}}}, "losses.token"),
        ({"losses": {"token": Scaled(1.0)}}, "losses.token"),
        ({"weights": {"ce": 0.9}}, "weights.ce"),
        ({"weights": {"token": (0.7, 0.1)}}, "weights.token"),
        ({"losses": {"other": "token"}}, r"losses\.other.*losses\.token"),
        ({"teacher": other_teacher}, "teacher 1"),
        ({"monitor": "bleu_4"}, "monitor: cider -> bleu_4"),
        ({"label_smoothing": 0.2}, "label_smoothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.filterwarnings("ignore:The resumed run continues with other options:UserWarning")
def test_another_objective_is_refused_by_name_and_needs_an_explicit_yes(
    saveable: Make, colours: CaptionData, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    before = files(tmp_path)
    change = {k: v() if k == "teacher" else v for k, v in change.items()}
    other = distiller(saveable(seed=3), **change)
    weights = tiny.weights_of(other.objective)
    with pytest.raises(CheckpointError, match=rf"{named}.*accept_changes=True"):
        other.fit(colours, colours, out=tmp_path, resume=True)
    assert files(tmp_path) == before  # run.json tells of the run that it describes
    assert tiny.same_bits(weights, tiny.weights_of(other.objective))
    with pytest.warns(UserWarning, match=rf"continues with changes: .*{named}"):
        history = other.fit(colours, colours, out=tmp_path, resume=True, accept_changes=True)
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2]


def test_the_options_of_a_loss_of_your_own_are_compared(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    stopping = {"out": tmp_path, "callbacks": [At(stop, epoch=0)]}
    distiller(saveable(), {"mine": Scaled(1.0)}).fit(colours, colours, **stopping)
    with pytest.raises(CheckpointError, match=r"losses\.mine.*scale=1\.0.*scale=3\.0"):
        distiller(saveable(), {"mine": Scaled(3.0)}).fit(
            colours, colours, out=tmp_path, resume=True
        )


def with_other_captions(data: CaptionData) -> CaptionData:
    return CaptionData([Example(e.image_id, e.path, ("a blue cat",) * 2) for e in data.examples])


def with_another_image(data: CaptionData) -> CaptionData:
    first = data.examples[0]
    return CaptionData([Example("new.png", first.path, first.captions), *data.examples[1:]])


@pytest.mark.parametrize("change", [with_other_captions, with_another_image])
def test_other_data_of_the_same_size_are_refused(
    saveable: Make, colours: CaptionData, tmp_path: Path, change: Any
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    with pytest.raises(CheckpointError, match=r"training data: 6 images, \w+ -> 6 images, \w+"):
        distiller(saveable()).fit(change(colours), colours, out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="validation data: 6 images"):
        distiller(saveable()).fit(colours, change(colours), out=tmp_path, resume=True)


def test_other_batches_of_the_same_size_are_refused(saveable: Make, tmp_path: Path) -> None:
    one, other = ([tiny.make_batch([2, 1], first=n)] for n in (0, 7))
    distiller(saveable()).fit(one, out=tmp_path, callbacks=[At(stop, epoch=0)])
    with pytest.raises(CheckpointError, match="training data: 2 images"):
        distiller(saveable()).fit(other, out=tmp_path, resume=True)


def test_another_vocabulary_is_refused(saveable: Make, tmp_path: Path) -> None:
    batches = [tiny.make_batch([2, 1])]
    Trainer(saveable(), **OPTIONS).fit(batches, out=tmp_path, callbacks=[At(stop, epoch=0)])
    student = saveable()
    student.tokenizer = type(student.tokenizer)(["red", "green", "blue", "a", "dog", "cat"])
    with pytest.raises(CheckpointError, match="vocabulary"):
        Trainer(student, **OPTIONS).fit(batches, out=tmp_path, resume=True)


def test_a_run_resumed_without_validation_keeps_its_best_epoch(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    best = files(tmp_path / "best")
    trainer = distiller(saveable())
    trainer.fit(colours, out=tmp_path, resume=True)
    assert files(tmp_path / "best") == best
    kept = Captioner.load(tmp_path / "best").state_dict()
    assert tiny.same_bits(kept, trainer.captioner.state_dict())


# -- one source of truth ---------------------------------------------------------------------


class Falling(Distiller):
    """A distiller whose first epoch scores best."""

    def validate(self, source: Any) -> Any:
        return {"loss": 1.0, "terms": {}, "images": 6, "skipped": 0}, {"cider_d": 0.9 - self.epoch}


@pytest.mark.parametrize("harm", ["deleted", "emptied", "cut"])
def test_the_best_epoch_does_not_depend_on_the_history_file(
    saveable: Make, colours: CaptionData, tmp_path: Path, harm: str
) -> None:
    def run(**more: Any) -> Falling:
        options = {**OPTIONS, "losses": {"token": "token"}}
        trainer = Falling(tiny.make_teacher(), saveable(), **options)
        trainer.fit(colours, colours, out=tmp_path, **more)
        return trainer

    run(callbacks=[At(stop, epoch=1)])
    best, history = files(tmp_path / "best"), tmp_path / "history.jsonl"
    if harm == "deleted":
        history.unlink()
    else:
        history.write_text("" if harm == "emptied" else history.read_text()[:-50])
    trainer = run(resume=True)
    assert files(tmp_path / "best") == best
    assert tiny.same_bits(
        trainer.captioner.state_dict(), Captioner.load(tmp_path / "best").state_dict()
    )
    assert trainer.history.epochs[-1]["best"]["epoch"] == 0


def test_a_missing_best_student_is_reported_when_the_run_is_resumed(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    (tmp_path / "best").rename(tmp_path / "elsewhere")
    trainer = distiller(saveable())
    with pytest.raises(CheckpointError, match=r"best epoch of this run is 1, but .*best"):
        trainer.fit(colours, colours, out=tmp_path, resume=True)
    assert trainer.step_count == 3


# -- the position within an epoch -------------------------------------------------------------


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"captions_per_image": 1}, {"seed": 5}])
@pytest.mark.filterwarnings(STOP_EARLY)
def test_within_an_epoch_the_batches_must_stay_the_same(
    saveable: Make, colours: CaptionData, tmp_path: Path, change: dict[str, int]
) -> None:
    distiller(saveable()).fit(colours, out=tmp_path, callbacks=[At(ctrl_c, step=4)])
    [[name, value]] = change.items()
    with pytest.raises(CheckpointError, match=rf"within epoch 2.*{name} \d+ -> {value}"):
        distiller(saveable(), **change).fit(colours, out=tmp_path, resume=True)
    history = distiller(saveable()).fit(colours, out=tmp_path, resume=True)
    assert [row["images"] for row in history.epochs] == [6, 6, 6]


@pytest.mark.filterwarnings(STOP_EARLY)
def test_the_batch_size_of_a_source_of_your_own_must_stay_too(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    def loader(size: int) -> Loader:
        options = {"image_size": 8, "batch_size": size, "train": True}
        return Loader(colours, tiny.TOKENIZER, **options)

    distiller(saveable()).fit(loader(2), out=tmp_path, callbacks=[At(ctrl_c, step=4)])
    with pytest.raises(CheckpointError, match="batch_size 2 -> 3"):
        distiller(saveable()).fit(loader(3), out=tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:The resumed run continues with other options:UserWarning")
def test_between_epochs_the_batch_size_may_change(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, out=tmp_path, callbacks=[At(stop, epoch=0)])
    history = distiller(saveable(), batch_size=3).fit(colours, out=tmp_path, resume=True)
    assert [row["step"] for row in history.epochs] == [3, 5, 7]


# -- stops of every kind -----------------------------------------------------------------------


class Drawing(DistillationLoss):
    """A loss that draws from Python's, NumPy's and torch's generators."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        factor = random.random() + np.random.normal() + float(torch.rand(()))
        return factor * student.logits.square().mean(-1)[batch.target_mask].sum()


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.filterwarnings(STOP_EARLY)
def test_python_and_numpy_draw_on_where_the_run_stopped(
    saveable: Make, colours: CaptionData, tmp_path: Path, step: int
) -> None:
    whole = distiller(saveable(), {"mine": Drawing()})
    whole.fit(colours, out=tmp_path / "whole")
    first = distiller(saveable(), {"mine": Drawing()})
    first.fit(colours, out=tmp_path / "parts", callbacks=[At(ctrl_c, step=step)])
    random.seed(99)
    np.random.seed(99)
    np.random.normal()
    rest = distiller(saveable(seed=4), {"mine": Drawing()})
    rest.fit(colours, out=tmp_path / "parts", resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


def sigterm(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", [{"step": 2}, {"epoch": 0}])
def test_sigterm_is_handled_like_ctrl_c(
    saveable: Make, colours: CaptionData, tmp_path: Path, where: dict[str, int]
) -> None:
    whole = distiller(saveable(dropout=0.3))
    whole.fit(colours, colours)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.warns(UserWarning, match="Interrupted after step"):
        history = distiller(saveable(dropout=0.3)).fit(
            colours, colours, out=tmp_path, callbacks=[At(sigterm, **where)]
        )
    assert history.interrupted
    assert "interrupted after step" in str(history.stopped)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert History.load(tmp_path / "history.jsonl").interrupted
    rest = distiller(saveable(seed=8, dropout=0.3))
    history = rest.fit(colours, colours, out=tmp_path, resume="auto")
    assert not history.interrupted
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


@pytest.mark.filterwarnings("ignore:Interrupted:UserWarning")
def test_sigterm_to_all_processes_leaves_the_workers_to_the_main_one(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    def to_all(trainer: Any) -> None:  # what a scheduler does
        workers = multiprocessing.active_children()
        assert len(workers) >= 2
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGTERM)
        sigterm(trainer)

    history = distiller(saveable(), num_workers=2).fit(
        colours, out=tmp_path, callbacks=[At(to_all, step=1)]
    )
    assert history.interrupted
    assert history.signal == signal.SIGTERM
    assert load_state(tmp_path / "state.pt")["step"] == 1


def test_no_worker_stays_when_a_run_fails(saveable: Make, colours: CaptionData) -> None:
    others = {*multiprocessing.active_children()}

    def fail(trainer: Any) -> None:
        assert {*multiprocessing.active_children()} - others
        raise OSError("no more")

    with pytest.raises(OSError, match="no more") as caught:  # keeps the frames of the run alive
        distiller(saveable(), num_workers=2).fit(colours, callbacks=[At(fail, step=1)])
    assert caught.traceback
    assert not {*multiprocessing.active_children()} - others


class Deadly:
    """A data set that is ended by an item, as by a system that is short of memory."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> tuple[Any, list[str]]:
        if number == 4:
            os._exit(1)
        return np.zeros((8, 8, 3), np.uint8), ["a red dog"]


def test_a_worker_that_ends_is_named_whatever_the_run_is_doing() -> None:
    def wait(trainer: Any) -> None:
        time.sleep(5)  # torch interrupts it

    trainer = Trainer(tiny.make_student(), **OPTIONS, num_workers=1)
    with pytest.raises(DataError, match=r"process that reads data has ended.*num_workers=0"):
        trainer.fit(Deadly(), callbacks=[At(wait, step=1)])


def test_a_run_needs_no_standard_error(
    saveable: Make, colours: CaptionData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert len(distiller(saveable(), progress=None, epochs=1).fit(colours, colours).epochs) == 1


def test_damaged_weights_of_the_best_epoch_are_found_before_the_first_step(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, colours, out=tmp_path, callbacks=[At(stop, epoch=1)])
    path = tmp_path / "best" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    trainer = distiller(saveable())
    with pytest.raises(CheckpointError, match=r"best does not hold its weights .*damaged.*Restore"):
        trainer.fit(colours, colours, out=tmp_path, resume=True)
    assert trainer.step_count == 6


class InValidation(Distiller):
    """A distiller that is asked to stop while it validates."""

    def validate(self, source: Any) -> Any:
        if self.epoch == 1:
            sigterm(self)
        return super().validate(source)


def test_sigterm_during_validation_stops_after_it_and_can_be_resumed(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    whole = distiller(saveable(dropout=0.3))
    whole.fit(colours, colours)
    options = {**OPTIONS, "losses": {"token": "token"}}
    first = InValidation(tiny.make_teacher(), saveable(dropout=0.3), **options)
    with pytest.warns(UserWarning, match="Interrupted after step 6"):
        first.fit(colours, colours, out=tmp_path)
    rest = distiller(saveable(seed=8, dropout=0.3))
    history = rest.fit(colours, colours, out=tmp_path, resume=True)
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2]
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


def test_auto_starts_a_run_continues_it_and_leaves_a_finished_one(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", distiller(saveable(dropout=0.3))
    whole.fit(colours, colours)
    for epoch in (0, 1, -1):
        trainer = distiller(saveable(seed=1, dropout=0.3))
        trainer.fit(colours, colours, out=out, resume="auto", callbacks=[At(stop, epoch=epoch)])
    assert tiny.same_bits(trainer.objective.state_dict(), whole.objective.state_dict())
    before = files(out / "best")
    again = distiller(saveable(seed=1, dropout=0.3))
    history = again.fit(colours, colours, out=out, resume="auto")
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2]
    assert files(out / "best") == before


@pytest.mark.parametrize("left", [[], ["run.json"], ["run.json", "history.jsonl", "state.new.pt"]])
def test_auto_starts_where_no_state_was_saved(
    saveable: Make, colours: CaptionData, tmp_path: Path, left: list[str]
) -> None:
    for name in left:  # of a run that was killed before its first save
        (tmp_path / name).write_text('{"kind": "epoch", "step": 3, "epoch": 0}\n')
    history = distiller(saveable(), epochs=1).fit(colours, out=tmp_path, resume="auto")
    assert [row["epoch"] for row in history.epochs] == [0]
    assert not (tmp_path / "state.new.pt").exists()


def test_there_is_a_state_at_every_moment_of_a_save(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, replace, looks = tmp_path / "state.pt", Path.replace, []

    def looked(path: Path, target: Any) -> Path:
        moved = replace(path, target)
        looks.append(state.exists() and load_state(state)["step"])
        return moved

    distiller(saveable(), epochs=1, save_every=1).fit(colours, out=tmp_path)
    saved = load_state(state)
    (tmp_path / "state.previous.pt").unlink()
    os.link(state, tmp_path / "state.previous.pt")  # of a process that was killed in a save
    monkeypatch.setattr(Path, "replace", looked)
    for _ in range(2):
        save_state(state, {**saved, "step": 9})
    assert set(looks) == {3, 9}
    assert {path.name for path in tmp_path.glob("*state*")} == {"state.pt", "state.previous.pt"}


def test_a_state_is_saved_where_files_have_one_name_only(
    saveable: Make, colours: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    distiller(saveable(), epochs=1, save_every=1).fit(colours, out=tmp_path)
    steps = [load_state(tmp_path / name)["step"] for name in ("state.pt", "state.previous.pt")]
    assert steps == [3, 3]


@pytest.mark.filterwarnings("ignore:.*does not exist; continuing from:UserWarning")
def test_auto_resumes_a_run_that_was_killed_while_it_saved(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    distiller(saveable()).fit(colours, out=tmp_path, callbacks=[At(stop, epoch=1)])
    (tmp_path / "state.pt").rename(tmp_path / "state.new.pt")  # between two renames
    trainer = distiller(saveable())
    history = trainer.fit(colours, out=tmp_path, resume="auto")
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("option", "states"), [({"save_every": 2}, [0, 2, 3, 4]), ({}, [0, 0, 3, 3])]
)
def test_the_state_is_saved_every_so_many_steps(
    saveable: Make, colours: CaptionData, tmp_path: Path, option: Any, states: list[int]
) -> None:
    seen: dict[int, int] = {}

    class Look:
        def on_step(self, trainer: Any, row: Any) -> None:
            seen[row["step"]] = load_state(tmp_path / "state.pt")["step"]

    distiller(saveable(), epochs=2, **option).fit(colours, out=tmp_path, callbacks=[Look()])
    assert [seen[step] for step in (1, 3, 4, 5)] == states


def test_the_state_is_saved_every_so_many_minutes(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    saved: list[int] = []

    class Look:
        def on_step(self, trainer: Any, row: Any) -> None:
            saved.append(load_state(tmp_path / "state.pt")["step"])
            trainer.checkpoints.saved -= 61  # a minute goes by

    distiller(saveable(), epochs=1, save_every="1min").fit(
        colours, out=tmp_path, callbacks=[Look()]
    )
    assert saved == [0, 1, 2]


def test_as_many_earlier_states_as_asked_for_are_kept(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    def steps(folder: Path) -> dict[str, int]:
        return {path.name: load_state(path)["step"] for path in folder.glob("state*.pt")}

    distiller(saveable(), epochs=2, save_every=1, keep=3).fit(colours, out=tmp_path)
    names = ["state.previous.3.pt", "state.previous.2.pt", "state.previous.pt", "state.pt"]
    assert steps(tmp_path) == dict(zip(names, [4, 5, 6, 6], strict=True))  # 6 again: an epoch ended
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"PK damaged")
    with pytest.warns(UserWarning, match=r"continuing from .*previous\.3\.pt, after step 4"):
        distiller(saveable(), epochs=2, keep=1).fit(colours, out=tmp_path, resume=True)
    assert steps(tmp_path) == {"state.pt": 6, "state.previous.pt": 4}
    distiller(saveable(), epochs=1, keep=4, save_every=1).fit(colours, out=tmp_path, overwrite=True)
    assert len(steps(tmp_path)) == 5


class Improving:
    """Every epoch is the best so far."""

    def on_epoch(self, trainer: Any, row: Any) -> None:
        row["improved"] = True


def test_as_many_best_captioners_as_asked_for_are_kept(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    def bests() -> set[str]:
        return {path.name for path in tmp_path.glob("best*")}

    trainer = distiller(saveable(), epochs=3, keep_best=2, monitor="loss")
    trainer.fit(colours, colours, out=tmp_path, callbacks=[Improving()])
    assert bests() == {"best", "best-epoch-2", "best-epoch-3"}
    last, before = (Captioner.load(tmp_path / f"best-epoch-{n}").state_dict() for n in (3, 2))
    assert tiny.same_bits(last, Captioner.load(tmp_path / "best").state_dict())
    assert not tiny.same_bits(last, before)
    distiller(saveable(), epochs=1).fit(colours, out=tmp_path, overwrite=True)
    assert bests() == {"best"}


def test_the_run_file_names_the_encoder_of_a_registry_and_its_arguments(
    saveable: Make, tmp_path: Path
) -> None:
    Trainer(saveable(dim=10), **OPTIONS).fit([tiny.make_batch([2])], out=tmp_path)
    encoder = json.loads((tmp_path / "run.json").read_text())["models"][0]["encoder"]
    assert encoder == {"name": "patches", "kwargs": {"dim": 10}}


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_run_is_not_written_into_a_saved_captioner(
    saveable: Make, tmp_path: Path, inside: str
) -> None:
    saveable().save(tmp_path / "best")
    trainer = Trainer(saveable(), **OPTIONS)
    with pytest.raises(ConfigError, match="saved captioner"):
        trainer.fit([tiny.make_batch([1])], out=tmp_path / "best" / inside)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"{bad\n3\n[]\n", b'{"kind": "epoch"}\n']
)
def test_a_damaged_history_does_not_hinder_resuming(
    saveable: Make, tmp_path: Path, content: bytes
) -> None:
    data = [tiny.make_batch([1, 2])]
    Trainer(saveable(), **OPTIONS).fit(data, data, out=tmp_path / "run", epochs=1)
    (tmp_path / "run" / "history.jsonl").write_bytes(content)
    with pytest.warns(UserWarning, match="epochs 1 -> 2"):
        history = Trainer(saveable(), **OPTIONS).fit(
            data, data, out=tmp_path / "run", epochs=2, resume=True
        )
    assert [row["epoch"] for row in history.epochs] == [1]


def test_a_kill_between_history_and_state_leaves_one_row_per_epoch(
    saveable: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(callback: Any, trainer: Any, row: Any) -> None:
        raise Killed

    data = [tiny.make_batch([1, 2]), tiny.make_batch([2, 1], first=2)]
    options = {**OPTIONS, "save_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr("capdistill.training.callbacks.Checkpoints.on_epoch", killed)
        with pytest.raises(Killed):
            Trainer(saveable(), **options).fit(data, out=tmp_path / "run")
    history = Trainer(saveable(), **options).fit(data, out=tmp_path / "run", resume=True)
    saved = History.load(tmp_path / "run" / "history.jsonl")
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2]
    assert [row["epoch"] for row in saved.epochs] == [0, 1, 2]
