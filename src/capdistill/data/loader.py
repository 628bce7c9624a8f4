"""Batches for training and evaluation: which images, which captions, in which order."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from capdistill.data.caption_files import FIX, DataReport, Policy, pluralize
from capdistill.data.collate import BatchIndex, BatchResult, Collator, SupportsEncode
from capdistill.data.curriculum import Curriculum
from capdistill.data.dataset import Splits
from capdistill.data.rows import accept_rows
from capdistill.data.source import FixedBatches, Source
from capdistill.data.workers import default_num_workers, end, read_ahead, worker_pool
from capdistill.errors import ConfigError, DataError, require_int
from capdistill.outputs import Batch
from capdistill.runtime import generator
from capdistill.tokenizer import Tokenizer


class Loader:
    """Batches of images with k captions each. An epoch is every image once.

    Order, choice of captions and crops depend on (seed, epoch, image) alone: epoch n is the same
    with any number of workers and in any process. An image that cannot be read is left out and
    named in `skipped`. Its batch is smaller; a batch without any image is left out.

    Example:
        >>> from capdistill.data import sample
        >>> from capdistill.tokenizer import WordTokenizer
        >>> data = sample()
        >>> tokenizer = WordTokenizer.train(data.train.captions, min_count=2)
        >>> loader = Loader(data.val, tokenizer, image_size=32, batch_size=3)
        >>> [batch.num_images for batch in loader], loader.num_images
        ([3, 3, 2], 8)
        >>> loader
        <Loader 8 images at 32 px, 3 batches of 3, in order, num_workers=0>

    Args:
        data: A `CaptionData`, a Hugging Face data set, or any data set or sequence of (image,
            captions) pairs: whatever `read_image` takes, and a string or list of strings. It may
            have unique `image_ids`.
        tokenizer: Turns a caption into ids (`encode`, `pad_id`).
        image_size: Rows and columns of the images.
        batch_size: Images per batch.
        train: Shuffle, sample captions and crop at random. Otherwise images come in order, centred
            and with their references.
        captions_per_image: k. In training, sampled without repetition while there are enough; by
            default the median number of captions per image, at most 5 (of a data set without
            records, that of its first usable image). In evaluation the first k; by default as
            many as the first image has, at most 5.
        seed: Another seed gives another order, other captions and other crops.
        num_workers: Processes that read ahead; 0 reads in this process; None decides by
            `default_num_workers`.
        flip: In training, mirror every other image.
        crop: In training, crop at random; otherwise take the centre.
        cache_images: Keep the images in memory at the size needed. Every worker keeps its own, so
            num_workers=0 suits it best. Random crops are then taken from the centred square.
        errors: "skip" or "raise", for an image or item that cannot be used.
        caches: Encoder fingerprint -> trunk tokens by image id; batches carry them in `cached`.
        with_images: False gives images of (I, 3, 0, 0) and opens no file of a `CaptionData`.
        max_length: Cut ids to this many tokens; by default as the tokenizer gives them.
        views: The number of views of an image that the epochs show in turn: the centre, and fixed
            random crops. Each of `caches` is then a sequence with one cache per view.
        view: Show this view in every epoch.
        epochs: Epochs of the whole run, which a `Curriculum` spreads its images over.
        start_method: How workers start: "fork", "spawn" or "forkserver"; by default Python's own.

    Raises:
        DataError: there is no image; ids that occur twice.
        ConfigError: a number out of range.
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
        epochs: int | None = None,
        start_method: str | None = None,
    ) -> None:
        require_int("Loader: batch_size", batch_size, 1)
        _require_between(1, 10_000, image_size=image_size, views=views)
        _require_between(1, 10_000, captions_per_image=captions_per_image, max_length=max_length)
        _require_between(0, 10_000, num_workers=num_workers, view=view)
        _require_between(1, 2**31, epochs=epochs)
        data = accept_rows(data)
        self.num_images = _length(data)
        self.curriculum = data if isinstance(data, Curriculum) and train else None
        self.epochs = 0 if self.curriculum is None else self.curriculum.require_epochs(epochs)
        data = data.data if isinstance(data, Curriculum) else data
        self.batch_size, self.train, self.seed = batch_size, train, seed
        self.errors, self.skipped = DataReport(errors).errors, DataReport()
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
        self._start_method, self._flip = start_method, flip
        if num_workers is None and with_images and not cache_images:
            num_workers = default_num_workers(data, batch_size, start_method=start_method)
        self.num_workers = num_workers or 0
        self._pool: DataLoader[BatchResult] | None = None
        self._busy = False
        self.rank, self.world_size = 0, 1

    def for_rank(self, rank: int, world_size: int) -> Loader:
        """The same images in the same order, of which each rank reads its part of every batch.

        `batch_size` is then that of a rank: batch i of all ranks together is batch i of a single
        loader of `batch_size * world_size`. Where images are left over, the parts are about equal.

        Args:
            rank: Number of this process.
            world_size: Number of processes that share the images.
        """
        mine = copy.copy(self)
        mine.rank, mine.world_size, mine._pool, mine._busy = rank, world_size, None, False
        return mine

    def in_views(self, views: Sequence[int]) -> Loader:
        """The same images, decoded once and shown in several views.

        Args:
            views: A batch of I images has all of them in the first view, then all in the second.
        """
        mine = self.for_rank(self.rank, self.world_size)
        mine.collator = copy.copy(self.collator)
        mine.collator.together = tuple(views)
        mine.collator.flip = self._flip and any(views)
        return mine

    @property
    def data(self) -> Any:
        """The data set that is read; within a `Curriculum`, the one that it orders."""
        return self.collator.data

    @property
    def has_caches(self) -> bool:
        """Whether its batches carry cached features."""
        return bool(self.collator.caches)

    def __len__(self) -> int:
        """Batches per epoch if every image can be read."""
        return -(-self.num_images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def __repr__(self) -> str:
        order = "shuffled" if self.train else "in order"
        order += f", part {self.rank + 1} of {self.world_size}" if self.world_size > 1 else ""
        return (
            f"<Loader {pluralize(self.num_images, 'image')} at {self.collator.image_size} px, "
            f"{len(self)} batches of {self.batch_size}, {order}, num_workers={self.num_workers}>"
        )

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch n.

        Args:
            n: The epoch. In training each has its own order, captions and crops.
            start: Leave out the batches before this one, without reading them.

        Raises:
            DataError: no image at all can be used, or one cannot and `errors` is "raise". Its
                cause is the error that a data set or transform raised.
            ConfigError: workers that are not forked need a data set that can be pickled.
        """
        return (batch for batch in self.numbered(n, start) if batch is not None)

    def numbered(self, n: int, start: int = 0) -> Iterator[Batch | None]:
        """As `epoch`, with None in the place of a batch of which no image can be used.

        Batch i is the same whatever cannot be read, and all ranks have equally many.
        """
        indices = self._batch_indices(n)[start:]
        seen, first_cause = 0, None
        for batch, _, cause in self.read(indices):
            first_cause = first_cause or cause
            seen += batch is not None
            yield batch
        if indices and not seen and start == 0 and self.world_size == 1:
            none = f"None of the {self.num_images} images can be used."
            raise DataError(f"{none}\n{self.skipped}") from first_cause

    def read(self, indices: list[BatchIndex]) -> Iterator[BatchResult]:
        """One result for each index (epoch and numbers of images); problems are recorded."""
        for result in self._results(indices):
            for problem in result.problems:
                self.skipped.add(problem)
            if result.problems and self.errors == "raise":
                self.close()  # the error may be kept, and with it what it refers to
                raise DataError(f"{result.problems[0]}. {FIX}") from result.cause
            yield result

    def first_batch(self) -> Batch | None:
        """The first usable batch of epoch 0, read in this process: no worker is started."""
        workers, self.num_workers = self.num_workers, 0
        try:
            return next(self.epoch(0), None)
        finally:
            self.num_workers = workers

    def close(self) -> None:
        """Stop the workers. The next epoch starts new ones."""
        pool, self._pool = self._pool, None
        end(pool)

    def _batch_indices(self, epoch: int) -> list[BatchIndex]:
        order = list(range(self.num_images))
        if self.curriculum is not None:
            order = self.curriculum.order(self.seed, epoch, self.epochs)
        elif self.train:
            rng = generator(self.seed, "order", epoch)
            order = torch.randperm(self.num_images, generator=rng, device="cpu").tolist()
        size = self.batch_size * self.world_size
        whole = (order[i : i + size] for i in range(0, len(order), size))
        return [(epoch, self._part(numbers)) for numbers in whole]

    def _part(self, numbers: list[int]) -> tuple[int, ...]:
        """What this rank reads of the images of a batch; nothing, where they are few."""
        each = -(-len(numbers) // self.world_size)
        return tuple(numbers[self.rank * each : (self.rank + 1) * each])

    def _results(self, indices: list[BatchIndex]) -> Iterator[BatchResult]:
        if self.num_workers == 0:
            yield from map(self.collator.__getitem__, indices)
            return
        if self._busy:  # another epoch is being read by the workers
            pool = self._new_pool(indices)
            try:
                yield from read_ahead(pool)
            finally:
                end(pool)
            return
        if self._pool is None:
            self._pool = self._new_pool([])
        self._busy = True
        try:
            self._pool.sampler[:] = indices  # type: ignore[index]
            yield from read_ahead(self._pool)
        finally:
            self._busy = False

    def _new_pool(self, indices: list[BatchIndex]) -> DataLoader[BatchResult]:
        return worker_pool(self.collator, [*indices], self.num_workers, self._start_method)


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


def _require_between(minimum: int, maximum: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None:
            require_int(f"Loader: {name}", number, minimum, maximum)


def make_source(data: Any, tokenizer: Tokenizer, *, image_size: int, **options: Any) -> Source:
    """What `fit` and `evaluate` take as data, as a source of epochs.

    Args:
        data: An object with `epoch(n, start)`, such as a `Loader`, which is used as it is; a data
            set or a torch Dataset of (image, captions); or an iterable of `Batch`.
        tokenizer: Makes the ids of the captions.
        image_size: Side in pixels of the images in a batch.
        options: Options of `Loader`, for a data set.

    Raises:
        DataError: the data are empty.
        ConfigError: they are none of these, or a `Loader` to train on with another vocabulary.
    """
    if isinstance(data, Splits):
        raise ConfigError(
            "Splits, a whole data set, was given as data. Give one of its splits: data.train to "
            "train on, data.val to validate on."
        )
    if isinstance(data, Loader) and "train" in options:  # evaluation reads references, not ids
        _require_vocabulary(data.collator.tokenizer, tokenizer)
    if callable(getattr(data, "epoch", None)):
        return data  # type: ignore[no-any-return]
    if not isinstance(data, (str, bytes, os.PathLike, Mapping)):
        if has_items(data):
            return Loader(data, tokenizer, image_size=image_size, **options)
        if isinstance(data, Iterable):
            return FixedBatches(data)
    raise ConfigError(
        f"{type(data).__name__} is not a data set. Give a capdistill data set, a torch Dataset "
        "that yields (image, captions), a Loader or another object with epoch(n, start), or an "
        "iterable of capdistill.Batch."
    )


def _require_vocabulary(given: Any, expected: Any) -> None:
    ours, theirs = (getattr(each, "vocabulary", None) for each in (expected, given))
    if ours is not None and theirs is not None and list(ours) != list(theirs):
        raise ConfigError(
            f"The Loader encodes captions with another vocabulary ({len(theirs)} entries) than the "
            f"model's ({len(ours)}). Make it with the model's tokenizer."
        )


def has_items(data: Any) -> bool:
    """Whether these are items (image, captions) by number, not ready-made batches."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    if not hasattr(data, "__getitem__"):
        return False
    try:
        return not isinstance(data[0], Batch)
    except Exception:  # an empty list, or a first item that will be skipped
        return not isinstance(data, (list, tuple))
