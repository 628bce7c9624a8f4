"""A user's data set at the loader's door: whatever it raises or gives, the epoch ends."""

from __future__ import annotations

import struct
import zlib
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from capdistill.data import Loader
from capdistill.data.workers import require_picklable
from capdistill.errors import ConfigError, DataError
from capdistill.tokenizer import WordTokenizer

GOOD = torch.zeros(3, 9, 9, dtype=torch.uint8)


class OddError(Exception):
    """Cannot be pickled: its constructor takes two arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class Theirs(torch.utils.data.Dataset[Any]):
    """Items 0 and 2 are good; item 1 is what the test says, raised if it is an exception."""

    def __init__(self, odd: Any, ids: Any = ("first", "odd", "last")) -> None:
        self.odd = odd
        if ids is not None:
            self.image_ids = ids

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index != 1:
            return GOOD, "a picture"
        if isinstance(self.odd, BaseException):
            raise self.odd
        return self.odd


class Explosive(np.ndarray[Any, Any]):
    @property
    def dtype(self) -> Any:
        raise RuntimeError("no type today")


RAISED: list[Exception] = [
    ValueError("bad value"),
    EOFError("no more"),
    struct.error("unpack requires 4 bytes"),
    zlib.error("Error -3"),
    Image.DecompressionBombError("a bomb"),
    UnidentifiedImageError("what is it"),
    OSError("lost"),
    SyntaxError("broken PNG"),
    KeyError("caption"),
    IndexError("9"),
    StopIteration(),
    AttributeError("split"),
    ZeroDivisionError(),
    MemoryError(),
    RuntimeError("shape mismatch"),
    AssertionError(),
    OddError(3, "odd"),
    DataError("odd.jpg: truncated."),
    ConfigError("no"),
]
GIVEN: list[tuple[Any, str]] = [
    (None, "malformed item"),
    (GOOD, "malformed item"),
    ("a picture", "malformed item"),
    ((GOOD,), "malformed item"),
    ((GOOD, "a picture", 3), "malformed item"),
    ({"image": GOOD, "caption": "a picture"}, "malformed item"),
    ((GOOD, None), "image without caption"),
    ((GOOD, float("nan")), "image without caption"),
    ((GOOD, []), "image without caption"),
    ((GOOD, ["", " "]), "image without caption"),
    ((GOOD, [None]), "image without caption"),
    ((GOOD, "['a dog', 'a cat']"), "image without caption"),
    ((GOOD, {"raw": "a dog"}), "image without caption"),
    ((GOOD, torch.tensor([1, 2])), "image without caption"),
    ((GOOD, b"a dog"), "image without caption"),
    ((None, "a picture"), "corrupt image"),
    ((3, "a picture"), "corrupt image"),
    (("no-such-file.jpg", "a picture"), "corrupt image"),
    ((GOOD[0, 0], "a picture"), "corrupt image"),
    ((GOOD[None], "a picture"), "corrupt image"),
    ((GOOD[:, :0], "a picture"), "corrupt image"),
    ((torch.full((3, 9, 9), torch.nan), "a picture"), "corrupt image"),
    ((torch.zeros(3, 9, 9, device="meta"), "a picture"), "corrupt image"),
    ((np.array([[object()]]), "a picture"), "corrupt image"),
    ((np.zeros((9, 9, 3), np.uint8).view(Explosive), "a picture"), "corrupt image"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_an_item_raises_it_is_skipped_and_named(
    error: Exception, tokenizer: WordTokenizer
) -> None:
    loader = Loader(Theirs(error), tokenizer, image_size=8, batch_size=1)
    assert [batch.image_ids for batch in loader] == [("first",), ("last",)]
    (problem,) = loader.skipped
    assert (problem.kind, problem.file) == ("corrupt image", "item odd")
    assert str(error).rstrip(".") in problem.detail
    assert problem.detail


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_when_told_to_raise_the_error_names_the_item_and_its_cause(
    error: Exception, tokenizer: WordTokenizer
) -> None:
    loader = Loader(Theirs(error), tokenizer, image_size=8, batch_size=1, errors="raise")
    batches = loader.epoch(0)
    assert next(batches).image_ids == ("first",)
    with pytest.raises(DataError, match="item odd: corrupt image") as caught:
        next(batches)
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError if isinstance(error, OddError) else type(error))
    assert str(error) in str(cause)


@pytest.mark.parametrize(("item", "kind"), GIVEN, ids=range(len(GIVEN)))
def test_an_item_of_another_form_is_skipped_and_named(
    item: Any, kind: str, tokenizer: WordTokenizer
) -> None:
    loader = Loader(Theirs(item), tokenizer, image_size=8, batch_size=1)
    assert [batch.image_ids for batch in loader] == [("first",), ("last",)]
    assert kind in loader.skipped.counts
    assert {problem.file for problem in loader.skipped} == {"item odd"}
    strict = Loader(Theirs(item), tokenizer, image_size=8, errors="raise")
    with pytest.raises(DataError, match="item odd: "):
        list(strict)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("caption"), OddError(3, "odd")], ids=["plain", "odd"])
def test_workers_report_what_an_item_raised(
    error: Exception, workers: int, tokenizer: WordTokenizer
) -> None:
    data = Theirs(error)
    loader = Loader(data, tokenizer, image_size=8, batch_size=1, num_workers=workers)
    assert len(list(loader)) == 2
    assert loader.skipped.counts == {"corrupt image": 1}
    strict = Loader(data, tokenizer, image_size=8, num_workers=workers, errors="raise")
    with pytest.raises(DataError, match="item odd") as caught:
        list(strict)
    assert str(error) in str(caught.value.__cause__)
    assert strict._pool is None


def test_one_bad_caption_is_left_out_and_the_image_stays(tokenizer: WordTokenizer) -> None:
    loader = Loader(Theirs((GOOD, ["a dog", None, " "])), tokenizer, image_size=8)
    (batch,) = loader
    assert batch.references == (("a picture",), ("a dog",), ("a picture",))
    assert loader.skipped.counts == {"invalid caption": 1}
    with pytest.raises(DataError, match="item odd: invalid caption"):
        list(Loader(loader.collator.data, tokenizer, image_size=8, errors="raise"))


def test_a_data_set_that_always_fails_is_one_error_with_its_cause(
    tokenizer: WordTokenizer,
) -> None:
    class Broken(Theirs):
        def __getitem__(self, index: int) -> Any:
            raise AttributeError("no 'imges'")

    with pytest.raises(DataError, match=r"(?s)None of the 3 images.*no 'imges'") as caught:
        next(Loader(Broken(None), tokenizer, image_size=8).epoch(0))
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)], ids=["ctrl-c", "exit"])
def test_a_request_to_stop_is_no_bad_item(stop: BaseException, tokenizer: WordTokenizer) -> None:
    with pytest.raises(type(stop)):
        list(Loader(Theirs(stop), tokenizer, image_size=8))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("x", "x", "y"), "'x' occurs twice"),
        ((1, "1", 2), "'1' occurs twice"),
        (("x", "y"), "2 entries for 3 items"),
        (("x", None, "y"), "None; expected one string per item"),
        (("x", ["y"], "z"), r"\['y'\]; expected one string per item"),
    ],
    ids=["twice", "twice as text", "too few", "None", "list"],
)
def test_ids_of_a_data_set_are_names_and_unique(
    ids: Any, message: str, tokenizer: WordTokenizer
) -> None:
    with pytest.raises(DataError, match=rf"Theirs\.image_ids: .*{message}"):
        Loader(Theirs((GOOD, "a picture"), ids), tokenizer, image_size=8)


def test_without_ids_items_are_known_by_number(tokenizer: WordTokenizer) -> None:
    (batch,) = Loader(Theirs((GOOD, "a picture"), None), tokenizer, image_size=8)
    assert batch.image_ids == ("0", "1", "2")


class Holder:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_need_data_that_can_be_sent(
    method: str, tokenizer: WordTokenizer
) -> None:
    data = Theirs((GOOD, "a picture"))
    data.transform = Holder(steps=[Holder(fn=lambda image: image)])  # type: ignore[attr-defined]
    loader = Loader(data, tokenizer, image_size=8, num_workers=1, start_method=method)
    message = r"data\.transform\.steps\[0\]\.fn cannot be pickled .*lambda.*num_workers=0"
    with pytest.raises(ConfigError, match=message) as caught:
        next(loader.epoch(0))
    assert caught.value.__cause__ is not None
    assert len(list(Loader(data, tokenizer, image_size=8, num_workers=0, start_method=method))) == 1


def test_what_cannot_be_pickled_is_named() -> None:
    def local() -> None: ...

    for part in (lambda: 0, local, (n for n in "ab"), Lock(), type("Local", (), {})()):
        with pytest.raises(ConfigError, match=r"^data\.a\['b'\] cannot be pickled"):
            require_picklable(Holder(good=1, a={"x": 2, "b": part}))
    require_picklable(Theirs((GOOD, "a picture")))


def test_an_unknown_start_method_lists_those_there_are(tokenizer: WordTokenizer) -> None:
    data = Theirs((GOOD, "a picture"))
    loader = Loader(data, tokenizer, image_size=8, num_workers=1, start_method="thread")
    with pytest.raises(ConfigError, match=r"start_method='thread' was given; use one of .*spawn"):
        next(loader.epoch(0))
