"""What a run needs around its steps: sources of batches, cached features, its description."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.loader import FixedBatches, Loader, Source, make_source
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError
from capdistill.files import write_atomically, write_text
from capdistill.runtime import autocast, evaluating
from capdistill.training.config import TrainConfig
from capdistill.training.stepper import require_references

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer


def prepare_sources(trainer: Trainer, train: Any, val: Any) -> tuple[Source, Source | None]:
    """Sources of training and validation batches, with cached features where asked for."""
    crops = wants_crops(trainer.config)
    options: dict[str, Any] = {
        "num_workers": trainer.config.num_workers,
        "seed": trainer.config.seed,
    }
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
        k = source.collator.k
        trainer.config = trainer.config.model_copy(update={"captions_per_image": k})
        trainer.config.model_fields_set.discard("captions_per_image")  # other data decide anew


def require_usable(trainer: Trainer) -> None:
    """Read a batch of each source: what cannot be used is said before the first step.

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
            "cache_features=True keeps one encoding an image, so it cannot go with random "
            f"augmentation (augment={config.augment}, flip={config.flip}). Set cache_views=4 to "
            "encode four views of each, or augment=False and flip=False, or cache_features=False."
        )
    if config.cache_features:
        return False
    return config.augment is not False


def _source(trainer: Trainer, data: Any, **options: Any) -> Source:
    tokenizer, size = trainer.captioner.tokenizer, image_size(*trainer.models)
    if not trainer.config.cache_features:
        return make_source(data, tokenizer, image_size=size, **options)
    frozen = [model for model in trainer.models if _is_cacheable(model, trainer.captioner)]
    views = trainer.config.cache_views if options["train"] else 1
    return make_source(
        data,
        tokenizer,
        image_size=size,
        caches=_stores(trainer, frozen, list(_views(trainer, data, views, size, options))),
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


_FORMAT = "capdistill.features/1"


class TrunkStore:
    """Trunk tokens by image id.

    Args:
        tokens: (images, N, D0) float16; a memory map is opened anew in every worker.
        image_ids: In the order of the rows.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], image_ids: Iterable[str]) -> None:
        self.tokens = tokens
        self.rows = {image_id: row for row, image_id in enumerate(image_ids)}

    def __getitem__(self, image_id: str) -> Tensor:
        return torch.from_numpy(np.array(self.tokens[self.rows[image_id]]))  # (N, D0)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to another process as its file's name, not as its content."""
        if not isinstance(self.tokens, np.memmap):
            return vars(self)
        return {"rows": self.rows, "file": self.tokens.filename, "shape": self.tokens.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "file" in state:
            state["tokens"] = _open(state.pop("file"), state.pop("shape"))
        vars(self).update(state)


def default_cache_dir() -> Path:
    """Where features lie unless the user says: capdistill's part of the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "capdistill" / "features"


def cache_trunk(
    encoder: Encoder, source: Source, data_key: str, directory: Path, precision: str
) -> TrunkStore:
    """Encode every image of a source once, or open what an earlier run wrote.

    Args:
        encoder: Its trunk must be frozen.
        source: Batches of images without augmentation.
        data_key: Stands for the images and their size; with the trunk's fingerprint it is the key.
        directory: Where the memory maps lie.
        precision: Of the forward passes.

    Raises:
        ConfigError: the directory cannot be written, or tokens do not fit in float16.
    """
    key = hashlib.sha256(f"{encoder.fingerprint()} {data_key} {precision}".encode()).hexdigest()
    path = directory / f"{key[:32]}.f16"
    return _stored(path) or _store(encoder, source, path, precision)


def _stored(path: Path) -> TrunkStore | None:
    """What an earlier run wrote, if it is all there."""
    try:
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        ids, shape = index["image_ids"], (len(index["image_ids"]), *index["shape"])
        whole = index["format"] == _FORMAT and path.stat().st_size == 2 * int(np.prod(shape))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return TrunkStore(_open(path, shape), ids) if whole else None


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.memmap(path, np.float16, "r", shape=shape)


def _store(encoder: Encoder, source: Source, path: Path, precision: str) -> TrunkStore:
    """Write the tokens, then the index: without it they count for nothing."""
    index: dict[str, Any] = {"format": _FORMAT, "image_ids": [], "shape": []}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for ids, tokens in _encoded(encoder, source, precision):
                index["image_ids"] += ids
                index["shape"] = tokens.shape[1:]
                file.write(tokens.tobytes())

    write_atomically(path, write)
    write_text(path.with_suffix(".json"), json.dumps(index))
    return TrunkStore(_open(path, (len(index["image_ids"]), *index["shape"])), index["image_ids"])


def _encoded(
    encoder: Encoder, source: Source, precision: str
) -> Iterator[tuple[tuple[str, ...], np.ndarray[Any, Any]]]:
    """Ids and (I, N, D0) float16 tokens of every readable image."""
    device = next(encoder.parameters()).device
    for batch in source.epoch(0):
        with evaluating(encoder), torch.no_grad(), autocast(device, precision):
            tokens = encoder.trunk(batch.images.to(device)).half()
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
    """What stands for the images of a data set, at a size in pixels.

    Files are known by name, size and time; images of any other data set are read and hashed.
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
