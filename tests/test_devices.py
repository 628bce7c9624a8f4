"""What a device must not change: values, captions, resumed runs; and how often the host waits.

They run on CUDA where it is, and otherwise on the device of `elsewhere.py`, which computes here but
has the rules of another device.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.outputs import Batch, places
from capdistill.teachers import Ensemble, MeanTeacher, cache
from capdistill.training import GradNorm, Uncertainty
from tests.elsewhere import NAME, elsewhere, register
from tests.training import tiny_models as tiny

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else NAME
cuda_alone = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")

LOSSES = sorted(cd.losses.registry._builtins)
TRAIN = [
    tiny.make_batch([3, 1, 2, 3, 2, 1, 3, 3], k=2),
    tiny.make_batch([2, 2, 1, 3], k=2, first=8),
]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SHORT: dict[str, Any] = {
    "precision": "fp32",
    "progress": False,
    "device": DEVICE,
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 0.01,
    "captions_per_image": 2,
}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The device that the test runs on; on CUDA without TensorFloat-32, to compare with the CPU."""
    if CUDA:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield None
        return
    try:
        register()
    except ImportError:
        pytest.skip("this torch cannot have a device that is written in Python")
    with elsewhere() as device:
        yield device


@pytest.fixture(scope="module")
def photos() -> cd.data.CaptionData:
    return cd.data.sample().train.subset(6)


@pytest.fixture(scope="module")
def tokenizer(photos: cd.data.CaptionData) -> cd.WordTokenizer:
    return cd.WordTokenizer.train(photos.captions, min_count=1)


def captioner(name: str, tokenizer: Any, seed: int = 0) -> cd.Captioner:
    torch.manual_seed(seed)
    return cd.Captioner.create(name, tokenizer=tokenizer)


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_are_those_of_the_cpu(name: str) -> None:
    found = {}
    for device in ("cpu", DEVICE):
        trainer = cd.Distiller(
            tiny.make_teacher(),
            tiny.make_student(),
            {name: name},
            {"ce": 0.5, name: 1.0},
            device=device,
            precision="fp32",
        )
        torch.manual_seed(0)  # of the projectors
        trainer.make_ready(TRAIN[0])
        if found:
            trainer.objective.load_state_dict(found["state"])
        else:
            found["state"] = copy.deepcopy(trainer.objective.state_dict())
        term = trainer.terms(TRAIN[0])[name]
        term.weighted.backward()
        gradients = {
            n: p.grad.cpu() for n, p in trainer.objective.named_parameters() if p.grad is not None
        }
        found[device] = term.sum.detach().cpu(), gradients
    torch.testing.assert_close(found[DEVICE][0], found["cpu"][0], **CLOSE)
    torch.testing.assert_close(found[DEVICE][1], found["cpu"][1], **CLOSE)


@pytest.mark.parametrize("preset", ["debug_student", "debug_teacher"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"beam_size": 3, "num_return": 2}, {"no_repeat_ngram": 2}],
    ids=["greedy", "beam", "best", "constraints"],
)
def test_captions_are_those_of_the_cpu_alone_and_in_a_batch(
    preset: str, options: dict[str, Any], photos: Any, tokenizer: Any
) -> None:
    model = captioner(preset, tokenizer)
    paths = [example.path for example in photos.examples]
    expected = model.caption(paths, max_length=8, **options)
    model.to(DEVICE)
    assert model.caption(paths, max_length=8, **options) == expected
    assert [model.caption([path], max_length=8, **options)[0] for path in paths] == expected


def test_sampled_captions_are_those_of_the_cpu(photos: Any, tokenizer: Any) -> None:
    model = captioner("debug_student", tokenizer)
    paths = [example.path for example in photos.examples]
    options = {"sample": True, "seed": 3, "max_length": 8}
    expected = model.caption(paths, **options)
    assert model.to(DEVICE).caption(paths, **options) == expected


def test_a_captioner_moves_between_devices_by_file(tmp_path: Path, tokenizer: Any) -> None:
    model = captioner("debug_teacher", tokenizer).to(DEVICE)
    model.save(tmp_path)
    assert cd.Captioner.load(tmp_path).device.type == "cpu"
    again = cd.Captioner.load(tmp_path, device=DEVICE)
    assert again.device.type == DEVICE.split(":")[0]
    assert states_equal(model, again)


# -- training -------------------------------------------------------------------------------------


def distiller(tokenizer: Any, teacher: Any = None, **options: Any) -> cd.Distiller:
    student = captioner("debug_student", tokenizer, 1)
    teacher = teacher or captioner("debug_teacher", tokenizer, 2)
    return cd.Distiller(teacher, student, **{**SHORT, **options})


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=cuda_alone), pytest.param("fp16", marks=cuda_alone)],
)
def test_distillation_learns_in_every_precision(
    precision: str, photos: Any, tokenizer: Any
) -> None:
    trainer = distiller(tokenizer, precision=precision, epochs=6)
    assert trainer.device.type == DEVICE.split(":")[0]
    history = trainer.fit(photos, photos)
    losses = [epoch["train"]["loss"] for epoch in history.epochs]
    assert losses[-1] < 0.9 * losses[0]
    assert history.epochs[-1]["val"]["images"] == len(photos)


METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averages": {"ema_decay": 0.9},
    "words": {"word_dropout": 0.2, "scheduled_sampling": 0.3},
    "micro-batches": {"accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "int8": {"quantize": "int8"},
    "on-policy": {"on_policy": 0.5},
    "uncertainty": {"weights": Uncertainty({"ce": 0.5, "token": 0.5})},
    "gradient norms": {"weights": GradNorm({"ce": 0.5, "token": 0.5})},
    "loss scaling": {"precision": "fp16"},
    "workers": {"num_workers": 2},
    "cached features": {"cache_features": True, "cache_views": 2},
}


def made(method: str, tokenizer: Any, folder: Path) -> cd.Distiller:
    options = copy.deepcopy(METHODS[method])
    if "cache_features" in options:
        options["cache_dir"] = str(folder / "cache")
    return distiller(tokenizer, **options)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=cuda_alone) if m == "loss scaling" else m for m in METHODS]
)
def test_a_resumed_run_ends_where_a_whole_one_does(
    method: str, photos: Any, tokenizer: Any, tmp_path: Path
) -> None:
    whole = made(method, tokenizer, tmp_path)
    whole.fit(photos, photos, out=tmp_path / "whole")

    class Stop:
        def on_step(self, trainer: Any, row: Any) -> None:
            trainer.history.interrupted = row["step"] == 2

    first = made(method, tokenizer, tmp_path)
    with pytest.warns(UserWarning, match="Interrupted after step 2"):
        first.fit(photos, photos, out=tmp_path / "parts", callbacks=[Stop()])
    second = made(method, tokenizer, tmp_path)
    second.fit(photos, photos, out=tmp_path / "parts", resume=True)
    one, other = (
        {n: p.detach().cpu() for n, p in t.objective.named_parameters()} for t in (whole, second)
    )
    # Sums on the device may be added in another order.
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_self_critical_training_runs_with_a_teacher(photos: Any, tokenizer: Any) -> None:
    trainer = cd.SelfCritical(
        captioner("debug_student", tokenizer, 1),
        teacher=captioner("debug_teacher", tokenizer, 2),
        losses={"token": "token"},
        weights={"token": 0.1},
        samples=2,
        **{k: v for k, v in SHORT.items() if k != "captions_per_image"},
    )
    history = trainer.fit(photos, photos)
    assert len(history.epochs) == 2
    assert trainer.captioner.device.type == DEVICE.split(":")[0]


def test_several_teachers_a_mean_teacher_and_cached_targets(
    photos: Any, tokenizer: Any, tmp_path: Path
) -> None:
    members = {n: captioner("debug_teacher", tokenizer, seed) for n, seed in (("a", 2), ("b", 3))}
    one: dict[str, Any] = {"losses": {"token": "token"}, "augment": False}
    feature = {"feature": {"name": "feature", "teacher": "a"}, "token": "token"}
    distiller(tokenizer, Ensemble(members), losses=feature).fit(photos, photos)
    student = captioner("debug_student", tokenizer, 1)
    cd.Distiller(MeanTeacher(student), student, {"token": "token"}, **SHORT).fit(photos, photos)
    for model in members.values():
        model.cpu()
    targets = {
        name: cache(model, photos, tmp_path / name, val=photos) for name, model in members.items()
    }
    stored = distiller(tokenizer, Ensemble(targets), **one)
    stored.fit(photos, photos)
    same = distiller(tokenizer, Ensemble(members), **one)
    same.fit(photos, photos)
    a, b = stored.history.epochs[-1]["train"]["loss"], same.history.epochs[-1]["train"]["loss"]
    assert a == pytest.approx(b, rel=2e-2)


def test_cached_features_are_those_of_the_device(
    photos: Any, tokenizer: Any, tmp_path: Path
) -> None:
    losses = []
    for cached in (True, False):
        trainer = distiller(
            tokenizer, augment=False, cache_features=cached, cache_dir=str(tmp_path)
        )
        trainer.fit(photos, photos)
        losses.append(trainer.history.epochs[-1]["train"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@cuda_alone
def test_check_and_profile(photos: Any, tokenizer: Any) -> None:
    trainer = distiller(tokenizer, profile=True)
    report = trainer.check(photos, photos)
    assert not [row for row in report.rows if row.status == "fail"], str(report)
    assert "the allocator's peak" in str(report)
    history = trainer.fit(photos, photos)
    assert history.epochs[-1]["profile"]


@cuda_alone
def test_evaluation_measures_memory_and_time(photos: Any, tokenizer: Any) -> None:
    model = captioner("debug_student", tokenizer)
    found = cd.evaluate(model, photos, metrics=["bleu"], device=DEVICE, precision="fp32")
    assert found.device == "cuda"
    plain = cd.evaluate(model, photos, metrics=["bleu"], device="cpu", precision="fp32")
    assert found.captions == plain.captions
    assert found.memory is not None
    assert found.memory.peak > 0
    assert model.device.type == "cpu"


def test_a_captioner_on_the_device_is_exported(photos: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from capdistill.deploy import OnnxCaptioner, export

    model = captioner("debug_student", tokenizer).to(DEVICE)
    paths = [example.path for example in photos.examples]
    expected = model.caption(paths, max_length=8)
    export(model, tmp_path / "out")
    assert model.device.type == DEVICE.split(":")[0]
    assert OnnxCaptioner.load(tmp_path / "out").caption(paths, max_length=8) == expected


@cuda_alone
def test_one_process_of_a_launcher_trains_with_nccl(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import capdistill as cd\n"
        "data = cd.data.sample().train.subset(8)\n"
        "tokenizer = cd.WordTokenizer.train(data.captions, min_count=1)\n"
        "models = [cd.Captioner.create(n, tokenizer=tokenizer)"
        " for n in ('debug_teacher', 'debug_student')]\n"
        "trainer = cd.Distiller(*models, epochs=1, batch_size=2, progress=False)\n"
        "trainer.fit(data, data)\n"
        "print(trainer.device, trainer.ranks.world_size)\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
    done = subprocess.run([*run, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cuda" in done.stdout


def test_members_of_an_ensemble_may_begin_on_different_devices(photos: Any, tokenizer: Any) -> None:
    there = captioner("debug_student", tokenizer, 2).to(DEVICE)  # as after an earlier distillation
    here = captioner("debug_teacher", tokenizer, 3)
    both = Ensemble({"there": there, "here": here})
    found = cd.evaluate(both, photos, metrics=["bleu"], device="cpu", precision="fp32")
    assert (there.device.type, here.device.type) == (DEVICE.split(":")[0], "cpu")
    again = cd.evaluate(both, photos, metrics=["bleu"], device=DEVICE, precision="fp32")
    assert again.captions == found.captions
    assert here.device.type == "cpu"
    trainer = distiller(tokenizer, both, losses={"token": "token"}, schedule="constant")
    assert {p.device.type for p in both.parameters()} == {DEVICE.split(":")[0]}
    assert trainer.fit(photos, photos).epochs


# -- waiting --------------------------------------------------------------------------------------


def test_places_of_a_mask_that_was_changed_on_the_device_are_found_again() -> None:
    batch = TRAIN[0].to(DEVICE)
    assert torch.equal(places(batch.target_mask).cpu(), places(TRAIN[0].target_mask))
    batch.mask[0] = False
    expected = batch.target_mask.cpu().flatten().nonzero().squeeze(1)
    assert torch.equal(places(batch.target_mask).cpu(), expected)


def waits(work: Callable[[], object], device: Any) -> list[str]:
    """Where the host waits for the device during the work."""
    if device is not None:
        device.waits.clear()
        work()
        return list(device.waits)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA" in str(w.message)]


@pytest.mark.parametrize(
    "losses", [["token"], ["token", "feature", "hidden"], ["jsd", "relational"]]
)
def test_a_step_waits_for_the_device_once(losses: list[str], tokenizer: Any, device: Any) -> None:
    named = {name: name for name in losses}
    weights = {"ce": 0.5, **dict.fromkeys(losses, 0.1)}
    trainer = distiller(tokenizer, losses=named, weights=weights, schedule="constant")
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tokenizer), (8, 10), generator=chance)
    side = max(trainer.teacher.image_size, trainer.student.image_size)
    batch = Batch(
        images=torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=chance),
        input_ids=ids,
        mask=torch.arange(10) < torch.randint(4, 11, (8, 1), generator=chance),
        captions=("",) * 8,
        image_ids=tuple("abcd"),
    )
    for _ in range(3):
        trainer.step(batch)
    found = waits(lambda: trainer.step(batch), device)
    assert len(found) == 1, "\n".join(found)
