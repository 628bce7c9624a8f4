"""What `fit` and `evaluate` take as data, and how many workers read it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from capdistill.data import CaptionData, Loader, Splits, workers
from capdistill.data.loader import make_source
from capdistill.data.source import FixedBatches, require_unique_ids
from capdistill.data.workers import default_num_workers
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.tokenizer import WordTokenizer


class Epochs:
    """The contract and nothing else; it also has a length and items, which must not mislead."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.batches[start:])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def test_a_source_is_used_as_it_is(colours: CaptionData, tokenizer: WordTokenizer) -> None:
    loader = Loader(colours, tokenizer, image_size=8, batch_size=2, train=True)
    epochs = Epochs(list(loader))
    for source in (loader, epochs):
        assert make_source(source, tokenizer, image_size=16, batch_size=5, train=True) is source
    orders = [tuple(i for b in loader.epoch(n) for i in b.image_ids) for n in range(3)]
    assert len(set(orders)) == 3


def test_a_loader_with_another_vocabulary_is_refused(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    other = Loader(colours, WordTokenizer(["a", "dog"]), image_size=8)
    with pytest.raises(ConfigError, match=r"another vocabulary \(6 entries\)"):
        make_source(other, tokenizer, image_size=8, train=True)
    assert make_source(other, tokenizer, image_size=8) is other  # only its references are read
    same = WordTokenizer(tokenizer.vocabulary[4:])
    loader = Loader(colours, same, image_size=8)
    assert make_source(loader, tokenizer, image_size=8, train=True) is loader


@pytest.mark.parametrize("data", ["flickr8k", b"x", Path("x"), {"a.jpg": ["a dog"]}, 3, None])
def test_what_holds_no_images_is_refused_with_the_choices(
    data: Any, tokenizer: WordTokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"is not a data set\. Give a capdistill data set"):
        make_source(data, tokenizer, image_size=8)


def test_splits_are_refused_with_the_way_to_one(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    splits = Splits({"train": colours}, name="mine")
    with pytest.raises(ConfigError, match=r"Give one of its splits: data\.train"):
        make_source(splits, tokenizer, image_size=8)


def test_a_first_item_that_raises_does_not_hide_a_data_set(tokenizer: WordTokenizer) -> None:
    class Odd:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            if index == 0:
                raise ValueError("bad value")
            return torch.zeros(3, 8, 8, dtype=torch.uint8), "a picture"

    source = make_source(Odd(), tokenizer, image_size=8)
    assert [batch.image_ids for batch in source.epoch(0)] == [("1",)]


def test_a_class_is_no_source(tokenizer: WordTokenizer) -> None:
    class NoMethod:
        epoch = 3

    with pytest.raises(ConfigError, match="NoMethod is not a data set"):
        make_source(NoMethod(), tokenizer, image_size=8)


def test_batches_and_data_sets_are_wrapped(colours: CaptionData, tokenizer: WordTokenizer) -> None:
    batches = list(Loader(colours, tokenizer, image_size=8, batch_size=2))
    assert isinstance(make_source(batches, tokenizer, image_size=8), FixedBatches)
    assert isinstance(make_source(tuple(batches), tokenizer, image_size=8), FixedBatches)
    pairs = [(colours[0][0], "a picture")]
    for data in (colours, pairs, torch.utils.data.Subset(colours, [0])):
        assert isinstance(make_source(data, tokenizer, image_size=8), Loader)


def test_ids_are_unique_over_all_batches() -> None:
    seen: set[str] = set()
    require_unique_ids(("x", "y"), "val", seen)
    require_unique_ids(("z",), "val", seen)
    with pytest.raises(DataError, match="val: the image id 'y' occurs twice"):
        require_unique_ids(("w", "y"), "val", seen)
    with pytest.raises(DataError, match="'x' occurs twice"):
        require_unique_ids(iter(["x", "x"]), "val")


class Large:
    def __init__(self, n: int = 1000, **parts: Any) -> None:
        self.n = n
        self.__dict__.update(parts)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return "a.jpg", "a dog"


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("data", "workers"),
    [
        (Large(), 4),
        (Large(127), 0),
        (Large(128), 4),
        ([("a.jpg", "a dog")] * 1000, 4),
        ([(torch.zeros(3, 8, 8), "a dog")] * 1000, 0),
        ([(b"bytes", "a dog")] * 1000, 0),
        (Large(transform=lambda image: image), 4),
    ],
    ids=["large", "few", "enough", "paths", "tensors", "bytes", "lambda"],
)
def test_workers_are_used_where_they_pay(data: Any, workers: int, tokenizer: WordTokenizer) -> None:
    assert default_num_workers(data, 16, start_method="fork") == workers
    loader = Loader(data, tokenizer, image_size=8, num_workers=None, start_method="fork")
    assert loader.num_workers == workers
    options: dict[str, Any] = {"image_size": 8, "num_workers": None, "start_method": "fork"}
    assert Loader(data, tokenizer, cache_images=True, **options).num_workers == 0
    assert Loader(data, tokenizer, with_images=False, **options).num_workers == 0
    assert Loader(data, tokenizer, image_size=8).num_workers == 0


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 2), (3, 3), (64, 4)])
def test_there_are_no_more_workers_than_cores(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_num_workers(Large(), start_method="fork") == workers


@pytest.mark.usefixtures("eight_cores")
def test_workers_that_import_the_program_need_one_that_can_be_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_program_is_guarded", lambda: True)
    assert default_num_workers(Large(), start_method="spawn") == 4
    assert default_num_workers(Large(transform=lambda image: image), start_method="spawn") == 0
    monkeypatch.setattr(workers, "_program_is_guarded", lambda: False)
    assert default_num_workers(Large(), start_method="spawn") == 0
    assert default_num_workers(Large(), start_method="fork") == 4


@pytest.mark.usefixtures("eight_cores")
def test_a_worker_starts_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    process = multiprocessing.current_process()
    monkeypatch.setattr(type(process), "daemon", property(lambda self: True))
    assert default_num_workers(Large(), start_method="fork") == 0


def test_asking_for_the_default_does_not_fix_it() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    workers.worker_start_method(None)
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_a_closed_loader_starts_its_workers_anew(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    others = set(multiprocessing.active_children())  # of loaders that other tests made
    loader = Loader(colours, tokenizer, image_size=8, batch_size=2, num_workers=1)
    before = [batch.image_ids for batch in loader]
    assert len(set(multiprocessing.active_children()) - others) == 1
    loader.close()
    assert not set(multiprocessing.active_children()) - others
    assert [batch.image_ids for batch in loader] == before
