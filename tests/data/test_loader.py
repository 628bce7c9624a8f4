from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from capdistill.data import CaptionData, Example, Loader, sample
from capdistill.data.collate import choose_captions
from capdistill.data.source import FixedBatches, numbered_batches, part_of
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.runtime import generator
from capdistill.tokenizer import WordTokenizer
from tests.data.data_pictures import broken_files, noise, picture


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in (
            (getattr(one, field.name), getattr(other, field.name))
            for field in dataclasses.fields(Batch)
        )
    )


def several(tmp_path: Path, n: int = 7, captions: int = 3) -> CaptionData:
    for i in range(n):
        noise(20 + i).save(tmp_path / f"{i}.png")
    return CaptionData(
        Example(f"{i}.png", tmp_path / f"{i}.png", tuple(f"w{c} w{i}" for c in range(captions)))
        for i in range(n)
    )


@pytest.fixture
def half_broken(tmp_path: Path, colours: CaptionData) -> CaptionData:
    """Six good and five bad images; two batches of two hold nothing but bad ones."""
    bad = [Example(path.name, path, (f"a {path.name}",)) for path in broken_files(tmp_path)]
    good = list(colours.examples)
    return CaptionData([good[0], bad[0], *bad[1:5], *good[1:]])


BAD = {"half.jpg", "empty.jpg", "page.jpg", "stub.png", "flip.png"}
RGB = {
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_broken_images_are_left_out_and_named(
    half_broken: CaptionData, tokenizer: WordTokenizer, workers: int, train: bool
) -> None:
    loader = Loader(
        half_broken, tokenizer, image_size=16, batch_size=2, train=train, num_workers=workers
    )
    batches = list(loader)

    seen = {
        caption.split()[1]: tuple(image[:, 5, 5].tolist())
        for batch in batches
        for caption, image in zip(batch.captions, batch.images, strict=True)
    }
    assert seen == RGB
    assert sum(batch.num_images for batch in batches) == 6
    assert {Path(problem.file).name for problem in loader.skipped} == BAD
    assert all(problem.detail for problem in loader.skipped)
    assert loader.skipped.counts == {"corrupt image": 5}


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_reading_names_the_path(
    half_broken: CaptionData, tokenizer: WordTokenizer, workers: int
) -> None:
    loader = Loader(half_broken, tokenizer, image_size=16, errors="raise", num_workers=workers)
    with pytest.raises(DataError, match=r"half\.jpg"):
        list(loader)


def test_nothing_but_broken_images_is_one_clear_error(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    bad = [Example(path.name, path, ("a picture",)) for path in broken_files(tmp_path)]
    loader = Loader(CaptionData(bad), tokenizer, image_size=16, batch_size=2)
    with pytest.raises(DataError, match=r"(?s)None of the 5 images can be used.*5 corrupt image"):
        next(loader.epoch(0))


@pytest.mark.parametrize("start_method", [None, pytest.param("spawn", marks=pytest.mark.slow)])
def test_epochs_are_the_same_with_and_without_workers(
    tmp_path: Path, tokenizer: WordTokenizer, start_method: str | None
) -> None:
    data = several(tmp_path)
    options: dict[str, Any] = {"image_size": 16, "batch_size": 3, "train": True, "flip": True}
    alone = Loader(data, tokenizer, **options)
    helped = Loader(data, tokenizer, num_workers=2, start_method=start_method, **options)
    state = torch.get_rng_state()

    for epoch in (1, 0) if start_method is None else (1,):  # each spawned worker imports torch
        pairs = zip(alone.epoch(epoch), helped.epoch(epoch), strict=True)
        assert all(same(one, other) for one, other in pairs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_on_the_cpu_whatever_the_default_device_is(
    tmp_path: Path, tokenizer: WordTokenizer, num_workers: int
) -> None:
    options: dict[str, Any] = {"image_size": 16, "batch_size": 3, "train": True, "flip": True}
    data = several(tmp_path)
    usual = list(Loader(data, tokenizer, **options).epoch(0))
    with torch.device("meta"):
        found = list(Loader(data, tokenizer, num_workers=num_workers, **options).epoch(0))
    assert all(same(one, other) for one, other in zip(usual, found, strict=True))


def test_an_abandoned_epoch_does_not_leak_into_the_next(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    data = several(tmp_path)
    loader = Loader(data, tokenizer, image_size=16, batch_size=1, train=True, num_workers=1)
    for _ in loader.epoch(0):
        break
    ids = [batch.image_ids for batch in loader.epoch(1)]
    alone = Loader(data, tokenizer, image_size=16, batch_size=1, train=True)
    assert ids == [batch.image_ids for batch in alone.epoch(1)]


def test_two_epochs_at_once_do_not_mix(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    data = several(tmp_path, n=3)
    loader = Loader(data, tokenizer, image_size=16, batch_size=1, train=True, num_workers=1)
    both = list(zip(loader.epoch(0), loader.epoch(3), strict=True))
    for n, epoch in enumerate((0, 3)):
        ids = [batch.image_ids for batch in loader.epoch(epoch)]
        assert [pair[n].image_ids for pair in both] == ids


def test_ctrl_c_leaves_the_workers_to_finish_the_step(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    loader = Loader(several(tmp_path), tokenizer, image_size=16, batch_size=1, num_workers=1)
    batches = loader.epoch(0)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)
    assert len(list(batches)) == 6


def test_an_epoch_is_every_image_once_in_an_order_of_its_own(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    data = several(tmp_path)
    loader = Loader(data, tokenizer, image_size=16, batch_size=3, train=True)
    orders = [[i for batch in loader.epoch(n) for i in batch.image_ids] for n in range(3)]
    assert all(sorted(order) == sorted(data.image_ids) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len(loader) == 3


def test_chance_depends_on_the_image_not_on_its_company(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    data = several(tmp_path)
    whole = Loader(data, tokenizer, image_size=16, train=True, captions_per_image=1).epoch(2)
    single = Loader(
        data.subset([4]), tokenizer, image_size=16, train=True, captions_per_image=1
    ).epoch(2)
    batch, alone = next(whole), next(single)
    place = batch.image_ids.index("4.png")
    assert torch.equal(batch.images[place], alone.images[0])
    assert batch.captions[place] == alone.captions[0]


def test_crops_and_captions_change_with_the_epoch(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    data = several(tmp_path, n=1)
    loader = Loader(data, tokenizer, image_size=16, train=True, captions_per_image=1)
    batches = [next(loader.epoch(n)) for n in range(12)]
    assert len({batch.captions for batch in batches}) == 3
    assert len({batch.images.numpy().tobytes() for batch in batches}) >= 10


def test_an_epoch_can_be_entered_in_the_middle(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    loader = Loader(several(tmp_path), tokenizer, image_size=16, batch_size=2, train=True)
    rest = list(loader.epoch(5))[2:]
    again = list(loader.epoch(5, start=2))
    assert all(same(one, other) for one, other in zip(rest, again, strict=True))
    assert list(loader.epoch(5, start=4)) == []


def test_evaluation_is_in_order_with_references(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    data = several(tmp_path)
    (batch,) = Loader(data, tokenizer, image_size=16)
    assert batch.image_ids == data.image_ids
    assert batch.references == tuple(data.references.values())
    assert batch.captions == tuple(data.captions)


def test_training_has_no_references(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    (batch,) = Loader(several(tmp_path), tokenizer, image_size=16, train=True)
    assert batch.references is None


def test_padding_is_marked_by_position(colours: CaptionData) -> None:
    class Foreign:
        pad_id = 0

        def encode(self, caption: str) -> list[int]:
            return [0, *range(1, len(caption.split()) + (caption == "a red picture")), 0]

    batch = next(iter(Loader(colours, Foreign(), image_size=8)))
    assert batch.mask.sum(1).tolist() == [5, 4, 4, 4, 4, 4]


def test_ids_are_cut_to_the_length_asked_for(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    batch = next(iter(Loader(colours, tokenizer, image_size=8, max_length=3)))
    assert batch.input_ids.shape == (6, 3)
    assert tokenizer.end_id not in batch.input_ids


@given(
    st.lists(st.text(), min_size=1, max_size=7, unique=True),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_captions_repeat_only_when_all_are_used(texts: list[str], k: int, seed: int) -> None:
    chosen = choose_captions(texts, k, generator(seed))
    counts = Counter(chosen)
    assert len(chosen) == k
    assert max(counts.values()) - min(counts.get(text, 0) for text in texts) <= 1


def test_cached_images_are_the_same_without_random_crops(
    tmp_path: Path, tokenizer: WordTokenizer
) -> None:
    data = several(tmp_path)
    for options in ({"train": False}, {"train": True, "crop": False, "flip": True}):
        plain = Loader(data, tokenizer, image_size=16, **options)
        kept = Loader(data, tokenizer, image_size=16, cache_images=True, **options)
        list(kept.epoch(0))
        assert same(next(plain.epoch(1)), next(kept.epoch(1)))


def test_cached_images_are_read_once(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    data = several(tmp_path)
    loader = Loader(data, tokenizer, image_size=16, train=True, cache_images=True)
    first = next(loader.epoch(0))
    for example in data.examples:
        example.path.unlink()
    assert same(next(loader.epoch(0)), first)


def test_stores_ride_along_and_images_stay_unread(
    half_broken: CaptionData, tokenizer: WordTokenizer
) -> None:
    good = [name for name in half_broken.image_ids if name not in BAD]
    store = {name: torch.full((2, 3), float(n)) for n, name in enumerate(good)}
    loader = Loader(half_broken, tokenizer, image_size=16, caches={"f": store}, with_images=False)
    (batch,) = loader
    assert batch.images.shape == (6, 3, 0, 0)
    assert batch.cached["f"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert loader.skipped.counts == {"no cached features": 5}
    assert "what could not be read was left out" in str(loader.skipped)


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def test_any_data_set_of_pairs_will_do(tmp_path: Path, tokenizer: WordTokenizer) -> None:
    path = picture(tmp_path / "a.png")
    data = Pairs((path, "a red picture"), (noise(), ["a", "", "a picture"]), OSError("lost"))
    loader = Loader(data, tokenizer, image_size=16, captions_per_image=2)
    (batch,) = loader
    assert batch.image_ids == ("0", "1")
    assert batch.captions == ("a red picture", "a red picture", "a", "a picture")
    assert str(loader.skipped).endswith("item 2: corrupt image (lost)")


def test_a_list_of_pairs_and_torch_subsets_will_do(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    subset = torch.utils.data.Subset(colours, [3, 1])
    for data in (subset, [subset[0], subset[1]]):
        (batch,) = Loader(data, tokenizer, image_size=16)
        assert batch.captions == ("a yellow picture", "a lime picture")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((noise(), torch.tensor([1, 2])), r"item 0: invalid caption \(tensor\(\[1, 2\]\)"),
        ({"image": noise()}, r"item 0: malformed item \(it is a dict; expected a pair"),
        ((noise(), "  "), "item 0: image without caption"),
        ((torch.full((3, 9, 9), -1.5), "a"), r"float pixels from -1\.5"),
    ],
    ids=["ids", "dict", "blank", "normalised"],
)
def test_items_that_are_no_captioned_images_are_refused(
    item: Any, said: str, tokenizer: WordTokenizer
) -> None:
    with pytest.raises(DataError, match=said):
        list(Loader(Pairs(item), tokenizer, image_size=16))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"captions_per_image": 0}, {"num_workers": -1}, {"image_size": 0}],
    ids=lambda options: next(iter(options)),
)
def test_numbers_that_cannot_work_are_refused(
    colours: CaptionData, tokenizer: WordTokenizer, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Loader(colours, tokenizer, **{"image_size": 16, **options})  # type: ignore[arg-type]


def test_no_data_is_refused_at_once(tokenizer: WordTokenizer) -> None:
    with pytest.raises(DataError, match="no image"):
        Loader([], tokenizer, image_size=16)
    with pytest.raises(ConfigError, match="data is int"):
        Loader(3, tokenizer, image_size=16)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [([1, 1, 1], 1), ([5, 5, 5], 5), ([7, 7, 7], 5), ([1, 4, 5, 7], 4), ([1, 1, 5], 1)],
)
def test_a_step_sees_as_many_captions_as_images_usually_have(
    captions: list[int], expected: int
) -> None:
    examples = [
        Example(str(n), Path(f"{n}.jpg"), tuple(f"caption {i}" for i in range(count)))
        for n, count in enumerate(captions)
    ]
    loader = Loader(CaptionData(examples), WordTokenizer(["caption"]), image_size=8, train=True)
    assert loader.collator.k == expected


def test_the_first_usable_image_decides_where_there_are_no_records(
    tokenizer: WordTokenizer,
) -> None:
    class Theirs:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> tuple[Tensor, list[str]]:
            if i == 0:
                raise OSError("gone")
            return torch.zeros(3, 8, 8, dtype=torch.uint8), ["a", "b", "c"]

    (batch,) = Loader(Theirs(), tokenizer, image_size=8, train=True)
    assert batch.captions_per_image == 3


# -- parts of several ranks -------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_batches_of_one_loader(ranks: int) -> None:
    data, tokenizer = sample().train.subset(11), WordTokenizer.train(sample().train.captions)
    how: dict[str, Any] = {"image_size": 16, "train": True, "seed": 3}
    whole = Loader(data, tokenizer, batch_size=2 * ranks, **how)
    parts = [Loader(data, tokenizer, batch_size=2, **how).for_rank(r, ranks) for r in range(ranks)]
    for start in (0, 1):
        read = [list(part.numbered(2, start)) for part in parts]
        assert {len(batches) for batches in read} == {len(whole) - start}
        for place, batch in enumerate(whole.epoch(2, start)):
            mine = [batches[place] for batches in read]
            assert sum((b.image_ids for b in mine if b), ()) == batch.image_ids
            assert sum((b.captions for b in mine if b), ()) == batch.captions
    assert len(parts[0]) == len(whole)


def test_a_rank_without_images_in_the_last_batch_has_a_place_without_a_batch() -> None:
    data, tokenizer = sample().train.subset(5), WordTokenizer.train(sample().train.captions)
    part = Loader(data, tokenizer, image_size=16, batch_size=2).for_rank(1, 2)
    assert [b and b.num_images for b in part.numbered(0)] == [2, None]
    assert [b.num_images for b in part.epoch(0)] == [2]


def test_of_a_source_that_knows_no_ranks_each_rank_takes_every_nth_batch() -> None:
    data, tokenizer = sample().train.subset(5), WordTokenizer.train(sample().train.captions)
    batches = list(Loader(data, tokenizer, image_size=16, batch_size=1))
    parts = [part_of(FixedBatches(batches), rank, 2) for rank in (0, 1)]
    ids = [[b and b.image_ids[0] for b in numbered_batches(part, 0)] for part in parts]
    names = [batch.image_ids[0] for batch in batches]
    assert ids == [names[0::2], [names[1], names[3], None]]
    assert [b.image_ids[0] for b in parts[1].epoch(0, start=1)] == [names[3]]
    assert part_of(parts[0], 0, 2) is parts[0]
    assert len(parts[1]) == 3


def test_the_part_of_a_source_without_a_length_is_counted_by_reading_it() -> None:
    reads: list[int] = []

    class Stream:
        def epoch(self, n: int, start: int = 0) -> Any:
            reads.append(n)
            return iter(["first", "second", "third"][start:])

    part = part_of(Stream(), 1, 2)  # type: ignore[arg-type]
    assert [len(part), len(part)] == [2, 2]
    assert reads == [0]
    assert list(part.numbered(0)) == ["second", None]  # type: ignore[attr-defined]


def test_a_batch_without_a_readable_image_keeps_its_number() -> None:
    bad = [("none.jpg", "a dog"), ("none.jpg", "a dog"), (torch.zeros(3, 9, 9), "a cat")]
    loader = Loader(bad, WordTokenizer(["a", "dog", "cat"]), image_size=8, batch_size=1)
    assert [b and b.image_ids for b in loader.numbered(0)] == [None, None, ("2",)]
    assert [b and b.image_ids for b in loader.numbered(0, start=1)] == [None, ("2",)]


def test_a_program_ends_though_its_workers_ignore_sigterm(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from capdistill.data import Loader, sample\n"
        "from capdistill.tokenizer import WordTokenizer\n"
        "if __name__ == '__main__':\n"
        "    data = sample().val\n"
        "    loader = Loader(data, WordTokenizer(['a']), image_size=8, num_workers=1)\n"
        "    print(sum(1 for _ in loader))\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1\n", b"")


def test_workers_of_a_lost_loader_end_though_no_message_reaches_them(
    tmp_path: Path, tokenizer: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(several(tmp_path), tokenizer, image_size=16, batch_size=1, num_workers=2)
    batches = loader.epoch(0)
    next(batches)
    assert loader._pool is not None
    workers = list(loader._pool._iterator._workers)  # type: ignore[union-attr]
    assert all(worker.is_alive() for worker in workers)
    monkeypatch.setattr(multiprocessing.queues.Queue, "put", lambda *_: None)
    cycle: list[object] = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
