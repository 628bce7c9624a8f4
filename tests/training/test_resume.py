"""Law 7: one seed is one run, stopped and resumed or not, with workers or without."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError, ConfigError, NotFiniteLoss
from capdistill.training.checkpoint import load_state, save_state
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 4, "learning_rate": 0.01}
CLOCK = ("seconds", "images_per_second")


def distiller(student: Captioner, **options: Any) -> Distiller:
    return Distiller(tiny.make_teacher(), student, **{**OPTIONS, "log_every": 1, **options})


def timeless(history: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in history.rows]


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


def ctrl_c(trainer: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def stop(trainer: Any) -> None:
    trainer.stopping = True


# -- one seed, one run ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_with_and_without_workers(colours: CaptionData) -> None:
    runs = []
    for workers, chance, seed in ((0, 1, 5), (2, 2, 5), (0, 3, 6)):
        student = tiny.make_student(dropout=0.3)
        torch.manual_seed(chance)
        trainer = distiller(student, num_workers=workers, seed=seed, epochs=2)
        trainer.fit(colours, colours)
        runs.append((tiny.weights_of(trainer.objective), timeless(trainer.history)))
    assert tiny.same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not tiny.same_bits(runs[0][0], runs[2][0])


@pytest.mark.parametrize("epochs_before", [1, 3])
def test_stop_and_resume_equals_one_run(
    saveable: Make, colours: CaptionData, tmp_path: Path, epochs_before: int
) -> None:
    whole = distiller(saveable(dropout=0.3))
    whole.fit(colours, colours, out=tmp_path / "whole")

    out, callback = tmp_path / "parts", At(stop, epoch=epochs_before - 1)
    distiller(saveable(dropout=0.3)).fit(colours, colours, out=out, callbacks=[callback])
    torch.manual_seed(99)
    rest = distiller(saveable(seed=8, dropout=0.3))
    history = rest.fit(colours, colours, out=out, resume=True)

    assert timeless(history) == timeless(whole.history)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    saved = [Captioner.load(tmp_path / run / "final") for run in ("whole", "parts")]
    assert tiny.same_bits(saved[0].state_dict(), saved[1].state_dict())


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])  # of three an epoch, two epochs
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.filterwarnings("ignore:.*could not be used and were left out:UserWarning")
def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(
    saveable: Make, colours: CaptionData, tmp_path: Path, step: int, broken: bool
) -> None:
    if broken:  # numbers of batches no longer tell their places
        for example in colours.examples[:2]:
            example.path.write_bytes(b"no picture")
    whole = distiller(saveable(dropout=0.3), epochs=2, batch_size=1 if broken else 2)
    whole.fit(colours, colours, out=tmp_path / "whole")

    out, handler = tmp_path / "parts", signal.getsignal(signal.SIGINT)
    first = distiller(saveable(dropout=0.3), epochs=2, batch_size=1 if broken else 2)
    with pytest.warns(UserWarning, match=f"Interrupted after step {step}.*{out}.*resume=True"):
        history = first.fit(colours, colours, out=out, callbacks=[At(ctrl_c, step=step)])
    assert history.interrupted
    assert history.steps[-1]["step"] == step
    assert signal.getsignal(signal.SIGINT) is handler
    assert not first.captioner.training

    rest = distiller(saveable(seed=8, dropout=0.3), epochs=2, batch_size=1 if broken else 2)
    history = rest.fit(colours, colours, out=out, resume=True)
    assert not history.interrupted
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    assert [row["train"] for row in history.epochs] == [r["train"] for r in whole.history.epochs]
    assert [row["images"] for row in history.epochs] == [r["images"] for r in whole.history.epochs]


def test_ctrl_c_in_the_last_validation_ends_the_run_as_usual(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    trainer = distiller(saveable(), epochs=1)
    history = trainer.fit(colours, colours, out=tmp_path, callbacks=[At(ctrl_c, epoch=0)])
    assert not history.interrupted
    assert (tmp_path / "final" / "captioner.json").exists()


def test_ctrl_c_in_an_earlier_validation_stops_before_the_next_step(colours: CaptionData) -> None:
    trainer = distiller(tiny.make_student(), epochs=2)
    with pytest.warns(UserWarning, match="Nothing was saved: no out="):
        history = trainer.fit(colours, colours, callbacks=[At(ctrl_c, epoch=0)])
    assert history.interrupted
    assert trainer.step_count == 3


def test_a_second_ctrl_c_stops_at_once_and_gives_the_handler_back(colours: CaptionData) -> None:
    def twice(trainer: Any) -> None:
        ctrl_c(trainer)
        ctrl_c(trainer)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distiller(tiny.make_student()).fit(colours, callbacks=[At(twice, step=1)])
    assert signal.getsignal(signal.SIGINT) is handler


# -- states that cannot be used ------------------------------------------------------------


def one_epoch_then(saveable: Make, colours: CaptionData, out: Path, epochs: int) -> Distiller:
    trainer = distiller(saveable(), epochs=4)
    trainer.fit(colours, colours, out=out, callbacks=[At(stop, epoch=epochs - 1)])
    return trainer


@pytest.mark.parametrize("what", ["truncated", "foreign", "gone"])
def test_a_state_that_cannot_be_read_is_named_and_the_one_before_is_used(
    saveable: Make, colours: CaptionData, tmp_path: Path, what: str
) -> None:
    whole = one_epoch_then(saveable, colours, tmp_path / "whole", 3)
    one_epoch_then(saveable, colours, tmp_path / "cut", 2)
    state = tmp_path / "cut" / "state.pt"
    if what == "truncated":
        state.write_bytes(state.read_bytes()[:-200])
    elif what == "foreign":
        torch.save({"weights": torch.ones(1)}, state)
    else:
        state.unlink()
    again = distiller(saveable(seed=8), epochs=4)
    with pytest.warns(UserWarning, match=r"cut/state\.pt.*state\.previous\.pt, after step 3"):
        history = again.fit(
            colours, colours, out=state.parent, resume=True, callbacks=[At(stop, epoch=2)]
        )
    assert timeless(history) == timeless(whole.history)
    assert tiny.same_bits(again.objective.state_dict(), whole.objective.state_dict())


def test_without_any_state_both_files_are_named(saveable: Make, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nothing")
    said = r"(?s)state\.pt is truncated.*state\.previous\.pt does not exist.*resume=False"
    with pytest.raises(CheckpointError, match=said):
        distiller(saveable()).fit([tiny.make_batch([2])], out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="resume=True needs out="):
        distiller(saveable()).fit([tiny.make_batch([2])], resume=True)


def test_a_state_of_other_models_is_refused_and_changes_nothing(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    one_epoch_then(saveable, colours, tmp_path, 1)
    for other in (distiller(saveable(width=7)), Trainer(saveable(), **OPTIONS)):
        before = tiny.weights_of(other.objective)
        with pytest.raises(CheckpointError, match=r"training state"):
            other.fit(colours, out=tmp_path, resume=True)
        assert tiny.same_bits(before, tiny.weights_of(other.objective))


class Unpickled:
    """A callback whose state could not be read again."""

    def state_dict(self) -> Any:
        return {"path": Path("x")}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


def test_a_callback_state_that_could_not_be_read_again_is_refused(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="callback Unpickled"):
        distiller(saveable()).fit(colours, out=tmp_path, callbacks=[Unpickled()])


def test_a_new_run_is_never_resumed_from_an_earlier_runs_state(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    one_epoch_then(saveable, colours, tmp_path, 2)

    def fail(trainer: Any) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        distiller(saveable()).fit(
            colours, out=tmp_path, overwrite=True, callbacks=[At(fail, step=1)]
        )
    assert load_state(tmp_path / "state.pt")["step"] == 0  # the start of the new run
    assert not (tmp_path / "best").exists()
    resumed, fresh = distiller(saveable(seed=8)), distiller(saveable())
    resumed.fit(colours, out=tmp_path, resume=True)
    fresh.fit(colours)
    assert tiny.same_bits(resumed.objective.state_dict(), fresh.objective.state_dict())


def test_other_options_on_resume_are_said_and_followed(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    one_epoch_then(saveable, colours, tmp_path, 1)
    again = distiller(saveable(), epochs=2, schedule="warmup_cosine", learning_rate=0.02)
    with pytest.warns(UserWarning, match=r"learning_rate 0\.01 -> 0\.02.*") as caught:
        history = again.fit(colours, out=tmp_path, resume=True)
    assert "epochs 4 -> 2" in str(caught[0].message)
    rates = [row["learning_rates"]["model"] for row in history.steps[-3:]]
    shares = [0.6545, 0.3455, 0.0955]  # (1 + cos(pi * s / 5)) / 2 of steps 2, 3, 4 after one up
    assert rates == pytest.approx([0.02 * share for share in shares], rel=1e-3)


# -- disks and numbers that fail ------------------------------------------------------------


def test_an_output_directory_that_cannot_be_written_fails_before_the_first_step(
    saveable: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("taken")
    trainer = distiller(saveable())
    with pytest.raises(ConfigError, match=r"Cannot write.*file/run"):
        trainer.fit([tiny.make_batch([2])], out=tmp_path / "file" / "run")
    assert trainer.step_count == 0


def test_a_part_that_cannot_be_saved_fails_before_the_first_step(tmp_path: Path) -> None:
    trainer = distiller(tiny.make_student())
    with pytest.raises(ConfigError, match="encoder Patches was not made by a registry"):
        trainer.fit([tiny.make_batch([2])], out=tmp_path)
    assert trainer.step_count == 0
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing more to one file fails as it does on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_files_intact(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    one_epoch_then(saveable, colours, tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert {path.name for path in before} == {"state.pt", "state.previous.pt"}
    state = load_state(tmp_path / "state.pt")
    state["ballast"] = torch.rand(300_000)
    why = r"Cannot write .*state.*: (File too large|No space left)"
    with files_limited_to(400_000), pytest.raises(ConfigError, match=why):
        save_state(tmp_path / "state.pt", state)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_full_disk_at_the_start_names_the_directory_that_was_given(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    why = rf"Cannot write to {tmp_path}/run: (File too large|No space left)"
    with files_limited_to(1000), pytest.raises(ConfigError, match=why):
        distiller(saveable()).fit(colours, out=tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_a_nan_keeps_the_last_good_checkpoint(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    def poison(trainer: Any) -> None:
        with torch.no_grad():
            trainer.captioner.decoder.embedding.weight.fill_(float("nan"))

    good = one_epoch_then(saveable, colours, tmp_path / "good", 1)
    trainer, out = distiller(saveable()), tmp_path / "bad"
    with pytest.raises(NotFiniteLoss, match=r"Step 5 \(epoch 2\): ce is nan, token is nan"):
        trainer.fit(colours, colours, out=out, callbacks=[At(poison, step=4)])
    best, state = Captioner.load(out / "best"), load_state(out / "state.pt")
    assert state["step"] == 3
    assert tiny.same_bits(best.state_dict(), Captioner.load(tmp_path / "good/best").state_dict())
    assert tiny.same_bits(state["objective"], good.objective.state_dict())
    assert not trainer.captioner.training

    resumed = distiller(saveable(seed=8))
    resumed.fit(colours, colours, out=out, resume=True, callbacks=[At(stop, epoch=1)])
    assert resumed.step_count == 6


# -- case 13 --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_part_is_saved_without_a_prefix(
    saveable: Make, colours: CaptionData, tmp_path: Path, wrapped: bool
) -> None:
    student = saveable()
    names = list(student.state_dict())
    if wrapped:
        student.encoder = torch.compile(student.encoder, backend="eager")  # type: ignore[assignment]
    else:
        student.encoder.compile(backend="eager")
    trainer = Trainer(student, **{**OPTIONS, "epochs": 1})
    trainer.fit(colours, colours, out=tmp_path)
    loaded = Captioner.load(tmp_path / "best").state_dict()
    assert list(loaded) == names
    assert all(map(torch.equal, loaded.values(), student.state_dict().values()))


def test_files_of_a_run_are_readable_by_others(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    one_epoch_then(saveable, colours, tmp_path, 1)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "state.pt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_trainer_that_has_not_stepped_yet_has_a_state():
    assert Trainer(tiny.make_student(), **tiny.QUIET).state_dict()["step"] == 0


def test_a_frozen_encoder_that_was_drawn_anew_gets_the_weights_of_the_run(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    cached: dict[str, Any] = {"cache_features": True, "cache_dir": tmp_path / "cache"}

    first, second = (saveable(seed=seed, trainable=False) for seed in (1, 2))
    Trainer(first, **{**OPTIONS, **cached, "epochs": 1}).fit(colours, out=tmp_path / "run")
    trainer = Trainer(second, **{**OPTIONS, **cached, "epochs": 2})
    with pytest.warns(UserWarning, match="epochs 1 -> 2"):
        trainer.fit(colours, out=tmp_path / "run", resume=True)
    frozen = {n: p for n, p in second.named_parameters() if not p.requires_grad}
    assert frozen
    for name, value in frozen.items():
        assert torch.equal(value, dict(first.named_parameters())[name])
