"""`cache_features`: the same training without the trunk, never a wrong or a half-written token."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import Dataset

from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData, sample
from capdistill.data.collate import FeatureCache
from capdistill.data.loader import Loader
from capdistill.errors import ConfigError, DataError
from capdistill.feature_cache import Wanted, cache_trunks
from capdistill.training import cache_features
from tests.training import tiny_models as tiny

OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 2, "learning_rate": 0.01}


def frozen(seed: int = 1, **options: Any) -> Captioner:
    return tiny.make_student(seed, trainable=False, **options)


def fit(captioner: Captioner, data: Any, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(
        captioner, **{**OPTIONS, "cache_dir": str(folder), "cache_features": False, **options}
    )
    trainer.fit(data, data)
    return trainer


def cached(captioner: Captioner, data: Any, folder: Path, **options: Any) -> Trainer:
    return fit(captioner, data, folder, cache_features=True, **options)


def loader(data: Any, batch_size: int = 2) -> Loader:
    return Loader(data, tiny.TOKENIZER, image_size=tiny.SIDE, batch_size=batch_size)


def losses(trainer: Trainer) -> list[float]:
    rows = trainer.history.epochs
    return [row["train"]["loss"] for row in rows] + [row["val"]["loss"] for row in rows]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 2e-2)])
def test_losses_are_those_without_the_cache(
    colours: CaptionData, tmp_path: Path, precision: str, tolerance: float
) -> None:
    plain = fit(frozen(), colours, tmp_path, augment=False, precision=precision)
    quick = cached(frozen(), colours, tmp_path, precision=precision)
    assert losses(quick) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(quick)[0] != losses(quick)[1]


def test_a_pair_is_distilled_from_two_caches(colours: CaptionData, tmp_path: Path) -> None:
    rows = []
    for options in ({"augment": False, "cache_features": False}, {"cache_features": True}):
        pair = tiny.make_teacher(trainable=False), frozen()
        distiller = Distiller(*pair, **{**OPTIONS, "cache_dir": str(tmp_path), **options})
        distiller.fit(colours)
        rows.append(losses_of_terms(distiller))
    assert_close(rows[0], rows[1], rtol=5e-3, atol=1e-3)
    assert len(list(tmp_path.glob("*.fp16"))) == 2


def test_a_teachers_trunk_is_cached_however_it_was_trained(
    colours: CaptionData, tmp_path: Path
) -> None:
    teacher = tiny.make_teacher(trainable=True)
    assert not teacher.encoder.trunk_frozen
    distiller = Distiller(teacher, frozen(), **{**OPTIONS, "cache_dir": str(tmp_path)})
    before = teacher.encoder.seen
    distiller.fit(colours, cache_features=True)
    assert teacher.encoder.seen == before + 6  # each image once, in two epochs


def losses_of_terms(distiller: Distiller) -> dict[str, float]:
    terms = distiller.history.epochs[-1]["train"]["terms"]
    return {name: term["raw"] for name, term in terms.items()}


def test_ready_made_batches_are_validated_beside_cached_training_images(
    colours: CaptionData, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**OPTIONS, "cache_dir": str(tmp_path), "cache_features": None}
    trainer = Trainer(frozen(), **{**options, "augment": None})
    trainer.fit(colours, list(loader(colours).epoch(0)))
    assert trainer.cached
    assert losses(trainer) == pytest.approx(losses(cached(frozen(), colours, tmp_path)), rel=2e-3)


def test_every_image_is_encoded_once_and_never_again(colours: CaptionData, tmp_path: Path) -> None:
    first = frozen()
    cached(first, colours, tmp_path)
    assert first.encoder.seen == 6  # one data set for training and validation: one cache
    again = frozen()
    cached(again, colours, tmp_path)
    assert again.encoder.seen == 0


def test_other_weights_or_other_pictures_never_use_the_cache(
    colours: CaptionData, tmp_path: Path
) -> None:
    cached(frozen(), colours, tmp_path)
    other = frozen(seed=5)
    cached(other, colours, tmp_path)
    assert other.encoder.seen == 6
    path = colours.examples[0].path
    path.write_bytes(colours.examples[1].path.read_bytes())
    changed = frozen()
    cached(changed, colours, tmp_path)
    assert changed.encoder.seen == 6


def test_cached_tokens_never_reach_a_trunk_with_other_weights(
    colours: CaptionData, tmp_path: Path
) -> None:
    def retrain(trainer: Trainer, row: Any) -> None:
        with torch.no_grad():
            trainer.captioner.encoder.conv.weight.add_(1.0)

    callback = type("Callback", (), {"on_step": staticmethod(retrain)})()
    trainer = Trainer(frozen(), **OPTIONS, cache_features=True, cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="no tokens of this encoder as it is now"):
        trainer.fit(colours, callbacks=[callback])
    assert trainer.step_count == 1


class Noise(Dataset[Any]):
    """Pictures without files; two data sets differ in nothing but the pixels."""

    def __init__(self, seed: int, images: int = 4) -> None:
        chance, shape = torch.Generator().manual_seed(seed), (images, 3, 8, 8)
        self.images = torch.randint(256, shape, generator=chance, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.images[index], "a red dog"


def test_data_sets_without_files_are_told_apart_by_their_pixels(tmp_path: Path) -> None:
    cached(frozen(), Noise(1), tmp_path)
    other, same = frozen(), frozen()
    plain = fit(frozen(), Noise(2), tmp_path, augment=False)
    assert losses(cached(other, Noise(2), tmp_path)) == pytest.approx(losses(plain), rel=2e-3)
    cached(same, Noise(2), tmp_path)
    assert (other.encoder.seen, same.encoder.seen) == (4, 0)


@pytest.mark.parametrize("options", [{"augment": True}, {"flip": True}])
def test_random_augmentation_is_refused_with_the_reason(
    colours: CaptionData, tmp_path: Path, options: dict[str, bool]
) -> None:
    with pytest.raises(ConfigError, match=r"one encoding per image.*random augmentation"):
        cached(frozen(), colours, tmp_path, **options)


def test_a_trunk_that_is_trained_is_refused(colours: CaptionData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no encoder has frozen stages.*trainable='none'"):
        cached(tiny.make_student(), colours, tmp_path)
    with pytest.raises(ConfigError, match="needs a data set"):
        cached(frozen(), [tiny.make_batch([2])], tmp_path)


def test_a_pair_with_one_frozen_trunk_reads_pictures_for_the_other(
    colours: CaptionData, tmp_path: Path
) -> None:
    pair = tiny.make_teacher(trainable=False), tiny.make_student()
    options = {**OPTIONS, "cache_dir": str(tmp_path), "cache_features": True}
    distiller = Distiller(*pair, **options)
    seen = pair[0].encoder.seen
    distiller.fit(colours)
    assert pair[0].encoder.seen - seen == 6
    assert pair[1].encoder.seen >= 12


@pytest.mark.parametrize("first_run", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_left_out_and_named_with_the_cache_too(
    colours: CaptionData, tmp_path: Path, first_run: bool, workers: int
) -> None:
    bad = colours.examples[0].path
    bad.write_bytes(b"no picture")
    if not first_run:
        with pytest.warns(UserWarning, match=r"g0\.png"):
            cached(frozen(), colours, tmp_path)
    with pytest.warns(UserWarning, match=r"g0\.png"):
        trainer = cached(frozen(), colours, tmp_path, num_workers=workers)
    row = trainer.history.epochs[-1]
    assert (row["images"], row["skipped"], row["val"]["images"]) == (5, 1, 5)


@pytest.mark.parametrize("harm", ["cut", "no index", "half an index", "longer"])
def test_a_cache_that_is_not_whole_is_made_anew(
    colours: CaptionData, tmp_path: Path, harm: str
) -> None:
    good = cached(frozen(), colours, tmp_path)
    [tokens], [index] = tmp_path.glob("*.fp16"), tmp_path.glob("*.json")
    if harm == "no index":
        index.unlink()
    elif harm == "half an index":
        index.write_bytes(index.read_bytes()[:-9])
    else:
        content = tokens.read_bytes()
        tokens.write_bytes(content[:-2] if harm == "cut" else content + b"\0\0")
    again = frozen()
    assert losses(cached(again, colours, tmp_path)) == losses(good)
    assert again.encoder.seen == 6
    assert {path.suffix for path in tmp_path.iterdir()} == {".fp16", ".json", ""}  # "": pictures/


def test_a_cache_directory_that_cannot_be_written_is_a_clear_error(
    colours: CaptionData, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(ConfigError, match=r"Cannot write.*file/cache"):
        cached(frozen(), colours, tmp_path / "file" / "cache")


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_tokens_that_do_not_fit_in_float16_are_refused_by_name(
    tmp_path: Path, value: float
) -> None:
    encoder = tiny.Patches(trainable=False)
    torch.nn.init.constant_(encoder.conv.bias, value)
    source = loader(Noise(1))
    with pytest.raises(ConfigError, match=r"of 0, 1 are NaN or larger than 65504"):
        cache_trunks([Wanted(encoder, "key")], source, tmp_path, "fp32")
    assert list(tmp_path.iterdir()) == []


def test_the_last_batch_may_be_short(tmp_path: Path) -> None:
    source = loader(Noise(1), batch_size=3)
    encoder = tiny.Patches(trainable=False)
    [store] = cache_trunks([Wanted(encoder, "key")], source, tmp_path, "fp32")
    for batch in source.epoch(0):
        tokens = encoder.trunk(batch.images)
        for image_id, expected in zip(batch.image_ids, tokens, strict=True):
            assert_close(store[image_id].float(), expected, rtol=1e-3, atol=1e-3)
    assert len(store) == 4


def test_a_store_goes_to_a_worker_as_a_name_not_as_its_content(tmp_path: Path) -> None:
    source = loader(Noise(1, images=80), batch_size=40)
    [store] = cache_trunks([Wanted(tiny.Patches(trainable=False), "key")], source, tmp_path, "fp32")
    sent = pickle.dumps(store)
    assert len(sent) < store.tokens.nbytes
    assert torch.equal(pickle.loads(sent)["7"], store["7"])
    small = FeatureCache(np.ones((1, 2, 3), np.float16), ["a"])
    assert torch.equal(pickle.loads(pickle.dumps(small))["a"], torch.ones(2, 3).half())


def test_views_are_encoded_once_each_and_never_again(colours: CaptionData, tmp_path: Path) -> None:
    first = frozen()
    fit(first, colours, tmp_path, cache_features=True, cache_views=3)
    assert first.encoder.seen == 3 * 6  # validation shows view 0, which is there already
    again = frozen()
    fit(again, colours, tmp_path, cache_features=True, cache_views=2)
    assert again.encoder.seen == 0


def test_the_tokens_of_an_epoch_are_those_of_the_view_it_shows(tmp_path: Path) -> None:
    student = frozen()
    trainer = Trainer(
        student, **OPTIONS, cache_features=True, cache_views=3, flip=True, cache_dir=str(tmp_path)
    )
    trainer.fit(Noise(1))
    trunk = student.encoder.fingerprint()
    loader = trainer.train_source
    loader.collator.with_images = True
    shown: dict[str, set[bytes]] = {}
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            with torch.no_grad():
                expected = student.encoder.trunk(batch.images)
            assert_close(batch.cached[trunk].float(), expected, rtol=2e-3, atol=2e-3)
            for image, pixels in zip(batch.image_ids, batch.images, strict=True):
                shown.setdefault(image, set()).add(pixels.numpy().tobytes())
    assert all(len(views) >= 2 for views in shown.values())  # two small crops may be one


@pytest.mark.parametrize(
    "options", [{"cache_features": False}, {"cache_features": True, "cache_images": True}]
)
def test_views_that_nothing_caches_are_refused(colours: CaptionData, options: Any) -> None:
    with pytest.raises(ConfigError, match="cache_views=2 are views of cached features"):
        Trainer(frozen(), **OPTIONS, **options, cache_views=2).fit(colours)


def test_caches_in_a_relative_directory_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(frozen(), cache_dir="cache", **tiny.QUIET)
    [entry] = cache_features(trainer, sample().val.subset(3))
    assert (entry.images, entry.done) == (3, 3)
    assert entry.path.parent.resolve() == tmp_path / "cache"
