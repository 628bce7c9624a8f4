"""What `fit` and `evaluate` accept, made into one thing: epochs of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

from torch.utils.data import Dataset

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

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches of epoch n."""


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
        self.length = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
        if not self.length:
            raise DataError("There is no batch in the data. Give at least one.")

    def __len__(self) -> int:
        return self.length

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches, in their order."""
        return iter(self.batches)


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

    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not _holds_batches(data)):
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


def _holds_batches(data: Any) -> bool:
    try:
        return isinstance(data[0], Batch)
    except (LookupError, TypeError):
        return isinstance(data, (list, tuple))
