"""Batches for training and evaluation: which images, which captions, in which order."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from capdistill.data.caption_files import DataReport, Policy
from capdistill.data.collate import BatchIndex, BatchResult, Collator, SupportsEncode
from capdistill.errors import ConfigError, DataError
from capdistill.outputs import Batch
from capdistill.runtime import generator
from capdistill.tokenizer import Tokenizer


class Loader:
    """Batches of images with k captions each. An epoch is every image once.

    Order, choice of captions and crops depend on (seed, epoch, image) alone, so that epoch n is
    the same with any number of workers and in any process (law 7). An image that cannot be read
    is left out and named in `skipped`; its batch is smaller, and a batch of nothing else is left
    out.

    Example:
        >>> from capdistill.data import sample
        >>> from capdistill.tokenizer import WordTokenizer
        >>> data = sample()
        >>> tokenizer = WordTokenizer.train(data.train.captions, min_count=2)
        >>> loader = Loader(data.val, tokenizer, image_size=32, batch_size=3)
        >>> [batch.num_images for batch in loader], loader.num_images
        ([3, 3, 2], 8)

    Args:
        data: A `CaptionData`, or any data set or sequence that yields (image, captions), where the
            image is anything that `read_image` takes and the captions are a string or several.
        tokenizer: What turns a caption into ids (`encode`, `pad_id`).
        image_size: Rows and columns of the images.
        batch_size: Images a batch.
        train: Shuffle, choose captions and crop by chance; else in order, the centre, references.
        captions_per_image: k. In training chosen without repetition while there are enough, and
            unless given the median number of captions of an image (of a data set without records
            that of the first usable image), at most 5; in evaluation the first k, unless given
            those of the first image, at most 5.
        seed: Another seed is another order.
        num_workers: Processes that read ahead; 0 reads in this one.
        flip: In training, mirror every other image.
        crop: In training, crop by chance; else the centre.
        cache_images: Keep the images in memory, at the size needed: in every worker its own, so
            best with num_workers=0. Random crops are then taken from the centred square.
        errors: "skip" or "raise", for an image that cannot be read.
        caches: Encoder fingerprint -> trunk tokens by image id; batches carry them in `cached`.
        with_images: False gives images of (I, 3, 0, 0) and opens no file of a `CaptionData`.
        max_length: Cut ids to this many tokens; default as the tokenizer gives them.
        views: How many views of an image the epochs take in turn: the centre, and random crops
            that are always the same. Each of `caches` is then a sequence, one store a view.
        view: Show this view in every epoch.
        start_method: How workers start: "fork", "spawn", "forkserver"; default Python's own.

    Raises:
        DataError: there is no image, or none that can be read.
        ConfigError: a number that cannot work.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: SupportsEncode,
        *,
        image_size: int,
        batch_size: int = 16,
        train: bool = False,
        captions_per_image: int | None = None,
        seed: int = 0,
        num_workers: int | None = 0,
        flip: bool = False,
        crop: bool = True,
        cache_images: bool = False,
        errors: Policy = "skip",
        caches: Mapping[str, Any] | None = None,
        with_images: bool = True,
        max_length: int | None = None,
        views: int = 1,
        view: int = 0,
        start_method: str | None = None,
    ) -> None:
        _at_least(1, image_size=image_size, batch_size=batch_size)
        _at_least(1, captions_per_image=captions_per_image, max_length=max_length)
        _at_least(0, num_workers=num_workers, view=view)
        _at_least(1, views=views)
        self.num_images = _length(data)
        self.batch_size, self.train, self.seed, self.num_workers = (
            batch_size,
            train,
            seed,
            num_workers or 0,
        )
        self.errors: Policy = DataReport(errors).errors
        self.skipped = DataReport()
        self._start_method = start_method
        self._pool: DataLoader[BatchResult] | None = None
        self._busy = False
        self.collator = Collator(
            data,
            tokenizer,
            image_size=image_size,
            train=train,
            captions_per_image=captions_per_image,
            seed=seed,
            flip=flip,
            crop=crop,
            cache_images=cache_images,
            caches=dict(caches or {}),
            with_images=with_images,
            max_length=max_length,
            views=views,
            view=view,
        )

    def __len__(self) -> int:
        """Batches an epoch, where every image can be read."""
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch n.

        Args:
            n: Which epoch; in training each has its own order, captions and crops.
            start: Leave out the batches before this one, without reading them.

        Raises:
            DataError: no image at all can be read, or one cannot and `errors` is "raise".
        """
        jobs = self._plan(n)[start:]
        seen = 0
        for batch, problems in self._made(jobs):
            for problem in problems:
                self.skipped.add(problem)
            if problems and self.errors == "raise":
                raise DataError(f"{problems[0]}. Mend it, or pass errors='skip' to leave it out.")
            if batch is not None:
                seen += 1
                yield batch
        if jobs and not seen and start == 0:
            raise DataError(f"None of the {self.num_images} images can be used.\n{self.skipped}")

    def _plan(self, epoch: int) -> list[BatchIndex]:
        order: list[int] = list(range(self.num_images))
        if self.train:
            rng = generator(self.seed, "order", epoch)
            order = torch.randperm(self.num_images, generator=rng).tolist()
        size = self.batch_size
        return [(epoch, tuple(order[i : i + size])) for i in range(0, len(order), size)]

    def _made(self, jobs: list[BatchIndex]) -> Iterator[BatchResult]:
        if self.num_workers == 0:
            yield from map(self.collator.__getitem__, jobs)
            return
        if self._busy:  # another epoch is under way in the pool
            yield from self._new_pool(jobs)
            return
        if self._pool is None:
            self._pool = self._new_pool(list[BatchIndex]())
        self._busy = True
        try:
            self._pool.sampler[:] = jobs  # type: ignore[index]
            yield from self._pool
        finally:
            self._busy = False

    def _new_pool(self, jobs: list[BatchIndex]) -> DataLoader[BatchResult]:
        """Workers that stay for all epochs; each job names its epoch."""
        return DataLoader(
            self.collator,
            batch_size=None,
            sampler=jobs,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_ctrl_c_to_the_main_process,
            persistent_workers=True,
            multiprocessing_context=self._start_method,
            generator=torch.Generator(),  # the global one stays as it is, as without workers
        )


def _as_it_is(made: Any) -> Any:
    return made


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that it can finish its step


def _length(data: Any) -> int:
    try:
        length = len(data)
        data.__getitem__  # noqa: B018
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"Loader: data is {type(data).__name__}; expected a CaptionData, or a data set or "
            "sequence with a length whose items are (image, captions)."
        ) from error
    if length == 0:
        raise DataError("Loader: the data set holds no image.")
    return length


def _at_least(least: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ConfigError(f"Loader: {name}={number} was given; it must be at least {least}.")


class Source(Protocol):
    """Epochs of batches."""

    @property
    def skipped(self) -> Any:
        """Images that could not be read, named."""

    def __len__(self) -> int:
        """Batches an epoch, at most."""

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch n; those before number `start` are not read."""


def skipped_images(source: Any) -> Sequence[Any]:
    """The images that a source left out so far; a source of your own may not keep them.

    Example:
        >>> skipped_images(object())
        ()
    """
    skipped: Sequence[Any] = getattr(source, "skipped", ())
    return skipped


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
    caches: Mapping[str, Any] | None = None,
    with_images: bool = True,
    **options: Any,
) -> Source:
    """What `fit` and `evaluate` take as data, as a source of epochs.

    Args:
        data: An object with `epoch(n, start)`, such as a `Loader`, which is used as it is; a data
            set or a torch Dataset of (image, captions); or an iterable of `Batch`.
        tokenizer: Makes the ids of the captions.
        image_size: Side in pixels of the images in a batch.
        caches: fingerprint -> cached trunk tokens by image id.
        with_images: Whether any model still reads pixels.
        options: Of `capdistill.data.Loader`.

    Raises:
        DataError: the data are empty.
        ConfigError: they are none of these.
    """
    if callable(getattr(data, "epoch", None)):
        return data  # type: ignore[no-any-return]
    if _has_items(data):
        return Loader(
            data,
            tokenizer,
            image_size=image_size,
            caches=caches or {},
            with_images=with_images,
            **options,
        )
    if isinstance(data, Iterable):
        return FixedBatches(data)
    raise ConfigError(
        f"{type(data).__name__} is no data. Give a capdistill data set, a torch Dataset that "
        "yields (image, captions), a Loader or another object with epoch(n, start), or an "
        "iterable of capdistill.Batch."
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
