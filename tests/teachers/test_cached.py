"""Cached targets: equal to those of the live teacher, in its place, whatever the batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import capdistill as cd
from capdistill.data import CaptionData, Example, Loader
from capdistill.data.image_names import StoredImage
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.losses.divergence import kl_divergence
from capdistill.outputs import Batch, part
from capdistill.saving import TARGETS
from capdistill.teachers import CachedTeacher, Ensemble, cache
from capdistill.teachers.cached_store import INDEX
from tests.training import tiny_models as tiny

QUIET = tiny.QUIET
HALF = 2.0**-11  # relative error of float16
TEXTS = ("a red dog", "one lime cat a", "blue", "a cat", "a lime dog a cat")


def pictures(folder: Path, count: int, first: int = 0) -> CaptionData:
    """Pictures with one to four captions, larger than the models' images."""
    folder.mkdir(exist_ok=True)
    examples = []
    chance = torch.Generator().manual_seed(first)
    for n in range(first, first + count):
        path = folder / f"{n}.png"
        pixels = torch.randint(256, (14, 11, 3), generator=chance, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        examples.append(Example(f"id{n}", path, [TEXTS[(n + c) % 5] for c in range(1 + n % 4)]))
    return CaptionData(examples, name="pictures")


@pytest.fixture
def data(tmp_path: Path) -> CaptionData:
    return pictures(tmp_path / "pictures", 6)


def batches(data: CaptionData, epoch: int = 0, **options: Any) -> list[Batch]:
    how: dict[str, Any] = {"image_size": tiny.SIDE, "batch_size": 3, "captions_per_image": 2}
    loader = Loader(data, tiny.TOKENIZER, **{**how, "train": True, "crop": False, **options})
    return list(loader.epoch(epoch))


def write(data: CaptionData, folder: Path, teacher: Any = None, **options: Any) -> Any:
    """The cached teacher, by default a captioner; its files are in `folder`."""
    options = {**QUIET, **options}
    return cache(teacher or tiny.make_teacher(), data, folder / "targets", **options)


def gap(live: Any, cached: Any, batch: Batch, read: Batch | None = None) -> float:
    """The largest difference between the logits of two teachers; the second may read another."""
    with torch.no_grad():
        difference = live(batch).logits - cached(read or batch).logits
    return float(difference[batch.target_mask].abs().max())


def members() -> dict[str, cd.Captioner]:
    return {"one": tiny.make_teacher(), "other": tiny.make_student(3)}


def gradient(student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
    logits = student.clone().requires_grad_()
    kl_divergence(logits, teacher, batch.target_mask, temperature).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["captioner", "ensemble", "confidence"])
def test_divergence_and_gradient_are_those_of_the_live_teacher(
    data: CaptionData, tmp_path: Path, temperature: float, kind: str
) -> None:
    live: Any = tiny.make_teacher()
    if kind != "captioner":
        live = Ensemble(members(), [2, 1], "confidence" if kind == "confidence" else "fixed")
    cached = write(data, tmp_path, live.eval())
    student = tiny.make_student().eval()
    for batch in batches(data):
        with torch.no_grad():
            expected, found = live(batch).logits, cached(batch).logits
            ours = student(batch).logits
        mask = batch.target_mask
        assert (found - expected)[mask].abs().max() < 8 * HALF * expected[mask].abs().max()
        values = [kl_divergence(ours, theirs, mask, temperature) for theirs in (expected, found)]
        assert values[1] == pytest.approx(values[0].item(), rel=4 * HALF, abs=1e-6)
        one, other = (gradient(ours, theirs, batch, temperature) for theirs in (expected, found))
        assert (one - other).abs().max() < 4 * HALF * one.abs().max()


@pytest.mark.parametrize("epoch", range(3))
def test_each_view_has_its_own_targets(data: CaptionData, tmp_path: Path, epoch: int) -> None:
    live = tiny.make_teacher().eval()
    cached = write(data, tmp_path, live, cache_views=3, flip=True)
    for batch in batches(data, epoch, views=3, flip=True):
        centre = replace(batch, views=(0,) * batch.num_images)
        assert gap(live, cached, batch) < 5e-3
        assert batch.views == centre.views or gap(live, cached, batch, centre) > 5e-2


def test_draw_features_hidden_and_named_members_are_those_of_the_live_ensemble(
    data: CaptionData, tmp_path: Path
) -> None:
    live = Ensemble(members(), [2, 1], "draw").eval()
    keep = ["features", "attention"]
    cached = write(data, tmp_path, live, keep=keep)
    assert isinstance(cached, Ensemble)
    needs = {"other": frozenset({"features", "hidden", "attention"})}
    for batch in batches(data):
        with torch.no_grad():
            expected, found = (each.outputs(batch, needs, draw=(5, 1)) for each in (live, cached))
        mask = batch.target_mask
        torch.testing.assert_close(found.logits[mask], expected.logits[mask], rtol=0, atol=5e-3)
        mine, theirs = found.of("other"), expected.of("other")
        torch.testing.assert_close(mine.features, theirs.features, rtol=2 * HALF, atol=1e-4)
        for name in ("attention", "hidden"):
            one, other = getattr(mine, name), getattr(theirs, name)
            one, other = (e[-1] if isinstance(e, tuple) else e for e in (one, other))
            torch.testing.assert_close(one[mask], other[mask], rtol=2 * HALF, atol=1e-4)


def test_padding_and_splitting_a_batch_change_nothing(data: CaptionData, tmp_path: Path) -> None:
    cached = write(data, tmp_path, keep=["features"])
    need = frozenset({"logits", "hidden", "features"})
    (batch,) = batches(data, batch_size=6)
    whole, padded = cached(batch, need), cached(tiny.pad(batch, 4), need)
    length = batch.targets.shape[1]
    assert torch.equal(
        padded.logits[:, :length][batch.target_mask], whole.logits[batch.target_mask]
    )
    for image in range(batch.num_images):
        alone, rows = cached(part(batch, image, image + 1), need), slice(2 * image, 2 * image + 2)
        assert torch.equal(alone.hidden[-1], whole.hidden[-1][rows])
        torch.testing.assert_close(alone.logits, whole.logits[rows])
        assert torch.equal(alone.features[0], whole.features[image])


def test_a_caption_that_is_cut_has_the_targets_of_its_beginning(
    data: CaptionData, tmp_path: Path
) -> None:
    live = tiny.make_teacher().eval()
    cached = write(data, tmp_path, live)
    for batch in batches(data, max_length=3):
        assert gap(live, cached, batch) < 5e-3


def test_a_tokenizer_that_cuts_later_is_refused_before_the_first_step(
    data: CaptionData, tmp_path: Path
) -> None:
    path, texts = data.examples[0].path, [["blue"] * 100, ["a red dog a lime cat a blue dog"]]
    some = CaptionData(Example(str(n), path, each) for n, each in enumerate(texts))
    teacher = tiny.make_teacher()
    teacher.tokenizer = cd.WordTokenizer(tiny.TOKENIZER.vocabulary[4:], max_length=5)
    cached = write(some, tmp_path, teacher)
    loader = Loader(some, tiny.TOKENIZER, image_size=tiny.SIDE, train=True, crop=False)
    with pytest.raises(DataError, match=r"its tokenizer splits 'a red dog a lime"):
        cached.require(loader)


def test_ids_that_the_teacher_did_not_read_are_refused(data: CaptionData, tmp_path: Path) -> None:
    one = CaptionData([replace(data.examples[2], captions=("blue",))])
    cached = cache(tiny.make_teacher(), one, tmp_path / "targets", **QUIET)
    (batch,) = batches(one, captions_per_image=1)
    padded = tiny.pad(batch, 2)
    with pytest.raises(DataError, match=r"2 cached targets of 'blue', but .* has 4"):
        cached(replace(padded, mask=torch.ones_like(padded.mask)))


def test_a_run_from_cached_targets_follows_the_live_one(data: CaptionData, tmp_path: Path) -> None:
    val = pictures(tmp_path / "pictures", 3, first=20)
    teacher = tiny.make_teacher(trainable=False)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 2, "cache_features": True}
    options |= {"cache_views": 2, "flip": True, "cache_dir": tmp_path / "maps", "patience": None}
    options |= {"word_dropout": 0.2, "monitor": "loss", "metrics": ("bleu",), **QUIET}
    targets = {"cache_views": 2, "flip": True, "val": val, **QUIET}
    targets |= {"cache_features": True, "cache_dir": tmp_path / "maps"}
    cached = cache(teacher, data, tmp_path / "targets", **targets)
    losses = {"token": {"name": "token", "temperature": 2.0}, "hidden": "hidden"}
    rows = []
    for each in (teacher, cached):
        student = tiny.make_student(trainable=False)
        distiller = cd.Distiller(each, student, losses=losses, **options)
        rows.append(distiller.fit(data, val).epochs)
    for live, other in zip(*rows, strict=True):
        for role in ("train", "val"):
            found, expected = other[role]["terms"], live[role]["terms"]
            for term in ("token", "hidden", "ce"):
                assert found[term]["raw"] == pytest.approx(expected[term]["raw"], rel=5e-3), term


def test_losses_that_need_more_are_refused_with_the_fix(data: CaptionData, tmp_path: Path) -> None:
    cached = write(data, tmp_path)
    student = tiny.make_student()
    feature = {"feature": {"name": "feature", "match": "pooled"}}
    with pytest.raises(ConfigError, match=r'no cached features.*keep=\["features"\]'):
        cd.Distiller(cached, student, losses=feature, **QUIET)
    uniform = {"hidden": {"name": "hidden", "layers": "uniform"}}
    with pytest.raises(ConfigError, match=r'keeps the last hidden vector alone.*layers="last"'):
        cd.Distiller({"a": cached}, student, losses=uniform, **QUIET)
    with pytest.raises(ConfigError, match=r"cannot caption images"):
        cached.generate(batches(data)[0])
    with pytest.raises(ConfigError, match=r"keep='feature' is unknown.*features"):
        write(data, tmp_path, keep="feature")


def test_sampled_captions_are_refused_at_construction(data: CaptionData, tmp_path: Path) -> None:
    cached = write(data, tmp_path, Ensemble(members()))
    token = {"token": "token"}
    with pytest.raises(ConfigError, match=r"on_policy=0.5.*new in every step"):
        cd.Distiller(cached, tiny.make_student(), losses=token, on_policy=0.5, **QUIET)
    with pytest.raises(ConfigError, match=r"SelfCritical.*Give the teacher itself"):
        cd.SelfCritical(tiny.make_student(), teacher=cached, **QUIET)


def test_other_images_captions_and_views_are_refused_before_the_first_step(
    data: CaptionData, tmp_path: Path
) -> None:
    cached = write(data, tmp_path)
    make: Any = lambda: cd.Distiller(  # noqa: E731
        cached, tiny.make_student(trainable=False), losses={"token": "token"}, **QUIET
    )
    with pytest.raises(ConfigError, match=r"at random.*augment=False"):
        make().fit(data, epochs=1, cache_features=False, augment=True)
    with pytest.raises(ConfigError, match=r"mirrored: False.*flip="):
        make().fit(data, epochs=1, cache_views=2, flip=True, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"lacks cached targets of 6 of 6 .*\(2 views\)"):
        make().fit(data, epochs=1, cache_views=2, cache_dir=tmp_path)
    more = pictures(tmp_path / "pictures", 1, first=9)
    with pytest.raises(DataError, match=r"of 1 of 1 images.*val=data.val"):
        make().fit(data, more, epochs=1, augment=False)
    other = replace(batches(data)[0], captions=("a new one",) * 6)
    with pytest.raises(DataError, match=r"no cached targets of image.*'a new one'"):
        cached(other)
    assert make().check(data).ok


def test_a_directory_of_other_targets_is_refused_with_what_differs(
    data: CaptionData, tmp_path: Path
) -> None:
    place = tmp_path / "targets"
    teacher = tiny.make_teacher()
    cache(teacher, data, place, **QUIET)
    with pytest.raises(ConfigError, match=r"other weights of the teacher.*overwrite=True"):
        cache(tiny.make_teacher(5), data, place, **QUIET)
    with pytest.raises(ConfigError, match=r"flip was False and is True"):
        cache(teacher, data, place, flip=True, **QUIET)
    found = cache(tiny.make_teacher(5), data, place, overwrite=True, **QUIET)
    assert gap(tiny.make_teacher(5).eval(), found, batches(data)[0]) < 5e-3


def test_a_changed_photo_of_the_same_size_and_time_is_refused(
    data: CaptionData, tmp_path: Path
) -> None:
    path = data.examples[2].path.with_suffix(".bmp")
    Image.new("RGB", (14, 11), "red").save(path)
    data = CaptionData([*data.examples[:2], Example("photo", path, ["a red dog"])], name="some")
    cached, before = write(data, tmp_path), path.stat()
    distiller = cd.Distiller(cached, tiny.make_student(), losses={"token": "token"}, **QUIET)
    distiller.fit(data, epochs=1, augment=False, batch_size=3)
    Image.new("RGB", (14, 11), "lime").save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    for again in (
        lambda: write(data, tmp_path),
        lambda: distiller.fit(data, epochs=1, augment=False, batch_size=3),
    ):
        with pytest.raises(DataError, match=r"1 of 3 images of some, such as 'photo'.*differs"):
            again()
    shutil.move(data.examples[0].path, tmp_path / "elsewhere.png")  # a copy is the same photo
    moved = CaptionData([replace(data.examples[0], path=tmp_path / "elsewhere.png")])
    write(moved, tmp_path)


def test_targets_of_an_earlier_version_which_knew_sizes_are_read(
    data: CaptionData, tmp_path: Path
) -> None:
    cached = write(data, tmp_path)
    index = tmp_path / "targets" / INDEX
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:
        del line["content"], line["checksum"], line["checks"]
        line["size"] = 99
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = batches(data)[0]
    assert torch.equal(write(data, tmp_path)(batch).logits, cached(batch).logits)


class Flaky(StoredImage):
    """An image that can be read a number of times."""

    def __init__(self, path: Path, times: int) -> None:
        self.path, self.times = path, times

    def load(self) -> bytes:
        self.times -= 1
        if self.times < 0:
            raise OSError("the network is down")
        return self.path.read_bytes()

    def digest(self) -> str:
        return "flaky"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_image_that_can_be_read_in_one_view_alone_is_left_out(
    data: CaptionData, tmp_path: Path, batch_size: int
) -> None:
    examples = [replace(e, captions=("a red dog", "a lime cat")) for e in data.examples[:3]]
    flaky = Example("id1", Flaky(examples[1].path, 1), examples[1].captions)
    some = CaptionData([examples[0], flaky, examples[2]])
    live = tiny.make_teacher().eval()
    cached = write(some, tmp_path, live, cache_views=2, batch_size=batch_size)
    assert cached.store.index.errors.keys() == {"id1"}
    for epoch in range(2):
        for batch in batches(CaptionData([examples[0], examples[2]]), epoch, views=2):
            assert gap(live, cached, batch) < 5e-3


def test_what_is_missing_is_added_and_nothing_is_done_twice(
    data: CaptionData, tmp_path: Path
) -> None:
    place, teacher = tmp_path / "targets", tiny.make_teacher()
    seen: Any = teacher.encoder
    cache(teacher, data.subset(2), place, **QUIET)
    before = seen.seen
    cache(teacher, data.subset(3), place, **QUIET)
    assert seen.seen == before + 1
    others = CaptionData(Example(e.image_id, e.path, ["a red cat"]) for e in data.examples)
    cached = cache(teacher, others, place, **QUIET)
    before = seen.seen
    cached = cache(teacher, data.subset(3), place, **QUIET)
    assert seen.seen == before
    whole = cache(teacher, data.subset(3), tmp_path / "again", **QUIET)
    batch = batches(data.subset(3))[0]
    torch.testing.assert_close(cached(batch).logits, whole(batch).logits)
    cached = cache(teacher, data.subset(3), place, cache_views=2, **QUIET)
    assert seen.seen == before + 3 + 6
    cached(replace(batch, views=(1, 0, 1)))


def test_unreadable_images_are_left_out_as_in_training(data: CaptionData, tmp_path: Path) -> None:
    data.examples[1].path.write_bytes(b"nothing")
    teacher = tiny.make_teacher()
    cached = write(data, tmp_path, teacher, batch_size=1)
    write(data, tmp_path, teacher)
    distiller = cd.Distiller(cached, tiny.make_student(), losses={"token": "token"}, **QUIET)
    with pytest.warns(UserWarning, match="1 images could not be used"):
        history = distiller.fit(data, epochs=1, augment=False, batch_size=2)
    assert history.epochs[0]["skipped"] == 1


def test_the_directory_alone_gives_the_teacher(data: CaptionData, tmp_path: Path) -> None:
    live = Ensemble(members(), [2, 1], "confidence")
    cached: Any = write(data, tmp_path, live)
    loaded: Any = cd.teachers.load(tmp_path / "targets")
    batch = batches(data)[0]
    assert torch.equal(cached(batch).logits, loaded(batch).logits)
    assert loaded.weights == cached.weights
    assert isinstance(loaded.members["one"], CachedTeacher)
    with pytest.raises(CheckpointError, match=r"holds no cached targets"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize("left", ["a line that has no end", "rows without a line", "lost rows"])
def test_what_a_killed_writer_left_is_cut_and_completed(
    data: CaptionData, tmp_path: Path, left: str
) -> None:
    teacher = tiny.make_teacher()
    whole = cache(teacher, data, tmp_path / "whole", batch_size=2, **QUIET)
    place = tmp_path / "targets"
    cache(teacher, data.subset(4), place, batch_size=2, **QUIET)
    index, hidden = place / INDEX, place / "hidden.float16"
    if left == "a line that has no end":
        index.write_bytes(index.read_bytes()[:-20])
    elif left == "rows without a line":
        hidden.write_bytes(hidden.read_bytes() + b"12345")
    else:
        os.truncate(hidden, hidden.stat().st_size - 4)
    found = cache(teacher, data, place, batch_size=2, **QUIET)
    for batch in batches(data):
        torch.testing.assert_close(found(batch).logits, whole(batch).logits)


def test_damaged_files_are_named(data: CaptionData, tmp_path: Path) -> None:
    place = tmp_path / "targets"
    cache(tiny.make_teacher(), data, place, **QUIET)
    index = place / INDEX
    index.write_bytes(b'{"image_id": 3}\n' + index.read_bytes())
    with pytest.raises(CheckpointError, match=r"index.jsonl, line 1 is not one"):
        CachedTeacher(place)


@pytest.mark.parametrize("name", ["hidden", "attention", "features"])
def test_a_damaged_array_is_noticed_where_it_is_read(
    data: CaptionData, tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {"keep": ["attention", "features"], "cache_views": 2}
    cached = write(data, tmp_path, **options)
    need = frozenset({"logits", "attention", "features"})
    shown = [batches(data.subset([n]), train=False) for n in range(6)]
    wanted = [cached(batch, need=need) for [batch] in shown]

    path = cached.store.columns[name].file(tmp_path / "targets")
    values = bytearray(path.read_bytes())
    values[0] ^= 1  # the first image, in the first view
    path.write_bytes(values)
    damaged = CachedTeacher(tmp_path / "targets")
    with pytest.raises(DataError, match=rf"{path} is damaged .*'id0', view 0.*targets anew"):
        damaged(shown[0][0], need=need)
    for [batch], expected in zip(shown[1:], wanted[1:], strict=True):
        assert torch.equal(damaged(batch, need=need).logits, expected.logits)


def test_other_rows_and_another_output_matrix_are_noticed(
    data: CaptionData, tmp_path: Path
) -> None:
    place = tmp_path / "targets"
    cache(tiny.make_teacher(), data, place, **QUIET)
    index, output = place / INDEX, place / "output.safetensors"
    whole = index.read_text()
    index.write_text(whole.replace('"tokens": [0]', '"tokens": [1]', 1))
    with pytest.raises(CheckpointError, match=r"line 1 .*checksum is wrong.*targets anew"):
        CachedTeacher(place)
    lines = [json.loads(line) for line in whole.splitlines()]
    older = [
        {key: line[key] for key in line if key not in ("checksum", "checks")} for line in lines
    ]
    index.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert len(CachedTeacher(place).store.index.entries) == 6

    values = bytearray(output.read_bytes())
    values[-2] ^= 1
    output.write_bytes(values)
    with pytest.raises(CheckpointError, match=r"output.safetensors' is damaged.*targets anew"):
        CachedTeacher(place)
    output.unlink()
    with pytest.raises(CheckpointError, match=r"output.safetensors.*targets anew"):
        CachedTeacher(place)


KILLED = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.teachers.test_cached import *
torch.set_num_threads(1)
data = pictures(Path({folder!r}) / "pictures", 24)
cache(tiny.make_teacher(), data, Path({folder!r}) / "killed", batch_size=1, **QUIET)
"""


@pytest.mark.slow  # a process of its own
def test_a_killed_writer_is_continued_to_the_same_targets(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    script = KILLED.format(root=root, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    index = tmp_path / "killed" / INDEX
    while process.poll() is None and not (index.exists() and index.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    data = pictures(tmp_path / "pictures", 24)
    teacher = tiny.make_teacher()
    found = cache(teacher, data, tmp_path / "killed", batch_size=1, **QUIET)
    whole = cache(teacher, data, tmp_path / "whole", batch_size=1, **QUIET)
    for batch in batches(data):
        assert torch.equal(found(batch).logits, whole(batch).logits)


# -- top k -------------------------------------------------------------------------------------


def exact_bucket(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """KL on the teacher's k most probable words and all others together, in float64."""
    p, q = ((each.double() / temperature).softmax(-1) for each in (teacher, student))
    ids = p.topk(k).indices
    p, q = (torch.cat([e.gather(-1, ids), 1 - e.gather(-1, ids).sum(-1, True)], -1) for e in (p, q))
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["captioner", "ensemble", "wrapped"])
def test_top_words_give_the_divergence_with_the_rest_as_one_entry(
    data: CaptionData, tmp_path: Path, temperature: float, kind: str
) -> None:
    live: Any = tiny.make_teacher()
    if kind == "ensemble":
        live = Ensemble(members(), [2, 1], "confidence")
    elif kind == "wrapped":
        inner = live
        live = cd.teachers.wrap(inner, lambda module, batch: module(batch), inner.tokenizer)
    how: dict[str, Any] = {"top_k": 4, "temperatures": [1, 2, 4], "min_mass": 0, **QUIET}
    how["image_size"] = tiny.SIDE  # of a wrapped model, it is not known
    cached = cache(live, data, tmp_path / "targets", **how)
    assert isinstance(cached, CachedTeacher)
    student = tiny.make_student().eval()
    for batch in batches(data):
        with torch.no_grad():
            live.eval()
            theirs, ours = live(batch).logits, student(batch)
        logits = ours.logits.clone().requires_grad_()
        loss = cd.TokenKD(temperature)
        total = loss(replace(ours, logits=logits), cached(batch), batch)
        total.backward()
        exact = logits.detach().clone().requires_grad_()
        expected = exact_bucket(exact, theirs, 4, temperature)[batch.target_mask].sum()
        (temperature**2 * expected).backward()
        assert total.item() == pytest.approx(temperature**2 * expected.item(), rel=8 * HALF)
        assert (logits.grad - exact.grad).abs().max() < 4 * HALF * exact.grad.abs().max()
        fewer = cd.losses.create("top_k", k=2, temperature=temperature)
        value = fewer(ours, cached(batch), batch)
        live_value = fewer(ours, replace(ours, logits=theirs), batch)
        assert float(value) == pytest.approx(float(live_value), rel=8 * HALF)


def test_words_with_a_small_probability_are_refused_with_the_figure(
    data: CaptionData, tmp_path: Path
) -> None:
    place, teacher = tmp_path / "targets", tiny.make_teacher().eval()
    how: dict[str, Any] = {"top_k": 3, "temperatures": [1.0, 4.0], **QUIET}
    with pytest.raises(ConfigError, match=r"probability of \d\d% at T = 1, \d\d% at T = 4; at lea"):
        cache(teacher, data, place, **how)
    cached: Any = cache(teacher, data, place, **{**how, "min_mass": 0.1})
    masses = []
    for batch in batches(data, train=False, captions_per_image=4, batch_size=1):
        with torch.no_grad():
            p = (teacher(batch).logits / 4).softmax(-1)[batch.target_mask]
        rows = len({*batch.captions})
        masses.append(p.topk(3).values.sum(-1)[: int(batch.target_mask[:rows].sum())])
    assert cached.mass()[4.0] == pytest.approx(float(torch.cat(masses).mean()), abs=1e-3)
    assert "top 3 words of 6 images" in repr(cached)


def test_losses_that_read_all_words_or_another_temperature_are_refused(
    data: CaptionData, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"top_k": 3, "temperatures": 2.0, "min_mass": 0, **QUIET}
    cached = cache(tiny.make_teacher(), data, tmp_path / "targets", **how)
    reasons = {
        "compares the logits of all words": {"name": "reverse_kl"},
        r"temperature is 4.0.*at 2 alone": {"name": "token"},
        r"temperature is \(4.0, 2.0\)": {"name": "token", "temperature": [4, 2]},
        "k=5, but the cached teacher keeps the 3": {"name": "top_k", "k": 5, "temperature": 2},
        "no cached hidden": {"name": "hidden"},
    }
    for reason, loss in reasons.items():
        with pytest.raises(ConfigError, match=reason):
            cd.Distiller(cached, tiny.make_student(), losses={"it": loss}, **QUIET)
    losses = {
        "token": {"name": "token", "temperature": 2.0},
        "some": {"name": "top_k", "k": 2, "rest": "renormalise", "temperature": [4, 2]},
    }
    distiller = cd.Distiller(cached, tiny.make_student(), losses=losses, **QUIET)
    history = distiller.fit(data, epochs=2, augment=False, batch_size=2)
    terms = [row["train"]["terms"]["token"]["raw"] for row in history.epochs]
    assert 0 < terms[1] < terms[0]
    with pytest.raises(ConfigError, match=r"top_k=99, but there are \d+ words"):
        cache(tiny.make_teacher(), data, tmp_path / "more", top_k=99, **QUIET)
    with pytest.raises(ConfigError, match=r"draws a member in every epoch"):
        cache(Ensemble(members(), mixing="draw"), data, tmp_path / "more", top_k=2, **QUIET)


# -- runs ----------------------------------------------------------------------------------------


class PowerCut:
    def on_step(self, trainer: Any, row: Any) -> None:
        if row["step"] == 4:
            raise RuntimeError("power cut")


def test_a_resumed_run_ends_with_the_same_weights(data: CaptionData, tmp_path: Path) -> None:
    live = Ensemble(members(), [2, 1], "draw")
    how: dict[str, Any] = {"cache_views": 2, "flip": True, "cache_features": True}
    how |= {"cache_dir": tmp_path / "maps", **QUIET}
    cached = cache(live, data, tmp_path / "targets", **{**how, "cache_features": False})

    def run(out: str, callbacks: Any = (), resume: Any = False) -> Any:
        student = tiny.make_student(trainable=False, dropout=0.3)
        student.save = lambda *args, **kwargs: None  # type: ignore[method-assign]
        options = {**how, "epochs": 3, "batch_size": 2, "save_every": 1, "word_dropout": 0.2}
        losses = {"token": {"name": "token", "temperature": 2.0}}
        distiller = cd.Distiller(cached, student, losses=losses, **options)
        distiller.fit(data, out=tmp_path / out, callbacks=callbacks, resume=resume)
        return distiller.objective.state_dict()

    whole = run("whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run("parts", [PowerCut()])
    assert tiny.same_bits(run("parts", resume=True), whole)
    described = json.loads((tmp_path / "parts" / "run.json").read_text())["models"][1]
    assert [Path(each["targets"]).name for each in described["members"]] == ["1-one", "2-other"]


def test_two_writers_of_one_directory_share_the_work(data: CaptionData, tmp_path: Path) -> None:
    teachers = [tiny.make_teacher(), tiny.make_teacher()]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(partial(write, data, tmp_path, batch_size=1), teachers)
    assert sorted(teacher.encoder.seen for teacher in teachers) == [0, 6]
    for batch in batches(data):
        assert torch.equal(one(batch).logits, other(batch).logits)


def test_a_cached_and_a_live_teacher_are_mixed(data: CaptionData, tmp_path: Path) -> None:
    one, other = members().values()
    cached = write(data, tmp_path, one)
    losses = {
        "token": "token",
        "hidden": {"name": "hidden", "teacher": "stored"},
        "feature": {"name": "feature", "teacher": "live"},
    }
    terms = []
    for first in (cached, one):
        teachers = {"stored": first, "live": other}
        distiller = cd.Distiller(teachers, tiny.make_student(), losses=losses, **QUIET)
        history = distiller.fit(data, epochs=2, augment=False, batch_size=2)
        terms.append(history.epochs[-1]["train"]["terms"])
    for name, value in terms[1].items():
        assert terms[0][name]["raw"] == pytest.approx(value["raw"], rel=2e-3), name


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"columns": [["../hidden", "float16", 8, "token"]]},
        {"columns": [["hidden", "object", 8, "token"]]},
        {"columns": [["hidden", "float16", 3, "token"]]},
        {"spec": {}},
        {"about": {"flip": 1}},
        {"format": "capdistill.targets/2"},
    ],
)
def test_descriptions_that_were_edited_are_refused(
    data: CaptionData, tmp_path: Path, change: dict[str, Any]
) -> None:
    place = tmp_path / "targets"
    cache(tiny.make_teacher(), data.subset(1), place, **QUIET)
    content = json.loads((place / TARGETS).read_text())
    (place / TARGETS).write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=r"targets.json|output.safetensors holds weight"):
        CachedTeacher(place)


def test_members_and_student_read_images_at_their_own_sizes(
    data: CaptionData, tmp_path: Path
) -> None:
    live = Ensemble(members())
    live.members["one"].encoder.image_size = 2 * tiny.SIDE
    cached = write(data, tmp_path, live)
    assert isinstance(cached, Ensemble)
    assert cached.image_size is None  # it reads none
    about = {name: m.store.content["about"] for name, m in cached.members.items()}
    assert {n: each["image_size"] for n, each in about.items()} == {
        "one": 2 * tiny.SIDE,
        "other": tiny.SIDE,
    }
    for name, side in {"one": 2 * tiny.SIDE, "other": tiny.SIDE}.items():
        alone = live.members[name].eval()
        for batch, larger in zip(batches(data), batches(data, image_size=side), strict=True):
            with torch.no_grad():
                expected = alone(larger).logits
            found = cached.members[name](batch).logits
            assert (found - expected)[batch.target_mask].abs().max() < 8 * HALF
    cached = cache(live, data, tmp_path / "one size", image_size=tiny.SIDE, **QUIET)
    sizes = {m.store.content["about"]["image_size"] for m in cached.members.values()}
    assert sizes == {tiny.SIDE}


@pytest.mark.parametrize("held", ["captioner", "ensemble", "targets"])
def test_what_is_saved_in_a_directory_is_not_mixed_with_anything_else(
    data: CaptionData, tmp_path: Path, held: str
) -> None:
    folder = tmp_path / "targets"
    saved = cd.Captioner.create("debug_student", tokenizer=tiny.TOKENIZER, weights=False)
    ways: dict[str, Any] = {
        "captioner": lambda: saved.save(folder),
        "ensemble": lambda: Ensemble([saved]).save(folder),
        "targets": lambda: write(data, tmp_path, tiny.make_teacher()),
        "run": lambda: cd.Trainer(tiny.make_student(), **QUIET).fit(data, out=folder),
    }
    ways.pop(held)()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for another in ways.values():
        with pytest.raises(ConfigError, match=rf"{folder} holds (a saved|cached) .*{held}"):
            another()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
