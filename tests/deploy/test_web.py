"""What `write_page` puts into a directory, and what it refuses. The graphs here are no graphs."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import capdistill as cd
from capdistill.deploy.manifest import REQUIRED, FileEntry, Manifest, write_directory
from capdistill.errors import CheckpointError, ConfigError
from capdistill.generation.config import GenerationSpec
from tests.deploy.javascript import PAGE


def export_stub(directory: Path, **options: Any) -> Path:
    """An export whose graphs are some text."""
    spec = GenerationSpec.from_ids(1, 2, 9, **options)

    def fill(folder: Path) -> Manifest:
        for name in (*REQUIRED, "greedy.onnx"):
            (folder / name).write_text(f"content of {name}")
        content = {**asdict(spec), "config": spec.config.model_dump(mode="json")}
        (folder / "generation.json").write_text(json.dumps(content))
        return Manifest(
            *("stub", "float32", 32, (0.5,) * 3, (0.5,) * 3, ("image_keys",), ("state_h",), 9, 9),
            files={path.name: FileEntry.measured(path) for path in folder.iterdir()},
            versions={"capdistill": "0"},
        )

    write_directory(directory, fill)
    return directory


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    return export_stub(tmp_path / "exported")


@pytest.fixture
def ort(tmp_path: Path) -> Path:
    """A directory that has the names of onnxruntime-web's files."""
    (tmp_path / "dist").mkdir()
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort.all.js"):
        (tmp_path / "dist" / name).write_text(f"content of {name}")
    return tmp_path / "dist"


def listed(directory: Path) -> set[str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix() for path in paths}


def integrity(path: Path) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()


def test_a_page_is_its_own_files_and_the_graphs_it_runs(stub: Path, tmp_path: Path) -> None:
    page = cd.deploy.write_page(stub, tmp_path / "page").parent
    model = {f"model/{name}" for name in (*REQUIRED, "manifest.json")}  # without greedy.onnx
    assert listed(page) == {path.name for path in PAGE.iterdir()} | model | {"page.json"}
    for name in REQUIRED:
        assert (page / "model" / name).read_bytes() == (stub / name).read_bytes()


def test_without_a_directory_the_runtime_comes_from_the_cdn_with_its_hashes(
    stub: Path, tmp_path: Path
) -> None:
    cd.deploy.write_page(stub, tmp_path / "page")
    runtime = json.loads((tmp_path / "page" / "page.json").read_text())["onnxruntime"]
    for entry in runtime.values():
        assert re.match(r"https://[\w.]+/npm/onnxruntime-web@\d+\.\d+\.\d+/dist/", entry["url"])
        assert len(base64.b64decode(entry["integrity"].removeprefix("sha384-"))) == 384 // 8


def test_with_a_directory_the_runtime_is_part_of_the_page(
    stub: Path, ort: Path, tmp_path: Path
) -> None:
    page = cd.deploy.write_page(stub, tmp_path / "page", ort=ort).parent
    runtime = json.loads((page / "page.json").read_text())["onnxruntime"]
    assert {path.name for path in (page / "ort").iterdir()} == {
        "ort.wasm.bundle.min.mjs",
        "ort-wasm-simd-threaded.wasm",
    }
    for entry in runtime.values():
        assert entry["integrity"] == integrity(page / entry["url"])


def test_an_earlier_page_is_replaced(stub: Path, ort: Path, tmp_path: Path) -> None:
    page = cd.deploy.write_page(stub, tmp_path / "page", ort=ort).parent
    other = export_stub(tmp_path / "other", no_repeat_ngram=3)
    cd.deploy.write_page(other, page)
    assert not (page / "ort").exists()
    assert json.loads((page / "model" / "generation.json").read_text())["config"]["no_repeat_ngram"]


def test_an_earlier_page_is_kept_where_the_disk_is_full(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = cd.deploy.write_page(stub, tmp_path / "page").parent
    before = {path: (page / path).read_bytes() for path in listed(page)}
    other, copy = export_stub(tmp_path / "other", no_repeat_ngram=3), shutil.copyfile

    def full(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name == "step.onnx":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for target in (page, tmp_path / "new"):
        with pytest.raises(ConfigError, match=rf"{target}: No space left.*has space"):
            cd.deploy.write_page(other, target)
    assert {path: (page / path).read_bytes() for path in listed(page)} == before
    monkeypatch.undo()
    cd.deploy.write_page(other, tmp_path / "new")


def test_every_file_of_the_page_is_kept_for_visits_without_a_network() -> None:
    text = (PAGE / "offline.js").read_text()
    kept = set(re.findall(r'"([^"]+)"', text[text.index("SHELL = [") : text.index("];")]))
    own = {path.name for path in PAGE.iterdir()} - {"index.html", "offline.js"}
    assert kept == own | {"./", "page.json"}


def test_modules_import_names_that_the_others_export() -> None:
    imported = 0
    for module in PAGE.glob("*.js"):
        for names, source in re.findall(
            r'import \{ ([^}]+) \} from "\./([^"]+)"', module.read_text()
        ):
            exported = (PAGE / source).read_text()
            for name in names.split(", "):
                assert re.search(rf"export (async )?function {name}\(", exported), (module, name)
                imported += 1
    assert imported > 8


def test_labels_and_ids_of_the_page_exist() -> None:
    html = (PAGE / "index.html").read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    used = set(re.findall(r'element\("([^"]+)"\)', (PAGE / "page.js").read_text()))
    assert used <= ids
    assert set(re.findall(r'\bfor="([^"]+)"', html)) <= ids


@pytest.mark.parametrize("option", [{"beam_size": 3}, {"sample": True}])
def test_a_search_that_the_page_does_not_do_is_refused(
    option: dict[str, Any], tmp_path: Path
) -> None:
    exported = export_stub(tmp_path / "exported", **option)
    name, value = next(iter(option.items()))
    with pytest.raises(ConfigError, match=f"was exported with {name}={value}, but the page"):
        cd.deploy.write_page(exported, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_directory_without_the_runtime_is_refused(stub: Path, ort: Path, tmp_path: Path) -> None:
    (ort / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(ConfigError, match=r"no ort-wasm-simd-threaded.wasm.*npm install"):
        cd.deploy.write_page(stub, tmp_path / "page", ort=ort)


def test_a_directory_with_other_files_is_left_alone(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no page"):
        cd.deploy.write_page(stub, tmp_path / "site")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        cd.deploy.write_page(stub, tmp_path / "site" / "index.html")
    assert listed(tmp_path / "site") == {"index.html"}
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_a_damaged_export_is_refused(stub: Path, tmp_path: Path) -> None:
    (stub / "step.onnx").write_text("content of step.ONNX")
    with pytest.raises(CheckpointError, match=r"step\.onnx has changed"):
        cd.deploy.write_page(stub, tmp_path / "page")
    with pytest.raises(CheckpointError, match="holds no exported captioner"):
        cd.deploy.write_page(tmp_path / "nothing", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_page_is_not_written_from_its_own_copy(stub: Path, tmp_path: Path) -> None:
    page = cd.deploy.write_page(stub, tmp_path / "page").parent
    (stub / "greedy.onnx").rename(page / "model" / "greedy.onnx")
    before = listed(page)
    with pytest.raises(ConfigError, match=r"model is inside .*page, whose files are replaced"):
        cd.deploy.write_page(page / "model", page)
    assert listed(page) == before
