"""What a run needs around its steps: sources of batches, cached features, its description."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.loader import FixedBatches, Loader, Source, make_source
from capdistill.errors import ConfigError, DataError
from capdistill.files import write_text
from capdistill.registry import stamp_of
from capdistill.training.config import TrainConfig
from capdistill.training.features import TrunkStore, cache_trunk, data_key, default_cache_dir
from capdistill.training.validation import require_references

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


LIBRARIES = ("capdistill", "torch", "torchvision", "timm", "numpy", "pydantic", "nltk")


def prepare_sources(trainer: Trainer, train: Any, val: Any) -> tuple[Source, Source | None]:
    """Sources of training and validation batches, with cached features where asked for."""
    crops = wants_crops(trainer.config)
    options: dict[str, Any] = {"workers": trainer.config.workers, "seed": trainer.config.seed}
    options |= {"errors": trainer.config.errors, "cache_images": trainer.config.cache_images}
    training = _source(
        trainer,
        train,
        **options,
        train=True,
        batch_size=trainer.config.batch_size,
        captions_per_image=trainer.config.captions_per_image,
        crop=crops,
        flip=trainer.config.flip,
    )
    _record_captions(trainer, training)
    if val is None:
        return training, None
    size = trainer.config.eval_batch_size
    return training, _source(trainer, val, **options, train=False, batch_size=size)


def _record_captions(trainer: Trainer, source: Source) -> None:
    """The number that the data decided goes into what is written of the run."""
    if trainer.config.captions_per_image is None and isinstance(source, Loader):
        k = source.assembler.k
        trainer.config = trainer.config.model_copy(update={"captions_per_image": k})
        trainer.config.model_fields_set.discard("captions_per_image")  # other data decide anew


def require_usable(trainer: Trainer) -> None:
    """Read a batch of each source: what can not be used is said before the first step.

    Raises:
        DataError: no image can be used.
        ConfigError: validation batches without references.
    """
    assert trainer.train_source is not None
    if trainer.val_source is not None:
        batch = next(trainer.val_source.epoch(0), None)
        if batch is None:
            raise DataError("No usable validation image: the data are empty.")
        require_references(batch)
    trainer._prepare(next(trainer.train_source.epoch(0), None))


def wants_crops(config: TrainConfig) -> bool:
    """Whether training images are cropped at random, anew in every epoch.

    Raises:
        ConfigError: together with cached features, which know a few views of an image only; or
            views that nothing would cache.
    """
    if config.cache_views > 1 and (config.cache_images or not config.cache_features):
        raise ConfigError(
            f"cache_views={config.cache_views} are views of cached features, but cache_features="
            f"{config.cache_features} and cache_images={config.cache_images}. Set "
            "cache_features=True and cache_images=False, or cache_views=1."
        )
    if config.cache_features and config.cache_views == 1 and (config.augment or config.flip):
        raise ConfigError(
            "cache_features=True keeps one encoding an image, so it can not go with random "
            f"augmentation (augment={config.augment}, flip={config.flip}). Set cache_views=4 to "
            "encode four views of each, or augment=False and flip=False, or cache_features=False."
        )
    if config.cache_features:
        return False
    return config.augment is not False


def _source(trainer: Trainer, data: Any, **options: Any) -> Source:
    tokenizer, size = trainer.captioner.tokenizer, image_size(trainer.models)
    if not trainer.config.cache_features:
        return make_source(data, tokenizer, image_size=size, **options)
    frozen = [model for model in trainer.models if _is_cacheable(model, trainer.captioner)]
    views = trainer.config.cache_views if options["train"] else 1
    return make_source(
        data,
        tokenizer,
        image_size=size,
        stores=_stores(trainer, frozen, list(_views(trainer, data, views, size, options))),
        with_images=len(frozen) < len(trainer.models),
        **options,
        views=views,
    )


def _views(
    trainer: Trainer, data: Any, views: int, size: int, options: dict[str, Any]
) -> Iterator[tuple[Source, str]]:
    """A source of every view of the images, each once, with what stands for it in the cache."""
    plain = {**options, "train": False, "batch_size": trainer.config.eval_batch_size}
    plain |= {"cache_images": False, "crop": False, "captions_per_image": 1}
    key = ""
    for view in range(views):
        source = make_source(data, trainer.captioner.tokenizer, image_size=size, view=view, **plain)
        if isinstance(source, FixedBatches):
            raise ConfigError("cache_features=True needs a data set; these are ready-made batches.")
        key = key or data_key(data, source, size)
        yield source, f"{key} view {view} flip {trainer.config.flip}" if view else key


def _is_cacheable(model: Any, trained: Captioner) -> bool:
    """Whether no step of this run changes the trunk: a teacher's never changes."""
    if not isinstance(model, Captioner) or model.encoder.fingerprint() is None:
        return False
    return model is not trained or model.encoder.trunk_frozen


def _stores(
    trainer: Trainer, models: list[Any], views: list[tuple[Source, str]]
) -> dict[str, TrunkStore | list[TrunkStore]]:
    """Trunk tokens by fingerprint; one store a view where there are several."""
    directory = Path(trainer.config.cache_dir or default_cache_dir())
    if not models:
        raise ConfigError(
            "cache_features=True but no model has a frozen trunk with a fingerprint(). Create the "
            "encoder with trainable='none', or set cache_features=False."
        )
    stores: dict[str, TrunkStore | list[TrunkStore]] = {}
    for model in models:
        encoder = model.encoder.to(trainer.device)
        trunk = encoder.fingerprint()
        if trunk not in stores:
            made = [cache_trunk(encoder, *view, directory, trainer.precision) for view in views]
            stores[trunk] = made if len(made) > 1 else made[0]
    return stores


def describe_run(trainer: Trainer, out: Path) -> None:
    """Write run.json: resolved options, models, weights of the terms, versions and seed."""
    content = {
        "format": "capdistill.run/1",
        "trainer": type(trainer).__name__,
        "config": trainer.config.model_dump(),
        "device": str(trainer.device),
        "precision": trainer.precision,
        "weights": {name: _plain(value) for name, value in trainer.objective.weights.items()},
        "losses": {name: _part(loss) for name, loss in trainer.objective.losses.items()},
        "models": [_model(model) for model in trainer.models],
        "versions": versions(),
    }
    write_text(out / "run.json", json.dumps(content, indent=2, default=str))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a run depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, Captioner):
        return {"name": getattr(model, "name", type(model).__name__)}
    parts = {"encoder": _part(model.encoder), "decoder": _part(model.decoder)}
    return {"name": model.name, "parameters": model.num_parameters(), **parts}


def _part(part: Any) -> dict[str, Any]:
    stamp = stamp_of(part)
    if stamp is None:
        return {"class": f"{type(part).__module__}:{type(part).__qualname__}", "shown": repr(part)}
    return {"name": stamp.name, "kwargs": stamp.kwargs}


def _plain(weight: Any) -> Any:
    return repr(weight) if callable(weight) else weight
