"""The files of cached features: complete or continued, by any number of processes, never wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import Dataset

from capdistill import feature_files
from capdistill.data.collate import FeatureCache
from capdistill.data.loader import Loader
from capdistill.errors import ConfigError, DataError
from capdistill.feature_cache import Wanted, cache_trunks
from tests.training import tiny_models as tiny

IMAGES, BATCH = 11, 2


class Noise(Dataset[Any]):
    """Images of noise; those whose numbers are given cannot be read."""

    def __init__(self, unreadable: tuple[int, ...] = ()) -> None:
        chance, shape = torch.Generator().manual_seed(3), (IMAGES, 3, 8, 8)
        self.images = torch.randint(256, shape, generator=chance, dtype=torch.uint8)
        self.unreadable = unreadable

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if index in self.unreadable:
            raise OSError("a broken disk")
        return self.images[index], "a red dog"


class Encoder(tiny.Patches):
    """Calls a function before it encodes a batch, with the number of images seen before."""

    def __init__(self, before: Any = None, **options: Any) -> None:
        torch.manual_seed(1)
        super().__init__(trainable=False, **options)
        self.before = before

    def trunk(self, images: Tensor) -> Tensor:
        if self.before is not None:
            self.before(self.seen)
        return super().trunk(images)


def cache(folder: Path, encoder: Encoder | None = None, **options: Any) -> FeatureCache:
    data = options.pop("data", Noise())
    source = Loader(data, tiny.TOKENIZER, image_size=tiny.SIDE, batch_size=BATCH)
    wanted = Wanted(encoder or Encoder(), "key")
    return cache_trunks([wanted], source, folder, "fp32", **options)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_is_decoded_once_for_all_views_and_encoders(tmp_path: Path, workers: int) -> None:
    class Counted(Noise):
        reads = 0

        def __getitem__(self, index: int) -> tuple[Tensor, str]:
            Counted.reads += 1
            return super().__getitem__(index)

    def source(view: int = 0, workers: int = 0) -> Loader:
        how: dict[str, Any] = {"image_size": tiny.SIDE, "batch_size": BATCH, "flip": True}
        how |= {"captions_per_image": 1, "view": view, "num_workers": workers}
        return Loader(Counted(unreadable=(3, 8, 9)), tiny.TOKENIZER, **how)

    encoders = [Encoder(), Encoder(width=4)]
    wanted = [Wanted(encoder, f"key {v}", v) for v in range(3) for encoder in encoders]
    together = cache_trunks(wanted, source(workers=workers), tmp_path / "together", "fp32")
    assert Counted.reads == (0 if workers else IMAGES)
    for each, cache in zip(wanted, together, strict=True):
        loaded = list(source(each.view).epoch(0))
        assert sum(batch.num_images for batch in loaded) == len(cache) == IMAGES - 3
        for batch in loaded:
            with torch.no_grad():
                values = each.encoder.to_cache(batch.images).half()
            for image_id, value in zip(batch.image_ids, values, strict=True):
                assert torch.equal(cache[image_id], value)
    # A view that is missing is added without encoding the others.
    before = np.array(together[2].tokens)
    for path in (tmp_path / "together").glob(f"{Path(together[2].tokens.filename).stem}.*"):  # type: ignore[attr-defined]
        path.unlink()
    seen = [encoder.seen for encoder in encoders]
    again = cache_trunks(wanted, source(), tmp_path / "together", "fp32")
    assert np.array_equal(again[2].tokens, before)
    assert [e.seen - s for e, s in zip(encoders, seen, strict=True)] == [IMAGES - 3, 0]


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.flags: list[bool] = barrier.__dict__.setdefault("flags", [])

    def wait(self) -> None:
        self.barrier.wait(timeout=20)

    def any(self, flag: bool) -> bool:
        self.flags.append(flag)
        self.wait()
        return any(self.flags)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(images: int) -> Any:
    def before(seen: int) -> None:
        if seen >= images:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


@pytest.mark.parametrize("unreadable", [(), (1, 4, 5)])
@pytest.mark.parametrize("killed_at", [0, 2, 6])
def test_a_killed_caching_continues_and_its_files_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, unreadable: tuple[int, ...]
) -> None:
    monkeypatch.setattr(feature_files, "SECONDS", 0.0)
    options: dict[str, Any] = {"data": Noise(unreadable)}
    whole = cache(tmp_path / "whole", **options)
    part = tmp_path / "part"
    process = multiprocessing.get_context("fork").Process(
        target=cache, args=(part, Encoder(kill_at(killed_at))), kwargs=options
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not any(name.endswith(".done") for name in contents(tmp_path / "whole"))
    encoder = Encoder()
    again = cache(part, encoder, **options)
    assert contents(part) == contents(tmp_path / "whole")
    assert again.rows == whole.rows
    # What was marked is not encoded again; the device is one batch ahead of the disk.
    assert encoder.seen <= IMAGES - len(unreadable) - max(killed_at - 2 * BATCH, 0)
    complete = Encoder()
    cache(part, complete, **options)
    assert complete.seen == 0


def test_ctrl_c_keeps_all_that_was_written(tmp_path: Path) -> None:
    def stop(seen: int) -> None:
        if seen == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, Encoder(stop))
    encoder = Encoder()
    cache(tmp_path, encoder)
    assert encoder.seen == IMAGES - 6  # the fourth batch was encoded, but not written yet


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_work_and_the_files_are_those_of_one(tmp_path: Path, ranks: int) -> None:
    cache(tmp_path / "one")
    barrier = threading.Barrier(ranks)
    encoders, caches = [Encoder() for _ in range(ranks)], {}

    def work(rank: int) -> None:
        together = Threads(rank, ranks, barrier)
        caches[rank] = cache(tmp_path / "many", encoders[rank], ranks=together)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sum(encoder.seen for encoder in encoders) == IMAGES
    assert all(len(caches[rank]) == IMAGES for rank in range(ranks))


def test_a_rank_encodes_what_others_left_on_disks_of_their_own(
    tmp_path: Path,
) -> None:
    cache(tmp_path / "one")
    cache(tmp_path / "own", ranks=Threads(1, 2, threading.Barrier(1)))
    assert contents(tmp_path / "own") == contents(tmp_path / "one")


def test_a_rank_whose_disk_has_the_cache_waits_for_one_whose_disk_has_not(tmp_path: Path) -> None:
    cache(tmp_path / "0")
    barrier = threading.Barrier(2)
    encoders = [Encoder(), Encoder()]  # not in the threads, which share the random state

    def work(rank: int) -> None:
        cache(tmp_path / str(rank), encoders[rank], ranks=Threads(rank, 2, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not barrier.broken
    assert contents(tmp_path / "1") == contents(tmp_path / "0")


def test_bfloat16_keeps_what_float16_cannot(tmp_path: Path) -> None:
    encoder = Encoder()
    torch.nn.init.constant_(encoder.conv.bias, 1e5)
    with pytest.raises(ConfigError, match=r"larger than 65504. Set cache_dtype='bf16'"):
        cache(tmp_path, encoder)
    assert list(tmp_path.iterdir()) == []
    store = cache(tmp_path, encoder, dtype="bf16")
    assert store["3"].dtype == torch.bfloat16
    expected = encoder.trunk(Noise().images[3:4])[0].to(torch.bfloat16)
    assert_close(store["3"], expected, rtol=0, atol=0)
    torch.nn.init.constant_(encoder.conv.bias, float("inf"))
    with pytest.raises(ConfigError, match=r"bf16.*are NaN. Set cache_features=False"):
        cache(tmp_path, encoder, dtype="bf16")


@pytest.mark.parametrize("value", [65504.0, -65504.0, 6e-8, 0.0])
def test_the_extremes_of_float16_are_kept(tmp_path: Path, value: float) -> None:
    class Constant(Encoder):
        def trunk(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 4, 5), value)

    assert torch.equal(cache(tmp_path, Constant())["0"], torch.full((4, 5), value).half())


def test_images_that_cannot_be_read_are_no_rows(tmp_path: Path) -> None:
    store = cache(tmp_path, data=Noise((0, 1, 7)))
    assert sorted(store.rows.values()) == [2, 3, 4, 5, 6, 8, 9, 10]
    with pytest.raises(DataError, match="None of the 11 images can be used"):
        cache(tmp_path / "none", data=Noise(tuple(range(IMAGES))))
    assert not (tmp_path / "none").exists()


def test_a_disk_that_is_too_small_is_reported_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"need 0\.0 MB.*Set cache_dir="):
        cache(tmp_path)


def test_a_process_that_comes_while_another_begins_sees_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[feature_files.CacheFiles] = []

    def begin(*_: Any) -> None:  # between the other's look at the disk and its first write
        monkeypatch.setattr(feature_files, "_require_space", lambda *_: None)
        first.append(feature_files.CacheFiles(tmp_path / "a.fp16", 3, (2,)))
        first[0].write(1, np.ones(2, np.int16), np.array([feature_files.DONE], np.uint8))
        first[0].flush()

    monkeypatch.setattr(feature_files, "_require_space", begin)
    second = feature_files.CacheFiles(tmp_path / "a.fp16", 3, (2,))
    assert second.marks().tolist() == first[0].marks().tolist() == [0, feature_files.DONE, 0]
    for each in (*first, second):
        each.close()


def test_a_full_disk_is_a_clear_error_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "SECONDS", 0.0)
    write, calls = feature_files.CacheFiles.write, []

    def full(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(feature_files.CacheFiles, "write", full)
        with pytest.raises(ConfigError, match=r"No space left.*cache_dir=.*next run continues"):
            cache(tmp_path)
    encoder = Encoder()
    assert np.isfinite(cache(tmp_path, encoder).tokens).all()
    assert encoder.seen == IMAGES - 2 * BATCH


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [4, 6]},
        {"shape": [4.0, 5.0]},
        {"shape": [-4, -5]},
        {"shape": "x"},
        {"image_ids": ["0"]},
        {"image_ids": [str(number + 1) for number in range(IMAGES)]},
        {"checksums": [1.5] * IMAGES},
        {"checksums": []},
        {"unreadable": [99]},
        {"unreadable": 5},
        {"complete": []},
        {"format": 1},
    ],
)
def test_a_damaged_index_is_written_anew(tmp_path: Path, damage: dict[str, Any]) -> None:
    cache(tmp_path)
    good = contents(tmp_path)
    [index] = tmp_path.glob("*.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), **damage}))
    encoder = Encoder()
    cache(tmp_path, encoder)
    assert contents(tmp_path) == good
    assert encoder.seen in (IMAGES, IMAGES + BATCH)  # a first batch tells the shape


def test_damaged_values_are_no_features_of_their_image(tmp_path: Path) -> None:
    cache(tmp_path)
    [values] = tmp_path.glob("*.fp16")
    damaged = bytearray(values.read_bytes())
    damaged[3] ^= 1  # of image 0; that of image 10 is lost as a whole
    damaged[-40:] = bytes(40)
    values.write_bytes(damaged)
    found = cache(tmp_path)
    assert found["5"].isfinite().all()
    for image in ("0", "10"):
        with pytest.raises(DataError, match=rf"{values.name} are damaged. Remove that file"):
            found[image]
    values.unlink()
    assert cache(tmp_path)["10"].any()


def test_a_cache_of_an_older_version_has_no_checksums(tmp_path: Path) -> None:
    cache(tmp_path)
    [index] = tmp_path.glob("*.json")
    content = json.loads(index.read_text())
    del content["checksums"]
    index.write_text(json.dumps(content))
    encoder = Encoder()
    assert cache(tmp_path, encoder)["5"].any()
    assert encoder.seen == 0


def test_a_complete_cache_is_read_from_a_directory_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    encoder = Encoder()
    assert cache(tmp_path, encoder)["5"].any()
    assert encoder.seen == 0
    with pytest.raises(ConfigError, match=r"Cannot remove .*Read-only.*cache_dir="):
        feature_files.clear_caches(tmp_path)


@pytest.mark.parametrize("root", ["", "relative", "./here"])
def test_only_an_absolute_cache_directory_of_the_environment_counts(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    assert feature_files.default_cache_dir() == tmp_path / ".cache" / "capdistill" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert feature_files.default_cache_dir() == tmp_path / "x" / "capdistill" / "features"


def test_a_directory_that_does_not_exist_has_no_caches_to_list_or_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # that of the user may be absent
    assert feature_files.list_caches() == []
    assert feature_files.clear_caches() == 0
    (tmp_path / "file").write_text("")
    for name in ("typo", "file"):
        for work in (feature_files.list_caches, feature_files.clear_caches):
            with pytest.raises(ConfigError, match=f"{name}: there is no such directory"):
                work(tmp_path / name)


def test_caches_are_listed_and_cleared_and_other_files_stay(tmp_path: Path) -> None:
    def stop(seen: int) -> None:
        if seen == 4:
            raise KeyboardInterrupt

    (tmp_path / "notes.json").write_text("mine")
    cache(tmp_path, dtype="bf16")
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, Encoder(stop))
    listed = {entry.path.suffix: entry for entry in feature_files.list_caches(tmp_path)}
    assert (listed[".bf16"].images, listed[".bf16"].done) == (IMAGES, IMAGES)
    assert (listed[".fp16"].images, listed[".fp16"].done) == (IMAGES, 2)
    assert (listed[".fp16"].encoder, listed[".fp16"].data) == ("Encoder", "Noise")
    assert feature_files.clear_caches(tmp_path) == sum(each.bytes for each in listed.values())
    assert list(contents(tmp_path)) == ["notes.json"]
