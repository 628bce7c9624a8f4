"""`bench`: what it finds, how it relates models, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import capdistill as cd
from capdistill.data import sample
from capdistill.errors import CapdistillError, ConfigError, DataError, UnknownName
from capdistill.evaluation import benchmark
from capdistill.evaluation.bench_table import Bench, Measured, Ratio
from capdistill.evaluation.benchmark import bench
from capdistill.evaluation.random_models import published, write_random
from capdistill.evaluation.resources import Latency
from capdistill.evaluation.timed_models import Request, Timing, load_timed, time_batch
from tests.toy_captioner import Patches, tokenizer

PHOTOS = [str(example.path) for example in sample().val.examples]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner of a few hundred parameters."""
    directory = tmp_path_factory.mktemp("saved")
    write_random("debug_student", directory)
    return directory


class FakeProcess:
    """Answers as a process of a model that takes as many milliseconds as its directory says."""

    order: list[str] = []  # noqa: RUF012  the turns of all of them
    last_calls: dict[str, int] = {}  # noqa: RUF012  the one at which a model fails

    def __init__(self, request: Request, errors: object) -> None:
        self.name, self.milliseconds = request.directory, float(Path(request.directory).name)
        self.first = {"caption": "a dog", "parameters": 7, "processor": 0.5}
        self.start_seconds, self.calls = 2.0, 0

    def time(self, batches: list[list[str]]) -> tuple[list[Timing], int]:
        FakeProcess.order.append(Path(self.name).name)
        self.calls += 1
        if self.calls == FakeProcess.last_calls.get(Path(self.name).name):
            raise CapdistillError(f"bench: {self.name}: no memory")
        seconds = self.milliseconds / 1000
        warm_up = [Timing(9.0, 9.0, 9.0, 9.0)] * (len(batches) > 1)
        each = Timing(seconds / 4, seconds / 4, seconds / 2, seconds * 2)
        return [*warm_up, *[each] * (len(batches) - len(warm_up))], self.calls * 1000

    def end(self) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Directories of a model that takes 10 ms and one that takes 30 ms."""
    monkeypatch.setattr(benchmark, "_Process", FakeProcess)
    FakeProcess.order.clear()
    FakeProcess.last_calls.clear()
    found = [tmp_path / "10", tmp_path / "30"]
    for directory in found:
        directory.mkdir()
        (directory / "weights").write_bytes(b"1234")
    return found


def test_models_take_turns_and_are_related_round_by_round(fake: list[Path]) -> None:
    found = bench({"fast": fake[0], "slow": fake[1]}, PHOTOS, rounds=3, batch_size=5, starts=2)
    assert FakeProcess.order == ["10", "30", "30", "10", "10", "30"] * 2  # images, then batches
    slow = found.models["slow"]
    assert slow.latency_ms == Latency(pytest.approx(30.0), pytest.approx(30.0), 12)
    assert slow.reading_ms.median == pytest.approx(7.5)  # the untimed image of 9 s is left out
    assert slow.captions_per_second == pytest.approx(5 / 0.030)
    assert (slow.disk_bytes, slow.parameters, slow.start_seconds) == (4, 7, 2.0)
    assert (slow.memory_bytes, slow.batch_memory_bytes) == (3000, 6000)
    assert found.ratios["slow"]["latency"] == Ratio(*[pytest.approx(3.0)] * 3)
    assert found.ratios["slow"]["processor"].median == pytest.approx(3.0)


def test_any_model_can_be_the_reference(fake: list[Path]) -> None:
    models = {"fast": fake[0], "slow": fake[1]}
    found = bench(models, PHOTOS, rounds=1, batch_size=0, reference="slow")
    assert found.ratios["fast"]["latency"].median == pytest.approx(1 / 3)
    assert found.models["fast"].captions_per_second is None
    assert "Time of slow" in str(found)
    with pytest.raises(ConfigError, match=r"Did you mean 'slow'"):
        bench(models, PHOTOS, reference="slwo")


def test_a_model_that_fails_midway_leaves_the_figures_of_the_others(fake: list[Path]) -> None:
    FakeProcess.last_calls["10"] = 2
    found = bench({"fast": fake[0], "slow": fake[1]}, PHOTOS, rounds=3, batch_size=5)
    assert FakeProcess.order == ["10", "30", "30", "10", "30"] + ["30"] * 3
    assert ([*found.models], found.reference) == (["slow"], "slow")
    assert found.models["slow"].latency_ms.n == 12
    assert found.failed == {"fast": f"bench: {fake[0]}: no memory"}
    assert str(found).endswith("no memory")
    assert found.to_json()["failed"] == found.failed
    FakeProcess.last_calls["30"] = 1
    FakeProcess.order.clear()
    with pytest.raises(CapdistillError, match=r"30: no memory.*10: no memory"):
        bench({"fast": fake[0], "slow": fake[1]}, PHOTOS)
    assert FakeProcess.order == ["10", "30", "10"]


def test_images_that_cannot_be_read_are_named_and_left_out(
    fake: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.warns(UserWarning, match=r"left out: .*notes\.jpg"):
        found = bench([fake[0]], [tmp_path / "notes.jpg", *PHOTOS], rounds=1)
    assert found.models[str(fake[0])].latency_ms.n == 4
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match="none of the 1 images can be read"),
    ):
        bench([fake[0]], [tmp_path / "notes.jpg"])


def test_the_spread_of_a_ratio_is_that_of_the_rounds() -> None:
    assert Ratio.of([4.0, 1.0, 2.0]) == Ratio(median=2.0, low=1.0, high=4.0)


def test_the_table_and_the_json_hold_the_same_figures() -> None:
    time = Latency(median=25.0, p95=30.0, n=4)
    one = Measured(
        kind="onnx",
        parameters=7_180_000,
        disk_bytes=8_500_000,
        memory_bytes=90_000_000,
        batch_memory_bytes=None,
        start_seconds=0.5,
        start_processor_seconds=0.25,
        latency_ms=time,
        reading_ms=time,
        encoding_ms=time,
        decoding_ms=time,
        processor_ms=time,
        captions_per_second=None,
        caption="a dog",
    )
    two = replace(one, latency_ms=Latency(250.0, 300.0, 4))
    ratios = {"a": dict.fromkeys(("latency", "processor"), Ratio(1.0, 1.0, 1.0))}
    ratios["b"] = dict.fromkeys(("latency", "processor"), Ratio(10.0, 9.0, 11.0))
    settings = {"threads": 1, "rounds": 2, "images_per_round": 2, "batch_size": 0, "words": None}
    found = Bench({"a": one, "b": two}, ratios, "a", settings)
    lines = str(found).splitlines()
    assert next(line.split() for line in lines if line.startswith("Size")) == [
        *["Size", "on", "disk"],
        *["8.5", "MB", "8.5", "MB"],
    ]
    assert any("10.0 x (9.0-11.0)" in line for line in lines)
    values = json.loads(json.dumps(found.to_json()))
    assert values["schema"] == "capdistill.bench/1"
    assert values["models"]["b"]["latency_ms"]["median"] == 250.0
    assert values["ratios"]["b"]["latency"] == {"median": 10.0, "low": 9.0, "high": 11.0}


@pytest.mark.parametrize("words", [4, 9])
def test_every_caption_has_the_wanted_length(saved: Path, words: int) -> None:
    model = load_timed(Request("torch", str(saved), PHOTOS[0], words=words))
    _, captions = time_batch(model, PHOTOS[:2])
    assert [len(caption.split()) for caption in captions] == [words, words]


def test_parts_of_the_time_add_up(saved: Path) -> None:
    model = load_timed(Request("torch", str(saved), PHOTOS[0], words=5))
    timing, [caption] = time_batch(model, PHOTOS[:1])
    assert min(timing.reading, timing.encoding, timing.decoding) > 0
    assert timing.total == timing.reading + timing.encoding + timing.decoding
    assert caption == cd.Captioner.load(saved).caption(PHOTOS[0], max_length=5, min_length=4)
    assert model.parameters == cd.Captioner.load(saved).num_parameters()


def test_an_exported_captioner_is_timed_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    part = cd.decoders.create("lstm", dim=8, heads=2, layers=1, embed=6, hidden=8)
    captioner = cd.Captioner(Patches(dim=8), part, tokenizer(), name="toy").eval()
    cd.deploy.export(captioner, tmp_path, progress=False)
    model = load_timed(Request("onnx", str(tmp_path), PHOTOS[0]))
    timing, captions = time_batch(model, PHOTOS[:2])
    assert captions == captioner.caption(PHOTOS[:2])
    assert 0 < timing.encoding < timing.total
    counted = benchmark._constants(str(tmp_path))
    assert counted is not None
    assert counted >= captioner.num_parameters() - 2 * 6 * 4  # a batch norm is folded


@pytest.mark.slow
def test_processes_of_their_own_are_measured_and_end(saved: Path) -> None:
    found = bench({"a": saved}, PHOTOS[:2], rounds=1, images_per_round=1, batch_size=2, starts=1)
    model = found.models["a"]
    assert 2**26 < model.memory_bytes <= (model.batch_memory_bytes or 0)
    assert model.start_seconds * 1000 > model.latency_ms.median > 0
    assert model.disk_bytes == benchmark.disk_bytes(saved)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "captioner.json").write_text("{}")
    with pytest.raises(CapdistillError, match=r"bench: .*captioner\.json"):
        bench([tmp_path], PHOTOS[:1], progress=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rounds": 0}, "rounds"),
        ({"words": 1}, "words"),
        ({"threads": 0}, "threads"),
        ({"batch_size": -1}, "batch_size"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"bench: {reason}"):
        bench(["debug_student"], PHOTOS, **options)


def test_unknown_models_and_missing_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'debug_student'"):
        bench(["debug_studnet"], PHOTOS, progress=False)
    with pytest.raises(ConfigError, match="no model"):
        bench([], PHOTOS)
    with pytest.raises(ConfigError, match="twice"):
        bench(["debug_student", "debug_student"], PHOTOS)
    with pytest.raises(DataError, match="holds no image"):
        bench(["debug_student"], tmp_path)


# -- captioners of transformers by configuration ------------------------------------------------

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {**TINY, "image_size": 16, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 30, "max_position_embeddings": 40}


def tiny(kind: str) -> dict[str, Any]:
    if kind == "git":
        return {**TEXT, "vision_config": VISION, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "blip":
        ids = {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
        return {
            "text_config": {**TEXT, **ids, "encoder_hidden_size": 16},
            "vision_config": {**VISION, "initializer_range": 0.02},
        }
    decoder = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 30}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "add_cross_attention": True, "is_decoder": True}
    return {
        "encoder": {**VISION, "model_type": "vit"},
        "decoder": {**decoder, **ids, "model_type": "gpt2"},
        **{"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }


@pytest.mark.parametrize("kind", ["git", "blip", "vision-encoder-decoder"])
def test_a_configuration_is_timed_with_random_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file, directory = tmp_path / "given.json", tmp_path / "written"
    file.write_text(json.dumps({"model_type": kind, **tiny(kind)}))
    write_random(f"hf-config:{file}", directory)
    model = load_timed(Request("transformers", str(directory), PHOTOS[0], words=5))
    timing, captions = time_batch(model, PHOTOS[:2])
    lengths = {len(caption.split()) for caption in captions}
    assert lengths <= {6, 7}  # the start token, for BLIP and GIT, and five more
    assert 0 < timing.encoding < timing.total
    assert model.parameters


def test_published_configurations_have_the_published_sizes() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    classes = {  # BLIP's 247.4 million count the embedding twice, which is also its last layer
        "blip-base": ("BlipForConditionalGeneration", 224.0),
        "git-base": ("GitForCausalLM", 176.6),
        "vit-gpt2": ("VisionEncoderDecoderModel", 239.2),
    }
    for name, (kind, millions) in classes.items():
        with torch.device("meta"):
            model = getattr(transformers, kind)(published(name))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_unknown_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'blip-base'"):
        published("blip-bse")
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"'bert'; only blip, git"):
        published(str(tmp_path / "config.json"))
