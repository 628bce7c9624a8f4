"""What `fit` and `evaluate` accept, made into one thing: epochs of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import Dataset, IterableDataset

from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.tokenizer import Tokenizer


class Source(Protocol):
    """Epochs of batches."""

    @property
    def skipped(self) -> Any:
        """Images that could not be read, named."""

    def __len__(self) -> int:
        """Batches an epoch, at most."""

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch n; those before number `start` are not read."""


class FixedBatches:
    """Batches that the user made, the same in every epoch.

    Args:
        batches: Anything that can be iterated again and again.

    Raises:
        ConfigError: a one-shot iterator, which the second epoch would find empty.
        DataError: no batch at all.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, batches: Iterable[Batch]) -> None:
        if iter(batches) is batches:
            raise ConfigError(
                "The batches come from a one-shot iterator, which the second epoch would find "
                "empty. Give a list, or an object whose __iter__ starts anew."
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
            ConfigError: one of them is no `Batch`.
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


def make_source(
    data: Any,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    stores: Mapping[str, Any] | None = None,
    with_images: bool = True,
    **options: Any,
) -> Source:
    """A data set, a torch Dataset of (image, captions), or an iterable of `Batch` to a source.

    Args:
        data: One of these.
        tokenizer: Makes the ids of the captions.
        image_size: Side in pixels of the images in a batch.
        stores: fingerprint -> cached trunk tokens by image id.
        with_images: Whether any model still reads pixels.
        options: Of `capdistill.data.Loader`.

    Raises:
        DataError: the data are empty.
        ConfigError: they are none of these.
    """
    from capdistill.data import Loader

    if _has_items(data):
        return Loader(
            data,
            tokenizer,
            image_size=image_size,
            stores=stores or {},
            with_images=with_images,
            **options,
        )
    if isinstance(data, Iterable):
        return FixedBatches(data)
    raise ConfigError(
        f"{type(data).__name__} is no data. Give a capdistill data set, a torch Dataset that "
        "yields (image, captions), or an iterable of capdistill.Batch."
    )


def _has_items(data: Any) -> bool:
    """Whether these are (image, captions) by number, rather than ready-made batches."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    return hasattr(data, "__getitem__") and not _holds_batches(data)


def _holds_batches(data: Any) -> bool:
    try:
        return isinstance(data[0], Batch)
    except (LookupError, TypeError):
        return isinstance(data, (list, tuple))
