"""An exported captioner gives the captions of torch, without torch."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import capdistill as cd
from capdistill.cli import main
from capdistill.data.images import centre_square, read_image
from capdistill.deploy import OnnxCaptioner, onnx_captioner
from capdistill.deploy.constraints import saved_spec
from capdistill.deploy.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from capdistill.errors import CheckpointError, ConfigError, DataError, MissingExtra
from capdistill.generation import GenerationConfig, GenerationSpec
from capdistill.generation.hypotheses import CaptionResult, Hypothesis
from capdistill.generation.words import SubwordRules
from tests.deploy.conftest import Exported

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"beam_size": 3, "num_return": 3},
    "exact": {"beam_size": 2, "early_stopping": "never", "length_normalisation": "gnmt"},
    "wide": {"beam_size": 20, "num_return": 20, "max_length": 3},  # more than words
    "short": {"beam_size": 2, "max_length": 1},
    "groups": {"beam_size": 4, "beam_groups": 2, "diversity_penalty": 0.5, "num_return": 2},
    "sample": {"sample": True, "num_return": 3, "temperature": 2.0, "top_p": 0.9, "seed": 5},
    "words": {
        **{"beam_size": 2, "banned_words": ["cat", "red dog"], "prefix": "a", "min_length": 2},
        **{"not_last": "function_words", "no_repeat_ngram": 2, "max_length": 5},
    },
}


def noise(count: int = 5) -> list[np.ndarray[Any, Any]]:
    """Pictures of various sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (9 + 7 * i, 40 - 5 * i, 3), np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def loaded(exported: Exported) -> OnnxCaptioner:
    return OnnxCaptioner.load(exported.directory, threads=1)


def assert_same(found: CaptionResult | Hypothesis, expected: CaptionResult | Hypothesis) -> None:
    assert (found.text, found.tokens) == (expected.text, expected.tokens)
    assert found.finished == expected.finished
    assert found.token_log_probs == pytest.approx(expected.token_log_probs, abs=1e-4)
    assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_captions_and_their_probabilities_are_those_of_torch(
    exported: Exported, loaded: OnnxCaptioner, mode: str
) -> None:
    wanted = exported.captioner.caption(noise(), details=True, **MODES[mode])
    found = loaded.caption(noise(), details=True, **MODES[mode])
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same(mine, theirs)
        for mine_too, theirs_too in zip(mine.n_best, theirs.n_best, strict=True):
            assert_same(mine_too, theirs_too)
        assert np.array_equal(mine.image, theirs.image.numpy())
    assert loaded.caption(noise(), **MODES[mode]) == [each.text for each in wanted]


@pytest.mark.parametrize("mode", ["greedy", "beam", "sample"])
def test_an_image_gets_the_same_caption_alone_and_in_a_batch(
    loaded: OnnxCaptioner, mode: str
) -> None:
    together = loaded.caption(noise(), **MODES[mode])
    assert together == [loaded.caption(each, **MODES[mode]) for each in noise()]
    assert together == loaded.caption(noise(), batch_size=2, **MODES[mode])


def test_threads_of_a_program_share_it(loaded: OnnxCaptioner) -> None:
    expected = loaded.caption(noise(), **MODES["beam"])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: loaded.caption(noise(), **MODES["beam"]), range(8)))
    assert found == [expected] * 8


def forms(folder: Path) -> Iterator[Any]:
    """Pictures in forms that need more than a look at their bytes."""
    base = Image.fromarray(noise()[2])
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("RGB").quantize(8).save(folder / "palette.png")
    clear = base.convert("RGBA")
    clear.putalpha(90)
    clear.save(folder / "clear.png")
    deep = np.random.default_rng(1).integers(0, 2**16, (30, 20), np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    yield from sorted(folder.iterdir())
    yield (folder / "clear.png").read_bytes()
    yield io.BytesIO((folder / "turned.jpg").read_bytes())
    yield base.convert("L")
    yield deep
    yield noise()[3] / 255
    yield torch.from_numpy(noise()[1]).permute(2, 0, 1)
    yield {"bytes": (folder / "cmyk.jpg").read_bytes()}


def test_every_form_of_an_image_becomes_the_pixels_that_torch_sees(
    loaded: OnnxCaptioner, tmp_path: Path
) -> None:
    for place, form in enumerate(forms(tmp_path)):
        again = next(itertools.islice(forms(tmp_path), place, None))  # a file is read once
        wanted = centre_square(read_image(again), loaded.image_size)
        assert np.array_equal(loaded.caption(form, details=True).image, wanted.numpy())


def test_a_stream_is_read_as_it_is_needed(loaded: OnnxCaptioner) -> None:
    first, second = itertools.islice(
        loaded.caption_stream(map(noise().__getitem__, itertools.count()), batch_size=1), 2
    )
    assert [first, second] == loaded.caption(noise(2))
    assert loaded.caption([]) == []


def test_an_image_that_cannot_be_read_is_named_or_skipped(
    loaded: OnnxCaptioner, tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    images = [noise()[0], tmp_path / "broken.jpg"]
    with pytest.raises(DataError, match=r"broken\.jpg"):
        loaded.caption(images)
    with pytest.warns(UserWarning, match=r"image 1 was left out: .*broken\.jpg"):
        texts = loaded.caption(images, errors="skip")
    assert texts == [loaded.caption(noise()[0]), None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam_sizes": 3},
        {"beam_size": 0},
        {"batch_size": 0},
        {"errors": "ignore"},
        {"prefix": "zebra"},
        {"generation": 3},
        {"banned_words": ["a", "dog", "cat", "runs", "sits", "red"], "max_length": 1, "top_p": 2},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options_are_refused_as_with_torch(
    exported: Exported, loaded: OnnxCaptioner, wrong: dict[str, Any]
) -> None:
    errors = []
    for captioner in (exported.captioner, loaded):
        with pytest.raises(ConfigError) as caught:
            captioner.caption(noise()[0], **wrong)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_pixels_of_another_size_are_refused(loaded: OnnxCaptioner) -> None:
    size = loaded.image_size
    with pytest.raises(DataError, match=rf"expected an array of NumPy, uint8 \(I, 3, {size}, "):
        loaded.generate(np.zeros((2, 3, size + 1, size + 1), np.uint8))
    with pytest.raises(DataError, match="float32"):
        loaded.generate(np.zeros((2, 3, size, size), np.float32))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"list \(\) was given"):
        loaded.generate([noise()[0]])  # type: ignore[arg-type]
    assert loaded.generate(np.zeros((0, 3, size, size), np.uint8)) == []


# -- the directory ---------------------------------------------------------------------------


@pytest.fixture
def copied(exported_lstm: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_lstm.directory, tmp_path / "copy"))


def list_again(directory: Path) -> None:
    """Write the manifest of files that were changed on purpose."""
    manifest = Manifest.of(json.loads((directory / MANIFEST).read_text()))
    files = {name: FileEntry.measured(directory / name) for name in manifest.files}
    changed = replace(manifest, files=files)
    (directory / MANIFEST).write_text(json.dumps(changed.to_json()))


def test_the_options_that_were_exported_are_the_default(
    exported_lstm: Exported, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"beam_size": 2, "prefix": "a dog"}
    content = json.loads((copied / "generation.json").read_text())
    ids = [exported_lstm.captioner.tokenizer.vocabulary.index(word) for word in ("a", "dog")]
    content |= {"config": {**content["config"], **options}, "prefix": ids}
    (copied / "generation.json").write_text(json.dumps(content))
    list_again(copied)
    loaded = OnnxCaptioner.load(copied)
    whole = exported_lstm.captioner.caption(noise(), **options)  # type: ignore[arg-type]
    assert loaded.caption(noise()) == whole
    assert loaded.caption(noise(), generation={}) == exported_lstm.captioner.caption(noise())
    wider = exported_lstm.captioner.caption(noise(), prefix="a dog", beam_size=4, max_length=6)
    monkeypatch.setattr(cd.WordTokenizer, "encode", None)  # subwords need a library for it
    assert loaded.caption(noise(), beam_size=4, max_length=6) == wider


def test_options_that_concern_subwords_survive_their_file(copied: Path) -> None:
    rules = SubwordRules(banned_first=((4,), (5, 6)), not_last=((7, 8),), added=(4,), run_on=(5, 9))
    config = GenerationConfig(min_length=2, banned_words=["dog"], prefix="a cat")
    lists = {"banned": (0, 1), "phrases": ((4, 5), (6,)), "not_last": (7,), "prefix": (4, 5)}
    spec = GenerationSpec(1, 2, 9, config, subwords=rules, **lists)
    content = {**asdict(spec), "config": config.model_dump(mode="json"), "pad_id": 0}
    (copied / "generation.json").write_text(json.dumps(content))
    list_again(copied)
    manifest = replace(read_manifest(copied), vocabulary=10, max_length=9)
    assert saved_spec(copied / "generation.json", manifest) == spec


@pytest.mark.parametrize("name", ["encoder.onnx", "step.onnx", "tokenizer.json", "generation.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_directory_is_refused_by_name(copied: Path, name: str, damage: str) -> None:
    content = bytearray((copied / name).read_bytes())
    if damage == "missing":
        (copied / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (copied / name).write_bytes(content if damage == "changed" else content[:-9])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        OnnxCaptioner.load(copied)


@pytest.mark.parametrize("name", ["encoder.onnx", "tokenizer.json", "generation.json"])
def test_files_that_hold_something_else_are_refused_by_name(copied: Path, name: str) -> None:
    (copied / name).write_text("{}")
    list_again(copied)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        OnnxCaptioner.load(copied)


@pytest.mark.parametrize("name", ["encoder.onnx", "step.onnx", "tokenizer.json"])
def test_a_file_of_another_captioner_is_refused_by_name(
    exported_transformer: Exported, copied: Path, name: str
) -> None:
    if name == "tokenizer.json":
        cd.WordTokenizer(["one", "two"]).save(copied / name)
    else:
        shutil.copy(exported_transformer.directory / name, copied / name)
    list_again(copied)
    with pytest.raises(CheckpointError, match=rf"{name} is of another captioner than .*manifest"):
        OnnxCaptioner.load(copied)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda content: content["image"].update(size=10**9), "encoder.onnx"),
        (lambda content: content.update(state=["state_h"]), "encoder.onnx"),
        (lambda content: content.update(image_inputs=[]), "encoder.onnx"),
        (lambda content: content.update(vocabulary=99), "step.onnx"),
        (lambda content: content.update(max_length=10**9), "generation.json"),
    ],
)
def test_a_manifest_that_does_not_fit_the_graphs_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object], name: str
) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    change(content)
    (copied / MANIFEST).write_text(json.dumps(content))
    list_again(copied)
    with pytest.raises(CheckpointError, match=name):
        OnnxCaptioner.load(copied)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start_id": 10},
        {"end_id": None},
        {"max_length": True},
        {"max_length": 10**12},
        {"banned": [-1]},
        {"banned": "ab"},
        {"banned": [*range(10)]},
        {"phrases": [[]]},
        {"phrases": [4]},
        {"prefix": ["a"]},
        {"config": None},
        {"subwords": {"added": [10]}},
        {"subwords": {"unknown": []}},
    ],
    ids=str,
)
def test_options_in_ids_that_cannot_be_are_refused(copied: Path, wrong: dict[str, Any]) -> None:
    content = json.loads((copied / "generation.json").read_text())
    (copied / "generation.json").write_text(json.dumps({**content, **wrong}))
    list_again(copied)
    with pytest.raises(CheckpointError, match=r"generation\.json does not hold options"):
        OnnxCaptioner.load(copied)


def test_a_newer_directory_is_refused(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        OnnxCaptioner.load(copied)


@pytest.mark.parametrize("again", [True, False], ids=["replaced", "half replaced"])
def test_a_directory_that_is_exported_again_meanwhile_is_refused(
    copied: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of two exports of one architecture fit together, and caption wrongly."""
    read = onnx_captioner._session

    def during(path: Path, threads: int | None) -> Any:
        if path.name == "step.onnx" and again:
            (copied / "encoder.onnx").write_bytes((copied / "greedy.onnx").read_bytes())
            list_again(copied)
        elif path.name == "step.onnx":
            (copied / MANIFEST).unlink()
        return read(path, threads)

    monkeypatch.setattr(onnx_captioner, "_session", during)
    with pytest.raises(CheckpointError, match="exported again while it was being read"):
        OnnxCaptioner.load(copied)


def test_no_directory_and_no_threads_are_refused(exported_lstm: Exported, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no exported captioner"):
        OnnxCaptioner.load(tmp_path)
    for threads in (0, 257):
        with pytest.raises(ConfigError, match=f"threads={threads}"):
            OnnxCaptioner.load(exported_lstm.directory, threads=threads)


def test_without_onnx_runtime_it_says_what_to_install(
    exported_lstm: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="pip install onnxruntime"):
        OnnxCaptioner.load(exported_lstm.directory)


def test_without_tqdm_a_bar_is_refused(
    loaded: OnnxCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtra, match=r"pip install tqdm.*leave progress out"):
        loaded.caption(noise(), progress=True)


def test_a_copy_and_a_pickled_one_caption_as_it_does(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported.directory)
    loaded = OnnxCaptioner.load(".", threads=2)
    data = pickle.dumps(loaded)
    monkeypatch.chdir(tmp_path)
    expected = loaded.caption(noise(), beam_size=2)
    for again in (pickle.loads(data), copy.deepcopy(loaded), copy.copy(loaded)):
        assert again.caption(noise(), beam_size=2) == expected


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu avx2 avx512f", True),
        ("AMD64", "fpu avx2 avx512f avx512_vnni", False),
        ("x86_64", "fpu avx2 avx_vnni", False),
        ("x86_64", None, True),  # unknown
        ("aarch64", "fp asimd", False),
    ],
)
def test_sums_of_8_bits_are_exact_and_only_slow_where_they_must_be(
    machine: str,
    flags: str | None,
    expected: bool,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With VNNI the switch would make an encoder more than twice as slow, and change nothing."""
    place = tmp_path / "cpuinfo"
    if flags is not None:
        place.write_text(f"model name\t: One\nflags\t\t: {flags}\n")
    monkeypatch.setattr("capdistill.deploy.onnx_captioner.CPUINFO", place)
    monkeypatch.setattr("platform.machine", lambda: machine)
    options = OnnxCaptioner.load(copied)._encoder.get_session_options()
    if expected:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")


def test_graphs_need_no_operator_that_older_versions_of_onnx_runtime_lack(
    exported: Exported,
) -> None:
    onnx = pytest.importorskip("onnx")
    for name in ("encoder.onnx", "step.onnx"):
        kinds = {node.op_type for node in onnx.load(exported.directory / name).graph.node}
        assert "Cos" not in kinds  # in float64, of the Transformer's positions


# -- without torch ---------------------------------------------------------------------------

PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, *sys.argv[3].split(",")}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from capdistill.deploy import OnnxCaptioner, onnx_captioner

captioner = OnnxCaptioner.load(sys.argv[1], threads=1)
print(captioner.caption(sys.argv[2]))
print(captioner.caption(sys.argv[2], beam_size=3, banned_words=["cat"]))
from capdistill.cli import main
assert main(["caption", sys.argv[1], sys.argv[2]]) == 0
assert main(["evaluate", sys.argv[1], "--data", "sample"]) == 1
"""


def test_numpy_pillow_and_onnx_runtime_are_all_that_it_needs(
    exported_lstm: Exported, tmp_path: Path
) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(noise()[1]).save(path)
    needed = "capdistill,numpy,PIL,onnxruntime"
    program = [sys.executable, "-c", PROGRAM, str(exported_lstm.directory), str(path), needed]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    captioner: cd.Captioner = exported_lstm.captioner
    wanted = captioner.caption(path), captioner.caption(path, beam_size=3, banned_words=["cat"])
    assert done.stdout.splitlines() == [*wanted, f"{path}\t{wanted[0]}"], done.stderr
    assert "package pydantic is not installed" in done.stderr
    assert "Traceback" not in done.stderr


# -- on the command line -----------------------------------------------------------------------


def test_the_command_caption_reads_an_exported_captioner(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [str(example.path) for example in cd.data.sample().val.examples[:3]]
    command = ["caption", str(exported.directory), *photos, "--beam-size", "2", "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == photos
    assert [row["caption"] for row in rows] == exported.captioner.caption(photos, beam_size=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--attention", "maps/map"], "--attention: .*is exported. Give the captioner itself"),
        (["--data", "sample"], "--data: .*is exported. Give the captioner itself"),
        (["--out", "captions.jsonl"], "--out: .*is exported"),
        (["--device", "cuda"], "an exported captioner runs on the CPU"),
    ],
)
def test_what_an_exported_captioner_cannot_do_is_refused_on_the_command_line(
    exported_lstm: Exported, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(cd.data.sample().val.examples[0].path)
    assert main(["caption", str(exported_lstm.directory), photo, *given]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx", "step.onnx"])
def test_the_command_caption_names_what_half_a_copy_lacks(
    copied: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / name).unlink()
    photo = str(cd.data.sample().val.examples[0].path)
    assert main(["caption", str(copied), photo]) == 1
    assert re.search(f"{name}( is missing|\\. Write one)", capsys.readouterr().err)


def test_a_command_that_needs_the_captioner_itself_says_what_was_given(
    exported_lstm: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(exported_lstm.directory), "--data", "sample"]) == 1
    assert "is an exported captioner" in capsys.readouterr().err
