"""The data of a run: sources of batches, and the cache of frozen features."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.collate import FeatureCache, open_features
from capdistill.data.loader import FixedBatches, Loader, Source, make_source
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError
from capdistill.files import user_path, write_atomically, write_text
from capdistill.outputs import Batch
from capdistill.runtime import autocast, evaluating
from capdistill.runtime import progress as report_progress
from capdistill.training.config import TrainConfig
from capdistill.training.step import Stepper
from capdistill.training.validation import add_references

AUTOMATIC_CACHE_BYTES = 4e9  # cache_features=None caches no more than this


def open_sources(stepper: Stepper, train: Any, val: Any = None) -> tuple[Source, Source | None]:
    """Sources of training and validation batches, with cached features if requested.

    Args:
        stepper: The trainer; its configuration and models decide how images are read.
        train: A data set, a source (anything with `epoch(n, start)`), or an iterable of batches.
        val: The same, or None.

    Raises:
        ConfigError: options that contradict each other or the data.
        DataError: no usable image.
    """
    config = stepper.config
    cached = wants_cache(stepper, train)
    crops = wants_crops(config, cached)
    options = {"seed": config.seed, "errors": config.errors, "cache_images": config.cache_images}
    training = _source(
        stepper,
        train,
        cached,
        **options,
        train=True,
        batch_size=config.batch_size,
        captions_per_image=config.captions_per_image,
        crop=crops,
        flip=config.flip,
    )
    _require_epochs(training)
    if val is None:
        return training, None
    val_options = {**options, "train": False, "batch_size": config.eval_batch_size}
    return training, _source(stepper, val, cached and not _is_source(val), **val_options)


def require_usable(stepper: Stepper, train: Source, val: Source | None) -> Batch:
    """Read a batch of each source, so that unusable data are reported before the first step.

    Returns:
        The first training batch.

    Raises:
        DataError: no image can be used.
        ConfigError: validation batches without references.
    """
    if val is not None:
        ready = isinstance(val, FixedBatches) and isinstance(val.batches, (list, tuple))
        found = list(val.epoch(0)) if ready else [_first_batch(val)]
        batches = [batch for batch in found if batch is not None]
        if not batches:
            raise DataError("No usable validation image: the data are empty.")
        references: dict[str, tuple[str, ...]] = {}
        for batch in batches:
            add_references(references, batch)
    first = _first_batch(train)
    if first is None:
        raise DataError("No usable training image: the data are empty.")
    return first


def close_workers(*sources: Source | None) -> None:
    """End the worker processes of sources; a later epoch starts them again."""
    for source in sources:
        if isinstance(source, Loader):
            source.close()


def _first_batch(source: Source) -> Batch | None:
    return source.first_batch() if isinstance(source, Loader) else next(iter(source.epoch(0)), None)


def number_of_batches(source: Source) -> int:
    """Batches per epoch. A source without a length is read once to count them."""
    if hasattr(source, "__len__"):
        return len(source)
    return sum(1 for _ in source.epoch(0))


def captions_per_image(source: Source, config: TrainConfig) -> int | None:
    """Captions of an image in one training batch, from the data if not from the options."""
    return source.collator.k if isinstance(source, Loader) else config.captions_per_image


def wants_crops(config: TrainConfig, cached: bool | None = None) -> bool:
    """Whether training images are cropped at random, differently in every epoch.

    Args:
        config: The options.
        cached: Whether features are cached; by default taken from the options.

    Raises:
        ConfigError: together with cached features, which hold a few views of an image only; or
            views that nothing would cache.
    """
    cached = bool(config.cache_features) if cached is None else cached
    if config.cache_views > 1 and (config.cache_images or not cached):
        raise ConfigError(
            f"cache_views={config.cache_views} are views of cached features, but cache_features="
            f"{config.cache_features} and cache_images={config.cache_images}. Set "
            "cache_features=True and cache_images=False, or cache_views=1."
        )
    if cached and config.cache_views == 1 and (config.augment or config.flip):
        raise ConfigError(
            "cache_features=True keeps one encoding per image, so it excludes random augmentation "
            f"(augment={config.augment}, flip={config.flip}). Set cache_views=4 to encode four "
            "views of each image, or augment=False and flip=False, or cache_features=False."
        )
    return not cached and config.augment is not False


def wants_cache(stepper: Stepper, data: Any) -> bool:
    """Whether this run caches features: by the options, or as the models and data allow.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> wants_cache(cd.Trainer(captioner, augment=True), cd.data.sample().train)
        False
    """
    config = stepper.config
    if config.cache_features is not None:
        return config.cache_features
    if config.cache_views > 1:
        return True
    if config.augment or config.flip or config.cache_images or not hasattr(data, "examples"):
        return False
    if not stepper.captioner.encoder.trunk_frozen:
        return False
    if not _is_cacheable(stepper.captioner, stepper.captioner):
        return False
    models: list[Any] = [m for m in stepper.models if _is_cacheable(m, stepper.captioner)]
    needed = sum(2 * model.encoder.tokens * model.encoder.token_dim for model in models)
    try:
        default_cache_dir() if config.cache_dir is None else config.cache_dir
    except ConfigError:
        return False
    return bool(needed * len(data) <= AUTOMATIC_CACHE_BYTES)


def _require_epochs(source: Source) -> None:
    try:
        inspect.signature(source.epoch).bind(0, 0)
    except TypeError as error:
        raise ConfigError(
            f"{type(source).__name__}.epoch cannot be called as epoch(n, start): {error}. It needs "
            "the number of the epoch and the first batch to give, which a resumed run skips to."
        ) from error
    except ValueError:
        return  # a function without a signature


def _is_source(data: Any) -> bool:
    return hasattr(data, "epoch")


def _source(stepper: Stepper, data: Any, cached: bool, **options: Any) -> Source:
    config, tokenizer = stepper.config, stepper.captioner.tokenizer
    size = image_size(*stepper.models)
    if not cached:
        return make_source(
            data, tokenizer, image_size=size, num_workers=config.num_workers, **options
        )
    frozen = [model for model in stepper.models if _is_cacheable(model, stepper.captioner)]
    views = config.cache_views if options["train"] else 1
    reads_images = len(frozen) < len(stepper.models)
    return make_source(
        data,
        tokenizer,
        image_size=size,
        caches=_caches(stepper, frozen, list(_views(stepper, data, views, size, options))),
        with_images=reads_images,
        num_workers=config.num_workers,
        **options,
        views=views,
    )


def _views(
    stepper: Stepper, data: Any, views: int, size: int, options: dict[str, Any]
) -> Iterator[tuple[Source, str]]:
    """A source of every view of the images, each once, with its part of the cache key."""
    config = stepper.config
    plain = {**options, "train": False, "batch_size": config.eval_batch_size}
    plain |= {"cache_images": False, "crop": False, "captions_per_image": 1}
    plain |= {"num_workers": config.num_workers}
    key = ""
    for view in range(views):
        source = make_source(data, stepper.captioner.tokenizer, image_size=size, view=view, **plain)
        if not isinstance(source, Loader):
            raise ConfigError(
                "cache_features=True needs a data set, but ready-made batches were given. Give "
                "the data set they come from, or set cache_features=False."
            )
        key = key or data_key(data, source, size)
        yield source, f"{key} view {view} flip {config.flip}" if view else key


def _is_cacheable(model: Any, trained: Captioner) -> bool:
    """Whether it has stages that no step of this run changes; a teacher's are never changed."""
    return isinstance(model, Captioner) and (
        model.encoder.cache_key(trained=model is trained) is not None
    )


def _caches(
    stepper: Stepper, models: list[Any], views: list[tuple[Source, str]]
) -> dict[str, FeatureCache | list[FeatureCache]]:
    """Cached features by fingerprint; with several views, one cache per view."""
    given = stepper.config.cache_dir
    directory = default_cache_dir() if given is None else user_path(given)
    if not models:
        raise ConfigError(
            "cache_features=True but no encoder has frozen stages that can be cached. Create "
            "it with trainable='none' or a number of last stages, or set cache_features=False."
        )
    caches: dict[str, FeatureCache | list[FeatureCache]] = {}
    for model in models:
        encoder = model.encoder.to(stepper.device)
        trained = model is stepper.captioner
        key = encoder.cache_key(trained)
        if key not in caches:
            show = stepper.config.progress is not False
            made = [
                cache_trunk(encoder, *view, directory, stepper.precision, show, trained)
                for view in views
            ]
            caches[key] = made if len(made) > 1 else made[0]
    return caches


_FORMAT = "capdistill.features/1"


def default_cache_dir() -> Path:
    """The default directory of cached features, in the user's cache directory.

    Raises:
        ConfigError: there is no home directory.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:  # HOME is not set and the user has no entry
        raise ConfigError(
            "Cached features need a directory, but this user has no home directory. Give "
            "cache_dir=, or set cache_features=False."
        ) from error
    return home / "capdistill" / "features"


def cache_trunk(
    encoder: Encoder,
    source: Source,
    data_key: str,
    directory: Path,
    precision: str,
    progress: bool = False,
    trained: bool = True,
) -> FeatureCache:
    """Encode every image of a source once, or open what an earlier run wrote.

    Args:
        encoder: Has frozen stages.
        source: Batches of images without augmentation.
        data_key: Identifies the images and their size; with the encoder's `cache_key` it is the
            key.
        directory: Directory of the memory maps.
        precision: Precision of the forward passes.
        progress: Show progress: a bar on a terminal, occasional lines elsewhere.
        trained: Whether the encoder's other stages are trained; otherwise its whole trunk is
            cached.

    Raises:
        ConfigError: the directory cannot be written, or tokens do not fit in float16.
    """
    about = f"{encoder.cache_key(trained)} {data_key} {precision}"
    path = directory / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.f16"
    return _open_cache(path) or _write_cache(encoder, source, path, precision, progress, trained)


def _open_cache(path: Path) -> FeatureCache | None:
    """The cache that an earlier run wrote, if it is complete."""
    try:
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        ids, shape = index["image_ids"], (len(index["image_ids"]), *index["shape"])
        whole = index["format"] == _FORMAT and path.stat().st_size == 2 * int(np.prod(shape))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return FeatureCache(open_features(path, shape), ids) if whole else None


def _write_cache(
    encoder: Encoder, source: Source, path: Path, precision: str, progress: bool, trained: bool
) -> FeatureCache:
    """Write the tokens, then the index, which makes them valid."""
    index: dict[str, Any] = {"format": _FORMAT, "image_ids": [], "shape": []}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            values = _encoded(encoder, source, precision, trained)
            for ids, tokens in report_progress(
                values, len(source), "Caching features", unit="batch", show=progress
            ):
                index["image_ids"] += ids
                index["shape"] = tokens.shape[1:]
                file.write(tokens.tobytes())

    try:
        write_atomically(path, write)
        write_text(path.with_suffix(".json"), json.dumps(index))
    except ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ConfigError(f"{error} cache_dir= sets where features are cached.") from error
    return FeatureCache(
        open_features(path, (len(index["image_ids"]), *index["shape"])), index["image_ids"]
    )


def _encoded(
    encoder: Encoder, source: Source, precision: str, trained: bool
) -> Iterator[tuple[tuple[str, ...], np.ndarray[Any, Any]]]:
    """Ids and float16 values (I, ...) of every readable image."""
    device = next(encoder.parameters()).device
    for batch in source.epoch(0):
        with evaluating(encoder), torch.no_grad(), autocast(device, precision):
            tokens = encoder.to_cache(batch.images.to(device), trained).half()
        finite = tokens.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            names = [batch.image_ids[i] for i in bad]
            raise ConfigError(
                f"cache_features=True keeps tokens as float16, but those of {', '.join(names[:5])} "
                "are NaN or larger than 65504. Set cache_features=False for this encoder."
            )
        yield batch.image_ids, tokens.cpu().numpy()


def data_key(data: Any, source: Source, image_size: int) -> str:
    """A key for the images of a data set, at a size in pixels.

    Files are known by name, size and modification time. Images of any other data set are read and
    hashed.
    """
    digest = hashlib.sha256(str(image_size).encode())
    examples = getattr(data, "examples", None)
    if examples is None:
        for batch in source.epoch(0):
            digest.update(f"{batch.image_ids}".encode())
            digest.update(batch.images.contiguous().numpy().data)
        return digest.hexdigest()
    for example in examples:
        path = Path(example.path)
        status = path.stat() if path.exists() else None
        stamp = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(f"{example.image_id} {path.absolute()} {stamp}\n".encode())
    return digest.hexdigest()
