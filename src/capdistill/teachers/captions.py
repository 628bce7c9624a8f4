"""Sequence-level distillation: a teacher's captions of the training images."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from capdistill.captioner import Captioner
from capdistill.compatibility import image_size
from capdistill.data.caption_files import DataReport, pluralize
from capdistill.data.dataset import CaptionData, require_data
from capdistill.data.loader import Loader
from capdistill.data.rows import accept_rows
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError, require_bool, require_int
from capdistill.feature_cache import (
    Wanted,
    cache_trunks,
    data_key,
    keeps_frozen_stages,
)
from capdistill.feature_files import CacheType, default_cache_dir
from capdistill.files import DirectoryLock, user_path
from capdistill.generation.config import GenerationConfig, SearchOptions, resolve
from capdistill.metrics import CaptionScorer
from capdistill.outputs import Batch
from capdistill.progress import progress as report_progress
from capdistill.ranks import Ranks
from capdistill.runtime import autocast, launched, on_device, pick_device, pick_precision
from capdistill.saving import describe_tokenizer, hash_weights
from capdistill.teachers.caption_file import (
    Choice,
    Keep,
    Row,
    TeacherCaptions,
    append_rows,
    open_rows,
    read_captions,
    read_rows,
    remove_if_empty,
)
from capdistill.teachers.ensemble import Ensemble, leaves
from capdistill.weights import StateOf


def caption(
    teacher: Any,
    data: CaptionData,
    path: str | Path,
    *,
    num_return: int = 1,
    keep: Keep | None = None,
    candidates: int | None = None,
    mix: float = 0,
    reweight: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    precision: str = "auto",
    cache_features: bool = False,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    generation: GenerationConfig | Mapping[str, Any] | None = None,
    **options: Unpack[SearchOptions],
) -> TeacherCaptions:
    """Training data whose captions are a teacher's, made once and kept in a file.

    The file has one JSON object per image, appended batch by batch, with all candidates. A run that
    was killed continues behind its last complete row. If the file is complete, nothing is decoded:
    another choice among the candidates (`num_return`, `keep`, `mix`, `reweight`) costs nothing.

    Example:
        >>> import capdistill as cd, tempfile
        >>> train = cd.data.sample().train.subset(4)
        >>> tokenizer = cd.WordTokenizer.train(train.captions, min_count=1)
        >>> teacher = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> path = tempfile.mkdtemp() + "/captions.jsonl"
        >>> captioned = caption(teacher, train, path, num_return=2, beam_size=3, progress=False)
        >>> len(captioned), captioned.references == train.references
        (4, True)

    Args:
        teacher: A captioner, a wrapped one, or an ensemble: anything with `generate`. Its device
            and its training flags are restored.
        data: The images, with or without captions of their own.
        path: The JSON Lines file. What it depends on is kept beside it in a `.run.json` file.
        num_return: Captions of the teacher per image.
        keep: How they are chosen among the candidates: "cider", the highest CIDEr-D against the
            references of the image, with document frequencies of all references of `data`;
            "score", the highest mean log-probability per token; None, the first ones in the order
            of the search.
        candidates: Captions decoded per image; by default all beams, or `num_return` samples.
            Those that are empty, cut at the length limit, or equal to an earlier one are dropped
            and counted.
        mix: Human captions per image beside the teacher's. A whole number m takes m of its
            references. A share s in (0, 1) makes it the share of all captions: with n captions of
            the teacher, n s / (1 - s) references, rounded down, and up for as many images as the
            fraction asks for. References and images are chosen by a hash of the image id.
        reweight: Weigh the teacher's captions of an image in the cross-entropy by the softmax of
            their log-probabilities divided by this temperature, times their number. Human captions
            have weight 1.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        device, precision, cache_features, cache_dir: As in `TrainConfig`; the cached features of a
            training run with the same teacher, images and precision are used.
        overwrite: Start the file anew, whatever it holds.
        progress: Show progress.
        generation: Decoding: a `GenerationConfig` or its options; a beam of 5 by default.
        options: Fields of `GenerationConfig`, which override those of `generation`:
            `beam_size=3`, or `sample=True, seed=1`, ...

    Raises:
        ConfigError: an invalid option; or the file was made by another teacher, with other
            options or for other data (the message says what differs), or is in use.
        DataError: data of another kind, no readable image, or a damaged file.

    Source:
        Kim, Rush (2016), Sequence-Level Knowledge Distillation: section 3.2 for the teacher's best
        captions, and its renormalised n-best list (`reweight=1`); section 3.3, sequence-level
        interpolation, for `keep="cider"`, with CIDEr-D in place of BLEU.
    """
    choice = Choice(num_return, keep, mix, reweight)
    config = _decoding(choice, candidates, generation, options)
    data = accept_rows(data)
    _require(teacher, data)
    require_int("caption: batch_size", batch_size, 1)
    for name, value in {"cache_features": cache_features, "overwrite": overwrite}.items():
        require_bool(f"caption: {name}", value)
    place = pick_device(device)
    precision = pick_precision(place, precision)
    file = user_path(path)
    about = _about(teacher, data, config, precision, cache_features)
    rows = open_rows(file, about, overwrite)
    if _missing(data.image_ids, rows, batch_size):
        if launched().world_size > 1:
            raise ConfigError(
                f"caption: {launched().world_size} processes would write {file} at once. Caption "
                "the images in one process before the training; what is complete is then read."
            )
        directory = default_cache_dir() if cache_dir is None else user_path(cache_dir)
        with DirectoryLock() as lock, on_device([teacher], place):
            lock.take(file)
            _complete(
                teacher,
                data,
                file,
                config,
                (place, precision),
                batch_size=batch_size,
                num_workers=num_workers,
                cache_dir=directory if cache_features else None,
                progress=progress,
            )
    return read_captions(file, data, **asdict(choice))


def _complete(
    teacher: Any,
    data: CaptionData,
    file: Path,
    config: GenerationConfig,
    where: tuple[torch.device, str],
    *,
    batch_size: int,
    num_workers: int,
    cache_dir: Path | None,
    progress: bool,
) -> None:
    """Caption the images that have no row in the file yet. Nobody else writes it."""
    rows = read_rows(file, cut=True)  # another process may have added some until now
    missing = _missing(data.image_ids, rows, batch_size)
    if not missing:
        return
    caches: dict[str, Any] = {}
    if cache_dir is not None:
        [caches] = trunk_caches(
            teacher, data, cache_dir, where[1], batch_size=batch_size, progress=progress
        )
    loader = Loader(
        data.subset(missing),
        teacher.tokenizer,
        image_size=image_size(teacher),
        batch_size=batch_size,
        captions_per_image=1,
        num_workers=num_workers,
        caches=caches,
        with_images=not all(cache_key(model) in caches for model in leaves(teacher)),
    )
    made = _decode(teacher, loader, data, config, where, rows)
    batches = report_progress(made, len(loader), "Captioning", unit="batch", show=progress)
    try:
        append_rows(file, batches, rows)
    except DataError:  # no readable image
        remove_if_empty(file)
        raise
    append_rows(file, [_unreadable(data.subset(missing), rows, loader.skipped)], rows)


def check_options(**arguments: Any) -> None:
    """Refuse invalid arguments of `caption`, long before it is called.

    Example:
        >>> check_options(beam_size=3, num_return=5)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: caption: num_return=5 captions cannot be chosen among \
        3 candidates. Give a larger beam_size= or candidates=.

    Args:
        arguments: Those beside teacher, data and path.

    Raises:
        ConfigError: as `caption` would.
    """
    bound = inspect.signature(caption).bind(None, None, "", **arguments)
    bound.apply_defaults()
    given = bound.arguments
    choice = Choice(*(given[each.name] for each in fields(Choice)))
    _decoding(choice, given["candidates"], given["generation"], given["options"])


def _decoding(
    choice: Choice, candidates: int | None, generation: Any, options: Mapping[str, Any]
) -> GenerationConfig:
    given = dict(options)
    if "num_return" in given:  # an argument of `caption`, with another meaning
        raise ConfigError("caption: give the number of decoded captions as candidates=.")
    plain = not isinstance(generation, GenerationConfig)
    if plain and not given.get("sample", (generation or {}).get("sample", False)):
        given = {"beam_size": (generation or {}).get("beam_size", 5), **given}
    config = resolve(generation, given)
    if candidates is None:
        candidates = choice.num_return if config.sample else config.beam_size
    require_int("caption: candidates", candidates, 1)
    if candidates < choice.num_return:
        raise ConfigError(
            f"caption: num_return={choice.num_return} captions cannot be chosen among "
            f"{pluralize(candidates, 'candidate')}. Give a larger beam_size= or candidates=."
        )
    return resolve(config, {"num_return": candidates})


def _require(teacher: Any, data: Any) -> None:
    generates = callable(getattr(teacher, "generate", None)) and hasattr(teacher, "tokenizer")
    if not isinstance(teacher, nn.Module) or not generates:
        raise ConfigError(
            f"caption: {type(teacher).__name__} is no module with generate(batch) and tokenizer. "
            "Give a capdistill.Captioner, teachers.wrap(...), or an ensemble of them."
        )
    require_data("caption", data)


def _decode(
    teacher: Any,
    loader: Loader,
    data: CaptionData,
    config: GenerationConfig,
    where: tuple[torch.device, str],
    rows: Mapping[str, Row],
) -> Iterator[list[Row]]:
    """Rows of the readable images, batch by batch."""
    known = {image: texts for image, texts in data.references.items() if texts}
    scorer = CaptionScorer(known, metrics=["cider_d"]) if known else None
    names = _file_names(data)
    for batch in _readable(loader, bool(rows)):
        with autocast(*where):  # not around the loader, which stacks cached values in float16
            hypotheses = teacher.generate(batch.to(where[0]), config)
        new = [
            Row.of(image, names[image], hypothesis)
            for image, hypothesis in zip(batch.image_ids, hypotheses, strict=True)
        ]
        for row in new:
            if scorer is not None and row.image_id in known:
                images = [row.image_id] * len(row.captions)
                row.cider_d = scorer.rewards(images, row.captions).tolist()
        yield new


def _readable(loader: Loader, others: bool) -> Iterator[Batch]:
    """The batches; none if no image can be read although others could be."""
    try:
        yield from loader.epoch(0)
    except DataError:
        if not others or len(loader.skipped) < loader.num_images:
            raise


def cache_key(model: nn.Module) -> str | None:
    """The key of a captioner's cached features; None for a model that has none."""
    if not isinstance(model, Captioner):
        return None
    return model.encoder.cache_key(trained=keeps_frozen_stages(model.encoder))


def trunk_caches(
    teacher: Any,
    data: CaptionData,
    directory: Path,
    precision: str,
    *,
    batch_size: int = 64,
    progress: bool = False,
    size: int | None = None,
    views: int = 1,
    flip: bool = False,
    dtype: CacheType = "fp16",
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """For each view, the cached features of all captioners in the teacher by their encoder's key.

    Args:
        teacher: On the device to encode on.
        data: The images.
        directory, precision, progress, dtype, ranks: As for `cache_trunks`.
        batch_size: Images per batch.
        size: Side in pixels of the images; by default that of the largest that a member reads.
        views, flip: How many views of each image; whether those beside the centre are mirrored.

    Raises:
        ConfigError: no encoder has anything that can be cached.
    """
    encoders: dict[str, Encoder] = {}
    size = image_size(teacher) if size is None else size
    source = Loader(
        data,
        teacher.tokenizer,
        image_size=size,
        batch_size=batch_size,
        captions_per_image=1,
        flip=flip,
    )
    ranks = ranks or Ranks()
    key = ranks.on_main(data_key, data, source, size, directory, progress)
    for model in leaves(teacher):
        name = cache_key(model)
        if isinstance(model, Captioner) and name is not None:
            encoders.setdefault(name, model.encoder)
    if not encoders:
        raise ConfigError(
            "cache_features=True, but the teacher has no encoder that can be cached. Set "
            "cache_features=False."
        )
    keys = [key, *(f"{key} view {view} flip {flip}" for view in range(1, views))]
    wanted = [
        Wanted(encoder, each, view, keeps_frozen_stages(encoder))
        for view, each in enumerate(keys)
        for encoder in encoders.values()
    ]
    made = iter(cache_trunks(wanted, source, directory, precision, progress, dtype, ranks))
    return [{name: next(made) for name in encoders} for _ in keys]


def _about(
    teacher: Any, data: CaptionData, config: GenerationConfig, precision: str, cached: bool
) -> dict[str, Any]:
    """What the captions depend on, as plain data."""
    digest = hashlib.sha256()
    for example in data.examples:
        with suppress(OSError):
            digest.update(f"{example.path.stat().st_size}".encode())
        digest.update(repr((example.image_id, example.references)).encode("utf-8", "replace"))
    return {
        "format": "capdistill.captions/1",
        "teacher": str(getattr(teacher, "name", type(teacher).__name__)),
        "weights of the teacher": hash_weights(StateOf(teacher)),
        "mixture": [
            f"{m.mixing} {m.weights}" for m in teacher.modules() if isinstance(m, Ensemble)
        ],
        "vocabulary": describe_tokenizer(teacher.tokenizer)["vocabulary"],
        "data": f"{len(data)} images, {digest.hexdigest()}",
        "precision": precision,
        "cache_features": cached,
        **json.loads(json.dumps(config.model_dump(mode="json"))),
    }


def _missing(ids: Sequence[str], rows: Mapping[str, Row], batch_size: int) -> list[int]:
    """The images of all batches that are not complete, so that batches are those of one run."""
    begins = range(0, len(ids), batch_size)
    batches = [range(begin, min(begin + batch_size, len(ids))) for begin in begins]
    done = {image for image, row in rows.items() if row.error is None}
    return [i for batch in batches if any(ids[j] not in done for j in batch) for i in batch]


def _unreadable(data: CaptionData, rows: Mapping[str, Row], skipped: DataReport) -> list[Row]:
    """Rows of the images that were skipped, with the reasons."""
    reasons = {problem.file: problem.detail for problem in skipped}
    names = _file_names(data)
    return [
        Row(names[e.image_id], e.image_id, [], [], [], error=reasons.get(str(e.path), "unknown"))
        for e in data.examples
        if e.image_id not in rows
    ]


def _file_names(data: CaptionData) -> dict[str, str]:
    """Image id -> its file, below the folder that holds all files."""
    paths = {
        e.image_id: e.path.absolute() if isinstance(e.path, Path) else Path("/", e.image_id)
        for e in data.examples
    }
    try:
        root = os.path.commonpath([path.parent for path in paths.values()])
    except ValueError:  # on several drives
        return {image: path.name for image, path in paths.items()}
    return {image: path.relative_to(root).as_posix() for image, path in paths.items()}
