"""Readers of files from outside, and damaged files for them: what comes out is ours, or an error.

`tests/test_fuzz.py` tries a few hundred files, `benchmarks/fuzz.py` thousands.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import capdistill as cd
from capdistill import encoders
from capdistill.cli.runfile import DistillRun, TrainRun, parse_run, read_values
from capdistill.data import CaptionData, Example
from capdistill.data.images import read_image
from capdistill.deploy.manifest import REQUIRED, FileEntry, Manifest
from capdistill.deploy.manifest import read_manifest as read_exported
from capdistill.errors import CapdistillError
from capdistill.metrics import DocumentFrequencies
from capdistill.metrics.coco_files import read_coco_results
from capdistill.teachers import load as load_teacher
from capdistill.teachers.caption_file import read_rows
from capdistill.teachers.directory import read_pretrained
from capdistill.teachers.foreign_captions import read_texts
from capdistill.tokenizer import WordTokenizer
from capdistill.training.checkpoint import load_state
from capdistill.training.history import History
from capdistill.training.state_file import read_file
from capdistill.weights import read_state_dict
from tests.toy_captioner import Patches, toy
from tests.training import tiny_models as tiny

FORM = "capdistill.training/3"


@dataclass(frozen=True)
class Target:
    """A reader and valid files for it.

    Args:
        read: Reads the file; a `CapdistillError` is a good answer.
        seeds: Contents that it can read.
        name: The name that the file must have.
    """

    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    name: str = "file"


def attempt(target: Target, folder: Path, content: bytes) -> str:
    """Read a content; "read" or the class of our error. Anything else is raised."""
    path = folder / target.name
    path.write_bytes(content)
    try:
        target.read(path)
    except CapdistillError as error:
        return type(error).__name__
    return "read"


# -- damaged contents ---------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid content after a few cuts, flips, insertions, repetitions and exchanges."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        at = draw(st.integers(0, size))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "number"]))
        if kind == "flip" and size:
            data[at % size] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 3, 200]))
        elif kind == "number":
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff" * 4, b"\0" * 4, b"9999", b"\x7f" * 4])
            )
    return bytes(data)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "name", "kwargs", "1.jpg", 10**400, -1, 1e308, "a dog runs"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def altered(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid JSON content with other values, keys and kinds somewhere inside; or deeply nested."""
    content = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        content = _replace(draw, content)
    if draw(st.integers(0, 30)) == 0:
        depth = draw(st.sampled_from([50, 2_000, 100_000]))
        return b'{"a":' * depth + b"1" + b"}" * depth
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _replace(draw: st.DrawFn, value: Any) -> Any:
    """The value with something else in one place."""
    inside = bool(value) and isinstance(value, (dict, list)) and draw(st.integers(0, 3)) > 0
    if not inside:
        return draw(_VALUES)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    fresh = _replace(draw, value[key])
    if isinstance(value, list):
        return [*value[:key], fresh, *value[key + 1 :]]
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    rest = {name: each for name, each in value.items() if kind == "replace" or name != key}
    return rest if kind == "remove" else {**rest, (key if kind == "replace" else "x"): fresh}


def lines_altered(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """JSON Lines of which one line is altered."""
    first = seeds[0].split(b"\n")
    return st.tuples(st.integers(0, len(first) - 2), altered([line for line in first if line])).map(
        lambda pair: b"\n".join([*first[: pair[0]], pair[1], *first[pair[0] + 1 :]])
    )


@st.composite
def repacked(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A zip file with a damaged part whose checksum is right."""
    data = draw(st.sampled_from(seeds))
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as written:
        names = [part.filename for part in source.infolist()]
        chosen = draw(st.sampled_from([*names, *[n for n in names if n.endswith(".pkl")] * 6]))
        for name in names:
            part = source.read(name)
            written.writestr(name, draw(damaged([part])) if name == chosen else part)
    return target.getvalue()


# -- valid contents -------------------------------------------------------------------------------


@cache
def _trainer() -> cd.Trainer:
    trainer = cd.Trainer(tiny.make_student(), **tiny.QUIET, schedule="constant")
    trainer.step(tiny.make_batch([2, 1]))
    return trainer


@cache
def _saved(folder: Path) -> Path:
    toy().save(folder)
    return folder


def _state() -> list[bytes]:
    buffer = io.BytesIO()
    torch.save({"format": FORM, **_trainer().state_dict()}, buffer)
    return [buffer.getvalue()]


def _weights() -> list[bytes]:
    from safetensors.torch import save

    zipped, legacy = io.BytesIO(), io.BytesIO()
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    torch.save({"state_dict": state}, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    return [zipped.getvalue(), legacy.getvalue(), save(state, {"x": "y"})]


def _run_files() -> list[bytes]:
    train = {
        "command": "train",
        "data": {"path": "flickr8k", "format": "flickr8k"},
        "model": {"preset": "debug_student", "weights": False},
        "tokenizer": {"min_count": 2},
        "train": {"epochs": 2, "save_every": "10min", "generation": {"beam_size": 3}},
        "out": "runs/x",
    }
    distill = {
        "command": "distill",
        "data": {"path": "a.json", "format": "coco", "images": "images"},
        "student": {"encoder": {"name": "timm", "kwargs": {"dim": 8}}, "decoder": {"name": "lstm"}},
        "teacher": "runs/teacher",
        "tokenizer": {"name": "huggingface", "path": "gpt2", "end": "<|endoftext|>", "pad": 0},
        "losses": {"token": {"name": "token", "temperature": 2.0}, "hidden": {"name": "hidden"}},
        "weights": {"ce": 0.3, "token": [0.7, 0.1], "hidden": 0.1},
        "train": {"on_policy": [0.0, 0.5], "metrics": ["bleu"], "on_spike": "skip"},
        "out": "runs/y",
    }
    return [json.dumps(train).encode(), json.dumps(distill).encode()]


def _coco() -> list[bytes]:
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    rows = [{"image_id": i, "id": i, "caption": f"a dog {i}"} for i in (1, 1, 2)]
    return [json.dumps({"images": images, "annotations": rows}).encode()]


def _karpathy() -> list[bytes]:
    sentences = [{"raw": "a dog runs", "tokens": ["a", "dog", "runs"]}, {"raw": "a cat"}]
    images = [
        {
            "filename": f"{i}.jpg",
            "filepath": "f",
            "split": split,
            "cocoid": i,
            "sentences": sentences,
        }
        for i, split in enumerate(["train", "restval", "val", "test"], 1)
    ]
    return [json.dumps({"dataset": "coco", "images": images}).encode()]


def _history() -> list[bytes]:
    rows = [
        {"kind": "step", "step": 1, "epoch": 0, "loss": 2.0},
        {"kind": "epoch", "step": 2, "epoch": 0, "train": {"loss": 2.0}, "improved": True},
        {"kind": "end", "step": 2, "epoch": 1, "stopped": "done", "interrupted": False},
    ]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def _images() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    pictures = {
        "RGB": Image.fromarray(noise),
        "L": Image.fromarray(noise[:, :, 0]),
        "P": Image.fromarray(noise).convert("P"),
        "RGBA": Image.fromarray(noise).convert("RGBA"),
        "I;16": Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257),
    }
    kinds = ["RGB JPEG", "L JPEG", "RGB PNG", "RGBA PNG", "P PNG", "I;16 PNG", "P GIF", "RGB BMP"]
    kinds += ["RGB TIFF", "I;16 TIFF", "RGB WEBP", "RGB PPM", "RGB TGA", "RGB JPEG2000", "RGB ICO"]
    found = []
    for kind in kinds:
        mode, form = kind.split()
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        pictures[mode].save(buffer, form, **({"exif": exif} if form in ("JPEG", "PNG") else {}))
        found.append(buffer.getvalue())
    return found


def _frequencies(folder: Path) -> list[bytes]:
    path = folder / "frequencies.npz"
    DocumentFrequencies.count({"1": ["a dog"], "2": ["a big dog", "cats"]}).save(path)
    return [path.read_bytes()]


# -- the readers ------------------------------------------------------------------------------


def _pictures_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        if not (folder / name).exists():
            Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def _resume(path: Path) -> None:
    _trainer().load_state_dict(read_file(path, FORM))


def _load_captioner(path: Path, saved: Path) -> None:
    """The file in place of that of a saved captioner."""
    folder = path.parent / "captioner"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    shutil.copy(path, folder / path.name)
    load_teacher(folder)


def _in_place_of(original: Path, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """A reader of a folder in which the damaged file takes the place of one of the same name."""

    def reader(path: Path) -> object:
        folder = path.parent / original.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        shutil.copy(path, folder / path.name)
        return read(folder)

    return reader


def _pretrained() -> list[bytes]:
    given = {"name_or_path_or_module": "bert", "prompt": "a photo of", "device_map": {"": 0}}
    return [json.dumps({"format": "capdistill.pretrained/1", **given}).encode()]


def _exported() -> list[bytes]:
    """The manifest of an export whose files are all empty."""
    empty = hashlib.sha256().hexdigest()
    manifest = Manifest(
        name="student",
        precision="float32",
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_inputs=("image_keys",),
        state=("state_h",),
        vocabulary=9,
        max_length=20,
        files={name: FileEntry(empty, 0) for name in REQUIRED},
        versions={"capdistill": "0.1.0", "opset": 18},
    )
    return [json.dumps(manifest.to_json()).encode()]


def _read_exported(path: Path) -> object:
    """The manifest, with the checksum that goes with its content: what is behind it is read too."""
    for name in REQUIRED:
        (path.parent / name).touch()
    try:
        content = json.loads(path.read_bytes())
        del content["checksum"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return read_exported(path.parent)


def _targets_of_teacher(folder: Path, pictures: Path) -> Path:
    """Cached targets of a teacher."""
    examples = [Example(f"{n}.jpg", pictures / f"{n}.jpg", ("a dog",)) for n in (1, 2)]
    teacher, place = tiny.make_teacher(), folder / "targets"
    cd.teachers.cache(teacher, CaptionData(examples), place, progress=False, device="cpu")
    return place


def _shard(folder: Path, pictures: Path) -> Path:
    examples = [Example(f"{n}.jpg", pictures / f"{n}.jpg", ("a dog",)) for n in (1, 2)]
    place = folder / "shards"
    cd.data.write_shards(CaptionData(examples), place, name="s", progress=False)
    cd.data.Shards(place)  # writes the index
    return place


def _read_shards(folder: Path) -> None:
    data = cd.data.Shards(folder)
    for number in range(len(data)):
        data[number]


def _ensemble(folder: Path) -> Path:
    place = folder / "ensemble"
    cd.teachers.Ensemble([toy(), toy(seed=1)]).save(place)
    return place


def _teacher_captions(folder: Path, pictures: Path) -> bytes:
    file = folder / "captions.jsonl"
    examples = [Example(f"{n}.jpg", pictures / f"{n}.jpg", ("a dog",)) for n in (1, 2)]
    cd.teachers.caption(toy(), CaptionData(examples), file, progress=False, device="cpu")
    return file.read_bytes()


def _run(path: Path) -> None:
    values = read_values(path)
    kind: Any = DistillRun if values.get("command") == "distill" else TrainRun
    parse_run(kind, values)


def _flickr8k(path: Path) -> None:
    _pictures_in(path.parent / "Images")
    cd.data.Flickr8k(path.parent)


def _subwords() -> list[bytes]:
    """A trimmed and an untrimmed tokenizer of each kind of model, small enough to be altered."""
    pieces = {piece: index for index, piece in enumerate(["</s>", "a", "b", "▁", "ab", "aab"])}
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    models: list[dict[str, Any]] = [
        {"type": "BPE", "vocab": pieces, "merges": [["a", "b"], ["a", "ab"]]},
        {"type": "Unigram", "vocab": [[piece, -1.0] for piece in pieces], "unk_id": 0},
    ]
    contents = []
    for model in models:
        content = {"version": "1.0", "model": model, "decoder": decoder, "pre_tokenizer": decoder}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tokenizer.json")
            path.write_text(json.dumps(content), encoding="utf-8")
            for keep in (None, ["ab a"]):
                cd.tokenizers.HuggingFace(path, keep).save(path.with_name("ours"))
                contents.append(path.with_name("ours").read_bytes())
    return contents


def _decode_with(path: Path) -> str:
    tokenizer = cd.tokenizers.load(path)
    tokenizer.encode("a ab </s> ä")
    return tokenizer.decode(range(len(tokenizer)))


def targets(folder: Path) -> Mapping[str, tuple[Target, Iterable[Callable[[list[bytes]], Any]]]]:
    """Every reader with the ways to damage its files.

    Args:
        folder: For files that the readers need beside the damaged one.
    """
    assert encoders.get("toy-patches") is Patches, "register it first"
    pictures = _pictures_in(folder / "pictures")
    saved = _saved(folder / "saved")

    def captioner(name: str) -> Target:
        return Target(
            lambda path: _load_captioner(path, saved), lambda: [(saved / name).read_bytes()], name
        )

    cached, ensemble = _targets_of_teacher(folder, pictures), _ensemble(folder)
    shards = _shard(folder, pictures)

    def folder_of(original: Path, name: str, read: Callable[[Path], object]) -> Target:
        reader = _in_place_of(original, read)
        return Target(reader, lambda: [(original / name).read_bytes()], name)

    csv = [b'image,caption\n1.jpg,a dog runs\n2.jpg,"a cat, two dogs"\n1.jpg,"he ""sat"""\n']
    tokens = [
        b"1.jpg#0\tA dog runs .\n1.jpg#1\tA dog .\n2.jpg#0\tA cat .\n3.jpg#0\tB\n4.jpg#0\tC\n",
        b"\xef\xbb\xbfimage,caption\r\n1.jpg,a dog\r\n2.jpg,a cat\r\n3.jpg,b\r\n4.jpg,c\r\n",
    ]
    folder_rows = [b'{"image": "1.jpg", "caption": "a dog"}\n{"image": "2.jpg", "caption": "b"}\n']
    captions = [b'[{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]']
    coco = folder / "coco.json"
    coco.write_bytes(_coco()[0])
    results = folder / "results.json"
    results.write_bytes(captions[0])
    words = [b'{"format": "capdistill.word_tokenizer/1", "max_length": 40, "words": ["a", "dog"]}']
    words = [*words, (saved / "tokenizer.json").read_bytes()]
    return {
        "training state": (Target(load_state, _state, "state.pt"), [damaged, repacked]),
        "state to resume": (Target(_resume, _state), [repacked]),
        "weights": (Target(read_state_dict, _weights), [damaged]),
        "zipped weights": (Target(read_state_dict, lambda: _weights()[:1]), [repacked]),
        "captioner.json": (captioner("captioner.json"), [damaged, altered]),
        "tokenizer.json": (captioner("tokenizer.json"), [damaged, altered]),
        "model.safetensors": (captioner("model.safetensors"), [damaged]),
        "tokenizer": (Target(WordTokenizer.load, lambda: words), [damaged, altered]),
        "subword tokenizer": (Target(_decode_with, _subwords), [damaged, altered]),
        "run file": (Target(_run, _run_files), [damaged, altered]),
        "history": (Target(History.load, _history), [damaged, lines_altered]),
        "flickr8k": (Target(_flickr8k, lambda: tokens[1:], "captions.txt"), [damaged]),
        "flickr8k tokens": (
            Target(_flickr8k, lambda: tokens[:1], "Flickr8k.token.txt"),
            [damaged],
        ),
        "csv": (
            Target(lambda path: cd.data.Folder(pictures, captions=path), lambda: csv, "c.csv"),
            [damaged],
        ),
        "json lines": (
            Target(lambda p: cd.data.Folder(pictures, captions=p), lambda: folder_rows, "c.jsonl"),
            [damaged, lines_altered],
        ),
        "coco": (
            Target(lambda path: cd.data.CocoCaptions(path, pictures), _coco),
            [damaged, altered],
        ),
        "karpathy": (
            Target(lambda path: cd.data.Karpathy(path, pictures), _karpathy),
            [damaged, altered],
        ),
        "results": (
            Target(lambda path: read_coco_results(coco, path), lambda: captions),
            [damaged, altered],
        ),
        "references": (Target(lambda p: read_coco_results(p, results), _coco), [damaged, altered]),
        "document frequencies": (
            Target(DocumentFrequencies.load, lambda: _frequencies(folder), "f.npz"),
            [damaged, repacked],
        ),
        "image": (Target(read_image, _images), [damaged]),
        "ensemble.json": (
            folder_of(ensemble, "ensemble.json", load_teacher),
            [damaged, altered],
        ),
        "shard": (folder_of(shards, "s-000000.tar", _read_shards), [damaged]),
        "index of a shard": (
            folder_of(shards, "s-000000.tar.index.json", _read_shards),
            [damaged, altered],
        ),
        "teacher captions": (
            Target(read_rows, lambda: [_teacher_captions(folder, pictures)]),
            [damaged, lines_altered],
        ),
        "captions of an API": (
            Target(read_texts, lambda: [b'{"image": "1.jpg", "captions": ["a dog"]}\n' * 3]),
            [damaged, lines_altered],
        ),
        "pretrained.json": (
            Target(lambda path: read_pretrained(path.parent), _pretrained, "pretrained.json"),
            [damaged, altered],
        ),
        "exported manifest": (
            Target(_read_exported, _exported, "manifest.json"),
            [damaged, altered],
        ),
        **{
            f"cached {name}": (
                folder_of(cached, name, cd.teachers.CachedTeacher),
                [damaged, lines_altered if name.endswith("jsonl") else altered],
            )
            for name in ("targets.json", "index.jsonl")
        },
    }
