"""`cache`: run a teacher once over a data set and keep its targets on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from capdistill.captioner import Captioner, require_loaded
from capdistill.compatibility import image_size as largest_size
from capdistill.data.dataset import CaptionData, require_data
from capdistill.data.rows import accept_rows
from capdistill.errors import ConfigError, require_bool, require_int, require_number, suggest
from capdistill.feature_files import CacheType, default_cache_dir
from capdistill.files import user_path
from capdistill.generation.decode import CaptionGenerator
from capdistill.ranks import Ranks
from capdistill.runtime import pick_device, pick_precision
from capdistill.saving import ENSEMBLE, TARGETS, require_no_other
from capdistill.teachers.cached import CachedTeacher
from capdistill.teachers.cached_writer import Words, Writer
from capdistill.teachers.ensemble import Ensemble, leaves
from capdistill.teachers.mean_teacher import MeanTeacher

KEPT = ("features", "attention")


def cache(
    teacher: Any,
    data: CaptionData,
    directory: str | Path,
    *,
    val: CaptionData | None = None,
    cache_views: int = 1,
    flip: bool = False,
    keep: Iterable[str] = (),
    top_k: int | None = None,
    temperatures: Iterable[float] = (1.0,),
    min_mass: float = 0.9,
    image_size: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = 0,
    device: str = "auto",
    precision: str = "auto",
    cache_features: bool = False,
    cache_dir: str | Path | None = None,
    cache_dtype: CacheType = "fp16",
    overwrite: bool = False,
    progress: bool = True,
) -> CachedTeacher | Ensemble:
    """Run a teacher once over every image, view and caption, and keep its targets.

    For each target token the vector before the vocabulary projection is kept in float16; logits are
    made of it by the teacher's output matrix when they are read. A run that was killed continues
    where it stopped, and captions, images or views that were added later are added to the files.
    If all are there, nothing is computed. Processes that a launcher started, such as `torchrun`,
    all call this function: each runs the teacher on its share of the images, and the files are
    those of a single process. Of others that ask for the same directory, one writes at a time.

    Example:
        >>> import capdistill as cd, tempfile
        >>> train = cd.data.sample().train.subset(3)
        >>> tokenizer = cd.WordTokenizer.train(train.captions, min_count=1)
        >>> members = [cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer)
        ...            for role in ("teacher", "student")]
        >>> ensemble = cd.teachers.Ensemble(members, weights=[2, 1])
        >>> cached = cache(ensemble, train, tempfile.mkdtemp(), cache_views=2, progress=False)
        >>> cached.members["debug_student"]
        CachedTeacher 'debug_student': hidden, logits of 3 images

    Args:
        teacher: A captioner; or an ensemble, or a mapping of names to captioners: its members are
            cached one by one, in directories within, and the result is an ensemble of them with the
            same weights and mixing.
        data: The training images with all captions that may be trained on, such as `data.train` or
            what `caption` and `read_captions` return.
        directory: Where the files are. Runs on other captions of the same images may share it.
        val: The validation images, for the losses that validation shows; their centre alone.
        cache_views, flip: As given to `fit`: the views of each training image, and whether views
            beside the centre are mirrored.
        keep: What losses read besides logits and the last hidden vector: "features" (of
            `FeatureKD`, 2 N D bytes per image and view), "attention" (2 N bytes per token).
        top_k: For vocabularies of 30,000 words and more: keep the k most probable words of each
            target (4 bytes each, 6 beyond 65,536 words) instead of the hidden vector, which is
            also all that can be kept of a wrapped captioner. An ensemble is then cached as one,
            without its members. Losses that read all words are refused. `TokenKD` adds up the
            probability of all others, so it is `TopKD`.
        temperatures: With `top_k`, those at which the probability of the other words is kept.
        min_mass: With `top_k`, the least probability that the kept words must have together, on
            average and at each temperature.
        image_size: Side in pixels of the images that the teacher reads; by default its own, and
            each member's own. The student of a run reads images at its own size.
        batch_size: Images per batch.
        num_workers: Processes that read images; None decides by `default_num_workers`.
        device, precision, cache_features, cache_dir, cache_dtype: As in `TrainConfig`; the cached
            features of a run with the same teacher, images and precision are used.
        overwrite: Start anew, whatever the directory holds.
        progress: Show progress.

    Raises:
        ConfigError: an invalid option; a teacher of another kind; the `top_k` words have a
            probability below `min_mass` (the message gives it); or the directory holds targets
            of another teacher, precision, ... (the message says what differs).
        RankFailed: another process failed.
        DataError: data of another kind, no readable image, or an image that has changed.

    Source:
        Hinton, Vinyals, Dean (2015), section 2, for the targets; that they need not be computed
        more than once: Shen, Xing (2022), A Fast Knowledge Distillation Framework for Visual
        Recognition, section 3.
    """
    data, val = accept_rows(data), accept_rows(val)
    require_data("cache", data)
    if val is not None:
        require_data("cache", val)
    teacher = Ensemble(teacher) if isinstance(teacher, Mapping) else teacher
    kept = _kept(keep)
    words = None if top_k is None else _words(top_k, temperatures, min_mass, teacher)
    _require(teacher, words, kept)
    for name, value in {"cache_views": cache_views, "batch_size": batch_size}.items():
        require_int(f"cache: {name}", value, 1, 10_000)
    flags = {"flip": flip, "cache_features": cache_features, "overwrite": overwrite}
    for name, flag in flags.items():
        require_bool(f"cache: {name}", flag)
    place, ranks = pick_device(device), Ranks()
    writer = Writer(
        image_size=largest_size(teacher) if image_size is None else image_size,
        own_sizes=image_size is None,
        flip=flip,
        kept=kept,
        words=words,
        batch_size=batch_size,
        num_workers=num_workers,
        device=place,
        precision=pick_precision(place, precision),
        dtype=cache_dtype,
        trunks=_trunk_directory(cache_dir) if cache_features else None,
        overwrite=overwrite,
        progress=progress,
        ranks=ranks,
    )
    parts = [(data, cache_views), *([] if val is None else [(val, 1)])]
    several = isinstance(teacher, Ensemble) and words is None
    require_no_other(user_path(directory), ENSEMBLE if several else TARGETS)
    with ranks.failing_together():
        ranks.join(place)
        return writer.run(teacher, parts, user_path(directory))


def _require(teacher: Any, words: Words | None, kept: frozenset[str]) -> None:
    members = list(teacher.members.values()) if isinstance(teacher, Ensemble) else [teacher]
    if any(isinstance(part, MeanTeacher) for part in leaves(teacher)):
        raise ConfigError(
            "cache: a MeanTeacher changes with every step of the student, so its targets cannot be "
            "kept. Give the teacher itself to the distiller."
        )
    for part in leaves(teacher):
        if isinstance(part, Captioner):
            require_loaded(part)
    if words is not None:
        _require_as_one(teacher, kept)
        return
    for member in members:
        if isinstance(member, Ensemble):
            _require(member, words, kept)
        elif not isinstance(member, Captioner):
            raise ConfigError(
                f"cache: {type(member).__name__} was given. Give a capdistill.Captioner, or an "
                "ensemble of such: targets are kept as hidden vectors and made into logits by the "
                "output matrix, which a wrapped captioner does not show. Or keep its most probable "
                "words: top_k=."
            )
        else:
            member.decoder.output_layer()  # says what is missing


def _require_as_one(teacher: Any, kept: frozenset[str]) -> None:
    """Refuse what cannot be kept as one distribution."""
    if not isinstance(teacher, CaptionGenerator) or isinstance(teacher, CachedTeacher):
        raise ConfigError(
            f"cache: {type(teacher).__name__} was given. Give a capdistill.Captioner, an ensemble, "
            "or capdistill.teachers.wrap(...)."
        )
    if isinstance(teacher, Ensemble) and teacher.mixing == "draw":
        raise ConfigError(
            "cache: top_k keeps one distribution per target, but mixing='draw' draws a member in "
            "every epoch. Leave top_k out, which keeps every member."
        )
    if kept and not isinstance(teacher, Captioner):
        raise ConfigError(
            f"cache: '{teacher.name}' is no capdistill.Captioner, so beside top_k nothing can be "
            f"kept of it (keep={sorted(kept)}). Leave keep out, or leave top_k out."
        )


def _words(top_k: int, temperatures: Iterable[float], min_mass: float, teacher: Any) -> Words:
    require_int("cache: top_k", top_k, 1)
    listed = [temperatures] if isinstance(temperatures, Real) else list(temperatures)
    checked = [require_number("cache: temperatures", each, above=0) for each in listed]
    require_number("cache: min_mass", min_mass, 0, below=1)
    if not checked:
        raise ConfigError(
            "cache: temperatures is empty. Give those of the losses, such as temperatures=[1.0]."
        )
    size = len(teacher.tokenizer.vocabulary)
    if top_k >= size:
        raise ConfigError(
            f"cache: top_k={top_k}, but there are {size} words. Give fewer, or leave it out."
        )
    return Words(top_k, tuple(sorted({float(each) for each in checked})), float(min_mass))


def _kept(keep: Iterable[str]) -> frozenset[str]:
    names = [keep] if isinstance(keep, str) else list(keep)
    for name in names:
        if name not in KEPT:
            raise ConfigError(f"cache: keep={name!r} is unknown. {suggest(str(name), KEPT)}")
    return frozenset(names)


def _trunk_directory(cache_dir: str | Path | None) -> Path:
    return default_cache_dir() if cache_dir is None else user_path(cache_dir)
