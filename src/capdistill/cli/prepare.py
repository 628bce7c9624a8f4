"""`capdistill cache` and `capdistill shards`: work on the data that is done once."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from capdistill.cli import DONE, columns, print_result, print_status
from capdistill.cli.common import TRAINING_FLAGS, add_data_options, add_run_options, data_values
from capdistill.cli.data import parse_data
from capdistill.cli.distill import add_pair_options
from capdistill.cli.runfile import DistillRun, TrainRun, read_values
from capdistill.cli.train import load_run, make_trainer, validation
from capdistill.errors import ConfigError
from capdistill.training.config import DistillConfig

if TYPE_CHECKING:
    from capdistill.feature_files import CacheEntry

_CACHE = """\
example:
  capdistill cache --preset lite0_lstm --data flickr8k --cache-views 4
  capdistill cache --teacher runs/teacher --student lite0_lstm --data flickr8k
  capdistill cache --teacher runs/teacher --student lite0_lstm --data flickr8k --targets targets
  capdistill cache --config runs/student/config.json
  capdistill cache --list"""
_SHARDS = """\
example:
  capdistill shards --data flickr8k --out shards
  capdistill shards --data captions.json --format coco --images coco --out shards"""
_FLAGS = {name: TRAINING_FLAGS[name] for name in ("num_workers", "device", "precision", "seed")} | {
    "eval_batch_size": (int, "N", "images per batch"),
    "cache_views": (int, "N", "views of each training image"),
    "cache_dtype": (str, "NAME", "fp16, or bf16 for values beyond 65504"),
    "cache_dir": (str, "DIR", "where the features lie (default: in the user's cache directory)"),
}


def cache_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cache`: those of a run, of which it does the first part."""
    parser.description = _CACHE
    parser.usage = "capdistill cache --preset NAME --data PATH [options]"
    text = "a model alone: a preset or a saved captioner's directory"
    parser.add_argument("--preset", metavar="NAME", help=text)
    add_pair_options(parser)
    add_run_options(parser, DistillConfig, _FLAGS, output=False, validation=False)
    group = parser.add_argument_group("targets of the teacher")
    text = "also run the teacher over all captions, and keep its targets here"
    group.add_argument("--targets", metavar="DIR", help=text)
    text = "of a large vocabulary, keep the N most probable words (default: all, exactly)"
    group.add_argument("--target-words", metavar="N", type=int, help=text)
    text = "with --targets: replace those that were made differently"
    group.add_argument("--overwrite", action="store_true", help=text)
    text = "caches that are there (in --cache-dir)"
    group = parser.add_argument_group(text).add_mutually_exclusive_group()
    group.add_argument("--list", action="store_true", help="list them, and do nothing else")
    group.add_argument("--clear", action="store_true", help="remove them all, and do nothing else")
    parser.set_defaults(run=cache, out=None, resume=False, role="student")


def cache(options: argparse.Namespace) -> int:
    """Cache the features of a run, or list or remove what is there."""
    from capdistill.feature_files import clear_caches, default_cache_dir, list_caches

    if options.list or options.clear:
        _require_only_a_directory(options)
    directory = options.cache_dir or default_cache_dir()
    if options.clear:
        freed = clear_caches(options.cache_dir)
        content: Any = {"directory": str(directory), "bytes": freed}
        print_result(options, content, lambda: f"{directory}: freed {_gigabytes(freed)}")
        return DONE
    if options.list:
        found = list_caches(options.cache_dir)
        print_result(options, _content(found), lambda: f"{directory}\n{_table(found)}")
        return DONE
    if options.targets is None and (options.overwrite or options.target_words is not None):
        raise ConfigError("--overwrite and --target-words belong to --targets DIR; give that, too.")
    began = time.monotonic()
    made, epochs = _cache(options)
    seconds = time.monotonic() - began
    content = {"seconds": seconds, "caches": _content(made)}
    hint = "Train with --set train.cache_features=true" + epochs
    if options.targets:
        content["targets"] = options.targets
        hint = f"{hint} --teacher {options.targets}"
    print_result(
        options, content, lambda: f"{_table(made)}\n{seconds:.1f} s. {hint} and the same options."
    )
    return DONE


def _require_only_a_directory(options: argparse.Namespace) -> None:
    """Refuse the options of a run: they could name another directory than the one in use."""
    read = ("list", "clear", "cache_dir", "command", "json", "debug", "run", "flags", "role")
    for name, value in vars(options).items():
        if name not in read and value not in (None, False, []):
            flag = name.replace("_", "-")
            raise ConfigError(f"--list and --clear read --cache-dir DIR alone. Leave out --{flag}.")


def _cache(options: argparse.Namespace) -> tuple[list[CacheEntry], str]:
    from capdistill.training.sources import cache_features

    written = {} if options.config is None else read_values(options.config)
    pair = options.teacher or options.student or written.get("command") == "distill"
    options.run_class, options.model = (DistillRun, "student") if pair else (TrainRun, "model")
    if pair and options.preset:
        raise ConfigError("--preset is a model alone. Give it, or --teacher and --student.")
    if options.targets and not pair:
        raise ConfigError("--targets are those of a teacher. Give --teacher and --student.")
    run, data = load_run(options)
    trainer = make_trainer(run, data)
    made = cache_features(trainer, run.data.training_data(data), validation(data))
    if options.targets:
        _cache_targets(options, trainer, run.data.training_data(data), validation(data))
    views = run.train.cache_views
    return made, f" --set train.cache_views={views}" if views > 1 else ""


def _cache_targets(options: argparse.Namespace, trainer: Any, train: Any, val: Any) -> None:
    """Keep the targets of the teacher that the losses of a run read."""
    from capdistill.compatibility import image_size
    from capdistill.losses.token import LogitsLoss
    from capdistill.teachers import cache as cache_targets

    teacher, config, losses = trainer.models[1:], trainer.config, trainer.objective.losses.values()
    scales = [each.temperature for each in losses if isinstance(each, LogitsLoss)]
    words: dict[str, Any] = {}
    if options.target_words is not None:
        constant = [each for each in scales if isinstance(each, float)]
        words = {"top_k": options.target_words, "temperatures": constant}
    cache_targets(
        teacher[0],
        getattr(train, "data", train),  # of a curriculum
        options.targets,
        val=val,
        keep=trainer.objective.needed_outputs & {"features", "attention"},
        image_size=image_size(*trainer.models),
        cache_features=True,
        overwrite=options.overwrite,
        batch_size=config.eval_batch_size,
        num_workers=config.num_workers,
        progress=config.progress is not False,
        **words,
        **{name: getattr(config, name) for name in _AS_TRAINED},
    )


_AS_TRAINED = ("cache_views", "flip", "device", "precision", "cache_dir", "cache_dtype")


def _content(entries: list[CacheEntry]) -> list[dict[str, Any]]:
    return [{**asdict(entry), "path": str(entry.path)} for entry in entries]


def _table(entries: list[CacheEntry]) -> str:
    rows = [("encoder", "data", "images", "done", "size", "file")]
    for each in entries:
        share = each.done / each.images if each.images else 0.0
        name = each.encoder or "(an older version)"
        size = _gigabytes(each.bytes)
        rows.append((name, each.data, f"{each.images:,}", f"{share:.0%}", size, str(each.path)))
    return columns(rows, right=[2, 3, 4]) if entries else "no caches"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def shards_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shards`."""
    parser.description = _SHARDS
    parser.usage = "capdistill shards --data PATH --out DIR [options]"
    add_data_options(parser)
    parser.add_argument("--out", metavar="DIR", help="the directory of the shards")
    parser.add_argument(
        "--images-per-shard", type=int, metavar="N", default=1000, help="images in a shard"
    )
    text = "replace shards of the same names that hold other data"
    parser.add_argument("--overwrite", action="store_true", help=text)
    parser.set_defaults(run=shards)


def shards(options: argparse.Namespace) -> int:
    """Write every split of a data set as WebDataset shards."""
    from capdistill.data import write_shards

    if options.out is None:
        raise ConfigError("out: no directory for the shards was given. Give --out DIR.")
    data = parse_data(data_values(options)).load()
    print_status(data.summary())
    files = write_shards(
        data, options.out, images_per_shard=options.images_per_shard, overwrite=options.overwrite
    )
    size = sum(file.stat().st_size for file in files)
    content = {"files": [str(file) for file in files], "bytes": size}
    text = (
        f"{len(files)} shards, {_gigabytes(size)}, in {options.out}: read them with --format shards"
    )
    print_result(options, content, lambda: text)
    return DONE
