"""The data of a run: sources of batches, with cached features if requested."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.collate import FeatureCache
from capdistill.data.dataset import CaptionData
from capdistill.data.loader import Loader, has_items, make_source
from capdistill.data.rows import accept_rows
from capdistill.data.source import FixedBatches, Source, require_batches
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError, shortened
from capdistill.feature_cache import (
    Wanted,
    cache_trunks,
    data_key,
    keeps_frozen_stages,
)
from capdistill.feature_files import CacheEntry, default_cache_dir, list_caches
from capdistill.files import user_path
from capdistill.outputs import Batch
from capdistill.runtime import autocast, evaluating
from capdistill.teachers.cached import CachedTeacher, cached_parts
from capdistill.teachers.ensemble import leaves
from capdistill.teachers.mean_teacher import MeanTeacher
from capdistill.training.config import TrainConfig
from capdistill.training.distributed import decisive_options, tensors_of
from capdistill.training.monitor import LOSS
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
    require_batches(training=train, validation=val)
    if stepper.ranks.several:  # before they wait for each other
        stepper.ranks.require_equal(decisive_options(config))
    calibrate(stepper, train)
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
        epochs=config.epochs,
    )
    _require_epochs(training)
    if val is None:
        return training, None
    val_options = {**options, "train": False, "batch_size": config.eval_batch_size}
    cached = cached and not _is_source(val) and has_items(val)  # batches are taken as they are
    return training, _source(stepper, val, cached, **val_options)


CALIBRATION_IMAGES = 64


def calibrate(stepper: Stepper, train: Any) -> None:
    """Set the ranges of fake quantization by the first images, unless they are known.

    Frozen stages keep them, so that their rounded output can be cached.
    """
    quantizer, config = stepper.objective.quantizer, stepper.config
    if quantizer is None or quantizer.complete:
        return None if quantizer is None else quantizer.refresh()
    options = {"seed": config.seed, "errors": config.errors, "batch_size": 16}
    options |= {"train": False, "crop": False, "captions_per_image": 1, "num_workers": 0}
    size, images = image_size(*stepper.models), 0
    source = make_source(train, stepper.captioner.tokenizer, image_size=size, **options)
    with evaluating(stepper.captioner), quantizer.calibrating():
        for batch in source.epoch(0):
            with autocast(stepper.device, stepper.precision):
                stepper.captioner.encode(batch.to(stepper.device))
            images += batch.num_images
            if images >= CALIBRATION_IMAGES:
                break
    close_workers(source)
    stepper.ranks.share([quantizer.ranges])
    quantizer.refresh()


def cache_features(stepper: Stepper, train: Any, val: Any = None) -> list[CacheEntry]:
    """Encode the images that `fit(train, val, cache_features=True)` encodes, before it is called.

    Example:
        >>> import capdistill as cd, tempfile
        >>> data = cd.data.sample().val
        >>> tokenizer = cd.WordTokenizer.train(data.captions, min_count=2)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> options = {"cache_dir": tempfile.mkdtemp(), "progress": False}
        >>> [entry] = cache_features(cd.Trainer(student, **options), data)
        >>> entry.images, entry.done
        (8, 8)

    Args:
        stepper: The trainer; its configuration and models decide what is cached.
        train, val: Data as for `fit`.

    Returns:
        The caches: those that were written, and those that were there.

    Raises:
        ConfigError: nothing can be cached, as `fit` would say.
    """
    if not isinstance(stepper, Stepper):
        raise ConfigError(f"cache_features: {shortened(stepper)} was given; expected a trainer.")
    before, ranks = stepper.config, stepper.ranks
    options = {"cache_features": True}
    stepper.config = stepper.config_class.resolve(before, options, "cache_features")
    try:
        with ranks.failing_together():
            ranks.join(stepper.device)
            ranks.share(tensors_of(stepper.objective))
            sources = open_sources(stepper, accept_rows(train), accept_rows(val))
    finally:
        stepper.config = before
    close_workers(*sources)
    files: set[Path] = set()
    for source in sources:
        caches = source.collator.caches.values() if isinstance(source, Loader) else ()
        for views in caches:
            each = views if isinstance(views, list) else [views]
            files.update(Path(cache.tokens.filename).resolve() for cache in each)
    listed = list_caches(cache_directory(before))
    return [entry for entry in listed if entry.path.resolve() in files]


def require_usable(stepper: Stepper, train: Source, val: Source | None) -> Batch:
    """Read a batch of each source, so that unusable data are reported before the first step.

    Returns:
        The first training batch.

    Raises:
        DataError: no image can be used.
        ConfigError: validation batches without references, or cached targets of other views.
    """
    show = stepper.config.progress is not False
    for cached in [part for model in stepper.models for part in cached_parts(model)]:
        for source in (train, val):
            stepper.ranks.on_main(cached.require, source, show)
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
    require_captions(stepper, first, train, val)
    return first


def require_captions(stepper: Stepper, first: Batch, train: Source, val: Source | None) -> None:
    """Refuse terms and scores that read captions if no image has any.

    Args:
        stepper: The trainer.
        first: A training batch.
        train, val: The sources.

    Raises:
        ConfigError: there is such a term or score; the message says what to do.
    """
    if _without_captions(train):
        counts = stepper.objective.counts(stepper.prepare_batch(first))
        without = [name for name, count in counts.items() if not count]
        if getattr(stepper.config, "samples_on_policy", False):  # its share may begin at 0
            without = [name for name in without if name == "ce"]
        if without:
            raise ConfigError(
                f"The training images have no captions, but these terms read them: "
                f"{', '.join(without)}. Use losses on images alone, such as Distiller(..., losses="
                '{"feature": {"name": "feature", "match": "pooled"}}, weights={"ce": 0}), or let a '
                "teacher caption the images: cd.teachers.caption(teacher, data, path)."
            )
    monitor = stepper.make_monitor().name
    if val is not None and monitor != LOSS and _without_captions(val):
        raise ConfigError(
            f"The validation images have no captions to score against, but monitor='{monitor}' "
            "chooses the best epoch by such a score. Set monitor='loss'."
        )


def _without_captions(source: Source) -> bool:
    data = source.data if isinstance(source, Loader) else None
    return isinstance(data, CaptionData) and not any(e.captions for e in data.examples)


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
    models = [m for m in captioners(stepper) if _is_cacheable(m, stepper.captioner)]
    needed = sum(_cached_bytes(model.encoder) for model in models)
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
    models = captioners(stepper)
    frozen = [model for model in models if _is_cacheable(model, stepper.captioner)]
    views = config.cache_views if options["train"] else 1
    reads_images = len(frozen) < len(models)
    return make_source(
        data,
        tokenizer,
        image_size=size,
        caches=_caches(stepper, frozen, views, *_plain_source(stepper, data, size, options)),
        with_images=reads_images,
        num_workers=config.num_workers,
        **options,
        views=views,
    )


def _plain_source(
    stepper: Stepper, data: Any, size: int, options: dict[str, Any]
) -> tuple[Loader, str]:
    """A source of the images, each once and as it is, and the part of the cache key for them."""
    config = stepper.config
    plain = {**options, "train": False, "batch_size": config.eval_batch_size}
    plain |= {"cache_images": False, "crop": False, "captions_per_image": 1}
    plain |= {"num_workers": config.num_workers}
    source = make_source(data, stepper.captioner.tokenizer, image_size=size, **plain)
    if not isinstance(source, Loader):
        raise ConfigError(
            "cache_features=True needs a data set, but ready-made batches were given. Give "
            "the data set they come from, or set cache_features=False."
        )
    where, show = cache_directory(config), config.progress is not False
    return source, stepper.ranks.on_main(data_key, data, source, size, where, show)


def is_changed(model: Any, trained: Captioner) -> bool:
    """Whether steps change a model: the one that is trained, or a teacher that follows it."""
    return model is trained or isinstance(model, MeanTeacher)


def captioners(stepper: Stepper) -> list[Any]:
    """The models that read images, with the members of an ensemble in its place."""
    parts = [leaf for model in stepper.models for leaf in leaves(model)]
    return [part for part in parts if not isinstance(part, CachedTeacher)]


def _is_cacheable(model: Any, trained: Captioner) -> bool:
    """Whether it has stages that no step of this run changes."""
    return isinstance(model, Captioner) and (
        model.encoder.cache_key(is_changed(model, trained)) is not None
    )


def _cached_bytes(encoder: Encoder) -> int:
    """Bytes per image: 2 per value of its trunk's tokens, or of the map that is cached instead."""
    if not keeps_frozen_stages(encoder):
        return 2 * encoder.tokens * encoder.token_dim
    side, device = encoder.image_size, next(encoder.parameters()).device
    black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    with evaluating(encoder), torch.no_grad():
        return 2 * encoder.to_cache(black).numel()


def cache_directory(config: TrainConfig) -> Path:
    """The directory of cached features."""
    return default_cache_dir() if config.cache_dir is None else user_path(config.cache_dir)


def _caches(
    stepper: Stepper, models: list[Any], views: int, source: Loader, key: str
) -> dict[str, FeatureCache | list[FeatureCache]]:
    """Cached features by fingerprint; with several views, one cache per view."""
    config = stepper.config
    if not models:
        raise ConfigError(
            "cache_features=True but no encoder has frozen stages that can be cached. Create "
            "it with trainable='none' or a number of last stages, or set cache_features=False."
        )
    keys = [key, *(f"{key} view {view} flip {config.flip}" for view in range(1, views))]
    wanted: dict[str, list[Wanted]] = {}
    for model in models:
        encoder = model.encoder.to(stepper.device)
        trained = keeps_frozen_stages(encoder, is_changed(model, stepper.captioner))
        of_views = [Wanted(encoder, each, view, trained) for view, each in enumerate(keys)]
        wanted.setdefault(encoder.cache_key(trained), of_views)
    made = iter(
        cache_trunks(
            [each for group in wanted.values() for each in group],
            source,
            cache_directory(config),
            stepper.precision,
            progress=config.progress is not False,
            dtype=config.cache_dtype,
            ranks=stepper.ranks,
        )
    )
    caches = {name: [next(made) for _ in group] for name, group in wanted.items()}
    return {name: each if views > 1 else each[0] for name, each in caches.items()}
