"""`trainable=n` with `cache_features=True`: the last stages learn the same as from pixels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer, encoders
from capdistill.errors import ConfigError, DataError

QUIET: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "progress": False,
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "augment": False,
}


@pytest.fixture(scope="module")
def data():
    return cd.data.sample().train.subset(8)


@pytest.fixture(scope="module")
def tokenizer(data):
    return cd.WordTokenizer.train(data.captions, min_count=2)


def make(tokenizer, kind: str = "timm", name: str = "test_efficientnet", **options: Any):
    torch.manual_seed(0)
    encoder = encoders.create(
        kind, **{"name": name, "dim": 8, "weights": False, "image_size": 32, **options}
    )
    decoder = cd.decoders.create("lstm", dim=8, embed=8, hidden=12, layers=1, heads=2, dropout=0.0)
    return Captioner(encoder, decoder, tokenizer, name="student")


def counted(captioner: Captioner, part: str) -> list[int]:
    """Batch sizes that a part of the backbone has seen."""
    seen: list[int] = []
    module = captioner.encoder.backbone.get_submodule(part)
    module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(
    ("kind", "name", "stem"),
    [
        ("timm", "test_efficientnet", "conv_stem"),
        ("timm", "test_vit", "patch_embed"),
        ("torchvision", "resnet18", "conv1"),
    ],
)
def test_last_stages_learn_the_same_from_cached_maps(data, tokenizer, tmp_path, kind, name, stem):
    plain, quick = (make(tokenizer, kind, name, trainable=1) for _ in range(2))
    before = copy.deepcopy(plain.state_dict())
    rows = []
    for captioner, cached in ((plain, False), (quick, True)):
        trainer = Trainer(captioner, **QUIET, cache_features=cached, cache_dir=str(tmp_path))
        seen = counted(captioner, stem)
        trainer.fit(data, data)
        rows.append(
            [row[part]["loss"] for row in trainer.history.epochs for part in ("train", "val")]
        )
    assert rows[0] == pytest.approx(rows[1], rel=0.02)  # maps are kept as float16
    assert sum(seen) == len(data) + 4  # each image once, and two of noise twice
    changed = [k for k, v in quick.state_dict().items() if not torch.equal(v, before[k])]
    assert any(key.startswith("encoder.backbone") for key in changed)
    frozen = {key for key, p in quick.named_parameters() if not p.requires_grad}
    assert not frozen & set(changed)
    for key, count in plain.state_dict().items():
        if key.endswith("num_batches_tracked"):  # of trained batch norms alone
            assert count == quick.state_dict()[key], key


def test_teacher_student_and_an_earlier_run_share_one_cache(data, tokenizer, tmp_path):
    cache = {**QUIET, "cache_features": True, "cache_dir": str(tmp_path)}
    teacher, student = (make(tokenizer, trainable=1) for _ in range(2))
    Trainer(teacher, **cache).fit(data)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    other = make(tokenizer, trainable=1)  # of the same pretrained stages
    both = cd.teachers.Ensemble({"first": teacher, "second": other})
    rows = []
    for options in (cache, {**cache, "cache_features": False}):
        distiller = Distiller(both, copy.deepcopy(student), losses={"t": "token"}, **options)
        seen = [counted(model, "conv_stem") for model in (teacher, other, distiller.student)]
        distiller.fit(data)
        rows.append([row["train"]["loss"] for row in distiller.history.epochs])
        images = [sum(number for number in each if number != 2) for each in seen]
        assert options is not cache or images == [0, 0, 0]  # two are of noise, for the cut
    assert rows[0] == pytest.approx(rows[1], rel=0.02)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    fitted = cd.teachers.caption(
        teacher,
        data,
        tmp_path / "captions.jsonl",
        cache_features=True,
        cache_dir=tmp_path,
        precision="fp32",
        device="cpu",
        progress=False,
        max_length=4,
    )
    assert len(fitted) == len(data)
    assert len(list(tmp_path.glob("*.fp16"))) == 1


@pytest.mark.parametrize("trainable", ["none", "all"])
def test_the_trunk_of_any_other_teacher_is_cached_whole(data, tokenizer, tmp_path, trainable):
    teacher, student = make(tokenizer, trainable=trainable), make(tokenizer, trainable=2)
    distiller = Distiller(teacher, student, **QUIET, cache_features=True, cache_dir=str(tmp_path))
    seen = counted(teacher, "conv_head")
    distiller.fit(data)
    assert sum(seen) == len(data)  # once, in two epochs


def test_the_size_of_an_automatic_cache_is_that_of_what_it_holds(data, tokenizer):
    from capdistill.training.sources import _cached_bytes

    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for trainable, cut in (("none", False), (1, True), (3, True), ("all", False)):
        encoder = make(tokenizer, trainable=trainable).encoder.eval()
        assert _cached_bytes(encoder) == 2 * encoder.to_cache(images, trained=cut).numel()


def test_weights_changed_through_data_are_encoded_anew(data, tokenizer, tmp_path):
    captioner = make(tokenizer, trainable=1)
    options = {**QUIET, "cache_features": True, "cache_dir": str(tmp_path)}
    Trainer(captioner, **options).fit(data)
    seen = counted(captioner, "conv_stem")
    Trainer(captioner, **options).fit(data)
    assert seen == []
    captioner.encoder.backbone.conv_stem.weight.data.mul_(2)
    Trainer(captioner, **options).fit(data)
    assert sum(seen) == len(data)


def test_a_stage_that_is_unfrozen_or_frozen_meanwhile_is_not_read_from_the_cache(
    tokenizer, tmp_path
):
    captioner = make(tokenizer, trainable=1).eval()
    encoder = captioner.encoder
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    cached = {encoder.cache_key(): encoder.to_cache(images)}
    assert_close(encoder.tokens_from(cached), encoder.trunk(images))
    encoder.backbone.blocks[3].requires_grad_(True)
    assert encoder.tokens_from(cached) is None
    encoder.backbone.requires_grad_(False)
    assert encoder.tokens_from(cached) is None


def test_a_copy_and_a_pickle_of_an_encoder_hash_their_own_weights(tokenizer):
    encoder = make(tokenizer, trainable=1).eval().encoder
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    cached = {encoder.cache_key(): encoder.to_cache(images)}
    other = copy.deepcopy(encoder)
    assert_close(other.tokens_from(cached), encoder.trunk(images))
    other.backbone.conv_stem.weight.data.mul_(2)
    assert copy.deepcopy(other).tokens_from(cached) is None


def test_a_batch_without_pixels_or_own_values_is_refused(data, tokenizer, tmp_path):
    captioner = make(tokenizer, trainable=1)

    class Retrain:
        def on_step(self, trainer, row):
            with torch.no_grad():
                captioner.encoder.backbone.conv_stem.weight.add_(1.0)

    trainer = Trainer(captioner, **QUIET, cache_features=True, cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"frozen stages are trained, or were changed since"):
        trainer.fit(data, callbacks=[Retrain()])


def test_all_stages_trained_is_refused_with_the_fix(data, tokenizer, tmp_path):
    captioner = make(tokenizer, trainable="all")
    trainer = Trainer(captioner, **QUIET, cache_features=True, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no encoder has frozen stages.*number of last stages"):
        trainer.fit(data)


def test_a_directory_that_cannot_be_written_names_its_option(data, tokenizer, tmp_path: Path):
    (tmp_path / "file").write_text("taken")
    trainer = Trainer(
        make(tokenizer), **QUIET, cache_features=True, cache_dir=str(tmp_path / "file" / "cache")
    )
    with pytest.raises(ConfigError, match=r"Cannot write .*cache_dir="):
        trainer.fit(data)
