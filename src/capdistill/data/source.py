"""Sources of batches: the contract of `fit`'s data, ready-made batches, the part of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from itertools import islice
from operator import length_hint
from typing import Any, Protocol

from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch


class Source(Protocol):
    """Epochs of batches."""

    @property
    def skipped(self) -> Any:
        """Images that could not be read, named."""

    def __len__(self) -> int:
        """Maximum number of batches per epoch."""

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch n; those before number `start` are not read."""


class EveryNth:
    """The batches of a source that one of several ranks takes: every `world_size`-th.

    All ranks read the source, and have equally many places; None where the source has ended.
    """

    def __init__(self, source: Source, rank: int, world_size: int) -> None:
        self.source, self.rank, self.world_size = source, rank, world_size
        self._length: int | None = None

    def __getattr__(self, name: str) -> Any:  # what else the source knows: its skipped images
        if name in ("source", "_length"):  # a copy that is not complete
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        if self._length is None:  # a source without a length is read once
            sized = isinstance(self.source, Sized)
            batches = len(self.source) if sized else sum(1 for _ in self.source.epoch(0))
            self._length = -(-batches // self.world_size)
        return self._length

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this rank."""
        return (batch for batch in self.numbered(n, start) if batch is not None)

    def numbered(self, n: int, start: int = 0) -> Iterator[Batch | None]:
        """The batches of this rank by number."""
        batches = numbered_batches(self.source, n, start * self.world_size)
        while group := list(islice(batches, self.world_size)):
            yield group[self.rank] if self.rank < len(group) else None


def part_of(source: Source, rank: int, world_size: int) -> Source:
    """What a rank reads of a source.

    A source may have `for_rank(rank, world_size)`, which returns its part, as `Loader` does. Of any
    other, every rank reads all batches and takes each `world_size`-th.

    Example:
        >>> len(part_of(FixedBatches(["first", "second", "third"]), rank=1, world_size=2))
        2

    Args:
        source: The whole, or what this function returned.
        rank: Number of this process.
        world_size: Number of processes.
    """
    if world_size == 1 or getattr(source, "world_size", 1) == world_size:
        return source
    split = getattr(source, "for_rank", None)
    return EveryNth(source, rank, world_size) if split is None else split(rank, world_size)


def numbered_batches(source: Source, n: int, start: int = 0) -> Iterator[Batch | None]:
    """The batches of an epoch by number; None where a source with `numbered` left one out."""
    own = getattr(source, "numbered", None)
    read = source.epoch if own is None else own
    return read(n, start) if start else read(n)


def skipped_images(source: Any) -> Sequence[Any]:
    """The images that a source skipped so far; your own source may not record them.

    Example:
        >>> skipped_images(object())
        ()
    """
    return getattr(source, "skipped", None) or ()


def require_batches(**given: Any) -> None:
    """Refuse ready-made batches, a list or an iterable, without any.

    Args:
        given: What the data are for -> the data. Data sets say themselves what is wrong with them.

    Raises:
        DataError: there is no batch.
    """
    for purpose, data in given.items():
        ready = isinstance(data, (list, tuple)) or not hasattr(data, "__getitem__")
        if ready and length_hint(data, 1) == 0:
            raise DataError(
                f"The {purpose} data are empty: a {type(data).__name__} of length 0. Give at least "
                "one batch. A DataLoader with drop_last=True leaves out a last, short batch."
            )


class FixedBatches:
    """Ready-made batches, the same in every epoch.

    Args:
        batches: An iterable of `Batch` that can be iterated several times.

    Raises:
        ConfigError: a one-shot iterator, which would be empty in the second epoch.
        DataError: no batch at all.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, batches: Iterable[Batch]) -> None:
        if iter(batches) is batches:
            raise ConfigError(
                "The batches come from a one-shot iterator, which would be empty in the second "
                "epoch. Give a list, or an object whose __iter__ starts from the beginning."
            )
        self.batches = batches
        self.length = _count(batches)
        if not self.length:
            raise DataError("There is no batch in the data. Give at least one.")

    def __len__(self) -> int:
        return self.length

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches, in their order.

        Raises:
            ConfigError: one of them is not a `Batch`.
        """
        for batch in islice(self.batches, start, None):
            if not isinstance(batch, Batch):
                raise ConfigError(
                    f"The data yield {type(batch).__name__}, but training data without a length "
                    "and items must yield capdistill.Batch. Give those, or a data set of "
                    "(image, captions)."
                )
            yield batch


def _count(batches: Iterable[Batch]) -> int:
    if isinstance(batches, Sized):
        with suppress(TypeError):  # a DataLoader is sized, unless its data set is a stream
            return len(batches)
    return sum(1 for _ in batches)


def require_unique_ids(ids: Iterable[str], where: str, seen: set[str] | None = None) -> None:
    """Reject an image id that occurs twice: results are kept by id, so one would be lost.

    Example:
        >>> seen = set()
        >>> require_unique_ids(["x", "y"], "val", seen)  # batch by batch
        >>> require_unique_ids(["z", "x"], "val", seen)
        Traceback (most recent call last):
        ...
        capdistill.errors.DataError: val: the image id 'x' occurs twice. Give each image its own id.

    Args:
        ids: Image ids.
        where: The name of the data.
        seen: The ids of earlier batches; these are added.

    Raises:
        DataError: an id occurs twice, or is in `seen`.
    """
    seen = set() if seen is None else seen
    for image_id in ids:
        if image_id in seen:
            raise DataError(
                f"{where}: the image id '{image_id}' occurs twice. Give each image its own id."
            )
        seen.add(image_id)
