"""WebDataset shards: written from any data set, read in any order, exact counts, clear errors."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import capdistill as cd
from capdistill.data import Shards, shard_splits, shards, write_shards
from capdistill.data.dataset import CaptionData, Example
from capdistill.data.loader import Loader
from capdistill.data.shards import find_shards
from capdistill.errors import CapdistillError, ConfigError, DataError
from tests.training import tiny_models as tiny

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> CaptionData:
    """Seven small photos in several formats, one with references and weights of its own."""
    folder, examples = tmp_path_factory.mktemp("photos"), []
    for number, suffix in enumerate(("jpg", "png", "bmp", "jpg", "webp", "jpg", "jpg")):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 10, 3), np.uint8)
        path = folder / f"a.b {number}.{suffix}"
        Image.fromarray(pixels).save(path)
        own: dict[str, Any] = {} if number else {"references": ["other"], "weights": [1.5, 0.5]}
        examples.append(Example(path.name, path, [f"dög {number}", "a cat"], **own))
    return CaptionData(examples, name="photos")


def write(photos: Any, folder: Path, **options: Any) -> list[Path]:
    return write_shards(photos, folder, **{"images_per_shard": 3, "name": "x", **QUIET, **options})


def test_everything_comes_back_and_images_are_unchanged(photos: Any, tmp_path: Path) -> None:
    files = write(photos, tmp_path)
    assert [file.name for file in files] == [f"x-00000{n}.tar" for n in range(3)]
    data = Shards(tmp_path)
    assert data.image_ids == photos.image_ids
    assert data.references == photos.references
    for ours, theirs in zip(data.examples, photos.examples, strict=True):
        assert (ours.captions, ours.weights) == (theirs.captions, theirs.weights)
        assert ours.path.load() == theirs.path.read_bytes()
    assert torch.equal(data[3][0], photos[3][0])
    assert not data.report.problems


def samples(files: list[Path]) -> Iterator[dict[str, Any]]:
    """As the package webdataset reads: in order, members of equal key are neighbours."""
    for file in files:
        with tarfile.open(file, "r|") as tar:
            current: dict[str, Any] = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                if current and current["__key__"] != key:
                    yield current
                    current = {}
                current["__key__"] = key
                assert kind not in current
                stream = tar.extractfile(member)
                assert stream is not None
                current[kind] = stream.read()
            yield current


def test_shards_follow_the_rules_of_webdataset(photos: Any, tmp_path: Path) -> None:
    found = list(samples(write(photos, tmp_path)))
    assert len({sample["__key__"] for sample in found}) == len(found) == 7
    assert [json.loads(sample["json"])["image_id"] for sample in found] == list(photos.image_ids)
    assert found[4]["webp"] == photos.examples[4].path.read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_package_webdataset_reads_them(photos: Any, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    files = [str(file) for file in write(photos, tmp_path)]
    read = webdataset.WebDataset(files, shardshuffle=False).decode()
    assert [sample["json"]["image_id"] for sample in read] == list(photos.image_ids)
    del read
    gc.collect()  # it leaves its files open


def test_the_same_data_give_the_same_bytes_and_nothing_is_written_twice(
    photos: Any, tmp_path: Path
) -> None:
    first, again = write(photos, tmp_path / "a"), write(photos, tmp_path / "b")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    times = [file.stat().st_mtime_ns for file in first]
    first[1].unlink()  # as of a process killed before it
    (first[2]).write_bytes(first[2].read_bytes()[:1000])
    write(photos, tmp_path / "a")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert first[0].stat().st_mtime_ns == times[0]


@pytest.mark.parametrize("data", [None, 3, "photos", iter([])])
def test_what_is_no_data_is_not_written(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was given as data"):
        write_shards(data, tmp_path)


def test_other_data_under_the_same_names_are_refused(photos: Any, tmp_path: Path) -> None:
    files = write(photos, tmp_path)
    with pytest.raises(ConfigError, match=r"x-000002.tar.*overwrite=True"):
        write(photos.subset(6), tmp_path)
    with pytest.raises(ConfigError, match=r"holds other data.*overwrite=True"):
        write(photos.subset([1, 0, 2, 3, 4, 5, 6]), tmp_path)
    assert len(write(photos.subset(2), tmp_path, overwrite=True)) == 1
    assert not files[1].exists()
    assert Shards(tmp_path).image_ids == photos.image_ids[:2]


def test_another_photo_of_the_same_size_is_other_data(tmp_path: Path) -> None:
    path = tmp_path / "photo.bmp"
    data = CaptionData([Example("photo", path, ["a dog"])])
    for shade in (0, 200):
        Image.fromarray(np.full((4, 5, 3), shade, np.uint8)).save(path)
        if shade:
            with pytest.raises(ConfigError, match=r"holds other data.*overwrite=True"):
                write(data, tmp_path / "s")
        write(data, tmp_path / "s", overwrite=True)
        assert Shards(tmp_path / "s")[0][0].unique().tolist() == [shade]


def test_batches_are_those_of_the_files_for_any_worker_and_rank(
    photos: Any, tmp_path: Path
) -> None:
    write(photos, tmp_path)
    options: dict[str, Any] = {"image_size": 8, "batch_size": 2, "train": True}
    expected = list(Loader(photos, tiny.TOKENIZER, **options).epoch(1))
    loader = Loader(Shards(tmp_path), tiny.TOKENIZER, num_workers=1, **options)
    for batch, other in zip(loader.epoch(1), expected, strict=True):
        assert batch.image_ids == other.image_ids
        assert torch.equal(batch.images, other.images)
    assert next(loader.epoch(1, start=2)).image_ids == expected[2].image_ids
    loader.close()
    parts = [loader.for_rank(rank, 2) for rank in range(2)]
    read = [name for part in parts for batch in part.epoch(0) for name in batch.image_ids]
    assert sorted(read) == sorted(photos.image_ids)


def test_a_run_on_shards_is_the_run_on_files_and_shares_its_cache(
    photos: Any, tmp_path: Path
) -> None:
    write(photos, tmp_path / "shards")
    options = {**tiny.QUIET, "epochs": 2, "cache_features": True, "cache_dir": str(tmp_path)}
    losses, seen = [], []
    for data in (photos, Shards(tmp_path / "shards")):
        student = tiny.make_student(trainable=False)
        history = cd.Trainer(student, **options).fit(data, data)
        losses.append([row["train"]["loss"] for row in history.epochs])
        seen.append(student.encoder.seen)
    assert losses[0] == losses[1]
    assert seen == [7, 0]


def test_images_without_captions_and_items_of_memory_are_written(tmp_path: Path) -> None:
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    write([(pixels, "a dog"), (pixels.flip(2), ["a cat", "a pet"])], tmp_path)
    data = Shards(tmp_path)
    assert torch.equal(data[1][0], pixels.flip(2))
    assert data.references == {"0": ("a dog",), "1": ("a cat", "a pet")}
    bare = CaptionData([Example.unlabelled("q", data.examples[0].path)])
    write(bare, tmp_path / "bare")
    assert Shards(tmp_path / "bare").references == {"q": ()}


def test_splits_are_read_by_their_names(photos: Any, tmp_path: Path) -> None:
    splits = photos.split(val=0.3)
    write_shards(splits, tmp_path, **QUIET)
    found = shard_splits(tmp_path)
    assert {name: found.get(name).image_ids for name in found} == {
        name: splits.get(name).image_ids for name in splits
    }


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    long = "deep/" * 30 + "7"  # has a header of its own for its name
    make_tar(
        tmp_path / "00000.tar",
        {
            "._0.jpg": b"macOS",
            "0.jpg": jpeg(0),
            "0.txt": b"one\r\ntwo\n",
            "0.json": b'{"url": "x", "width": 3}',
            "1.json": b'{"caption": "three"}',
            "1.png": jpeg(1),
            "1.seg.png": b"a mask",
            "2.jpg": jpeg(2),
            "3.txt": b"no image",
            "4.jpg": jpeg(4),
            "4.json": b"{broken",
            f"{long}.jpg": jpeg(7),
            f"{long}.txt": b"long",
        },
    )
    make_tar(
        tmp_path / "00001.tar", {"0.jpeg": jpeg(9), "0.json": b'{"sentences": [{"raw": "n"}]}'}
    )
    data = Shards(str(tmp_path / "{00000..00001}.tar"))
    assert data.references == {
        "00000/0": ("one", "two"),
        "00000/1": ("three",),
        f"00000/{long}": ("long",),
        "00001/0": ("n",),
    }
    assert [data.examples[i].path.load() for i in range(4)] == [jpeg(s) for s in (0, 1, 7, 9)]
    reasons = [str(problem) for problem in data.report]
    assert [problem.kind for problem in data.report] == [
        "image without caption",
        "missing image",
        "image without caption",
    ]
    assert "its .json is not JSON" in reasons[2]
    assert len(Shards(tmp_path, captions=False)) == 6


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_with_accents_are_read(tmp_path: Path, form: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, content in {"café.jpg": jpeg(3), "café.txt": b"a cup"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = Shards(tmp_path / "a.tar")
    assert data.references == {"café": ("a cup",)}
    assert data.examples[0].path.load() == jpeg(3)


@pytest.mark.parametrize("cut", [1, 400, 700, 2000, "end", "empty", "text", "gzip"])
def test_a_truncated_or_foreign_file_is_named(tmp_path: Path, cut: Any) -> None:
    file = make_tar(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(4)})
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    changed = {
        "end": whole[:end],  # without its empty blocks
        "empty": b"",
        "text": b"no tar file " * 100,
        "gzip": b"\x1f\x8b" + whole,
    }
    file.write_bytes(changed[cut] if isinstance(cut, str) else whole[: end - cut])
    with pytest.raises(DataError, match=r"a\.tar (is truncated|cannot be read as a tar file)"):
        Shards(file, captions=False)


def test_a_shard_that_is_replaced_is_read_again_and_one_in_use_is_noticed(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"old"})
    before = Shards(file)
    make_tar(file, {"1.txt": b"new" + b" " * 600, "1.jpg": jpeg(2)})
    assert Shards(file).references == {"1": ("new",)}
    with pytest.raises(DataError, match="was changed while it was in use"):
        before[0]


def test_a_shard_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_tar(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"old"})
    scan = shards._scan

    def replaced(path: Path) -> list[Any]:
        found = list(scan(path))
        make_tar(path, {"1.txt": b"new" + b" " * 600, "1.jpg": jpeg(2)})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_scan", replaced)
        Shards(file)
    assert Shards(file).references == {"1": ("new",)}


@pytest.mark.parametrize(
    "sample",
    [
        {},
        {"key": 1, "image": None, "about": None, "lines": None, "kinds": []},
        {"key": "0", "image": ["0.jpg", -5, 3], "about": None, "lines": None, "kinds": []},
        {"key": "0", "image": ["0.jpg"], "about": None, "lines": None, "kinds": []},
        {"key": "0", "image": None, "about": None, "lines": [3], "kinds": []},
    ],
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, sample: Any) -> None:
    file = make_tar(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"text"})
    Shards(file)
    index = tmp_path / "a.tar.index.json"
    made = {"samples": [sample], "checksum": zlib.crc32(json.dumps([sample]).encode())}
    index.write_text(json.dumps({**json.loads(index.read_text()), **made}))
    assert Shards(file).references == {"0": ("text",)}


def test_an_index_with_another_text_is_made_anew(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"a dog"})
    Shards(file)
    index = tmp_path / "a.tar.index.json"
    index.write_text(index.read_text().replace("a dog", "a fog"))
    assert Shards(file).references == {"0": ("a dog",)}
    assert "a dog" in index.read_text()


def test_names_that_lead_nowhere_are_reported(tmp_path: Path) -> None:
    for source, reason in {
        str(tmp_path): "holds no file",
        str(tmp_path / "x-{0..99999999}.tar"): "x-0.tar does not exist",
        "https://example.com/a.tar": "copy or mount",
        "pipe:cat a.tar": "copy or mount",
    }.items():
        with pytest.raises(DataError, match=reason):
            find_shards(source)
    for use in (find_shards, shard_splits, Shards):
        with pytest.raises(DataError, match=r"s3:/+bucket/shards is not a file.* copy or mount"):
            use(Path("s3://bucket/shards"))
    with pytest.raises(DataError, match="the list is empty"):
        Shards([])
    with pytest.raises(DataError, match="bytes was given"):
        Shards(b"a.tar")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 4 * 1024 - 1), value=st.integers(0, 255))
def test_a_flipped_byte_is_an_error_of_ours_or_changes_one_sample(
    tmp_path: Path, place: int, value: int
) -> None:
    file = tmp_path / "a.tar"
    make_tar(file, {"0.jpg": jpeg(0), "0.txt": b"zero", "1.jpg": jpeg(1), "1.txt": b"one"})
    content = bytearray(file.read_bytes())
    content[place] = value
    file.write_bytes(content)
    file.with_name("a.tar.index.json").unlink(missing_ok=True)
    try:
        data = Shards(file)
    except CapdistillError:
        return
    assert 1 <= len(data) <= 2


def test_unreadable_images_are_left_out_with_a_report(photos: Any, tmp_path: Path) -> None:
    lost = Example("lost", tmp_path / "lost.jpg", ["gone"])
    data = CaptionData([photos.examples[0], lost, photos.examples[1]])
    for _ in range(2):  # the second time the shard is there
        with pytest.warns(UserWarning, match=r"1 corrupt image.*\n.*lost"):
            write(data, tmp_path / "s")
    assert Shards(tmp_path / "s").image_ids == (photos.image_ids[0], photos.image_ids[1])
    with pytest.raises(DataError, match="lost"):
        write(data, tmp_path / "t", errors="raise")
    with pytest.raises(DataError, match=r"none of the 1 images can be read.*\n.*\n.*lost"):
        write(CaptionData([lost]), tmp_path / "u")
    assert not list((tmp_path / "u").iterdir())
