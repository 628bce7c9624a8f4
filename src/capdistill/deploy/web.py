"""`write_page`: an exported captioner as a static web page, by ONNX Runtime Web.

The page itself, plain JavaScript, is in the directory `page` beside this file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from capdistill.deploy import manifest as files
from capdistill.deploy.constraints import saved_spec
from capdistill.errors import CheckpointError, ConfigError
from capdistill.files import (
    from_json,
    remove_abandoned,
    system_error,
    temporary_name,
    user_path,
    write_text,
)

ONNXRUNTIME_WEB = "1.30.0"  # the version that the page is tested with
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ONNXRUNTIME_WEB}/dist"
_MODULE, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_INTEGRITY = {
    _MODULE: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    _WASM: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
_COPIED = (files.ENCODER, files.STEP, files.TOKENIZER, files.GENERATION, files.MANIFEST)
_FORMAT = "capdistill.page/1"
_ABOUT = "page.json"  # which ONNX Runtime the page loads; it also marks the directory as ours
_MODEL, _RUNTIME = "model", "ort"


def write_page(
    exported: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    ort: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a web page that captions photos in the browser, word by word.

    Any web server can serve the directory as it is; nothing runs on the server, and photos stay on
    the visitor's device. The page decodes greedily, with the other options of the export. It cuts
    and scales a photo to the same pixels as `Captioner.caption`.

    Without `ort`, the page loads ONNX Runtime Web from the CDN jsDelivr, in one version whose
    hashes it checks. With `ort`, everything is in the directory and no other server is contacted.

    Example:
        `write_page("exported/student", "page")`, then `python -m http.server -d page`

    Args:
        exported: The directory that `export` wrote.
        directory: Where the page goes; an earlier page there is replaced.
        ort: The files of the npm package onnxruntime-web, `node_modules/onnxruntime-web/dist`.

    Returns:
        The file index.html.

    Raises:
        CheckpointError: `exported` is no exported captioner, or is damaged.
        ConfigError: the captioner samples or searches with beams, `ort` lacks a file, or the
            directory holds something else or cannot be written.
    """
    source, target = user_path(exported, CheckpointError), user_path(directory)
    _require_supported(source, files.read_manifest(source))
    require_page(source, target, ort)
    try:
        _write(source, target, None if ort is None else _runtime_files(user_path(ort)))
    except (OSError, ConfigError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ConfigError(
            f"The page cannot be written to {target}: {cause.strerror or cause}. Give a directory "
            "that exists or can be created, is writable and has space."
        ) from cause
    return target / "index.html"


def require_page(
    exported: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    ort: str | os.PathLike[str] | None = None,
) -> None:
    """Check where a page goes and its runtime, which can be done before the export.

    Args:
        exported, directory, ort: As for `write_page`.

    Raises:
        ConfigError: `ort` lacks a file, or the directory holds something else.
    """
    source, target = user_path(exported), user_path(directory)
    if ort is not None:
        _runtime_files(user_path(ort))
    if source.resolve().is_relative_to(target.resolve()):
        raise ConfigError(
            f"write_page: {source} is inside {target}, whose files are replaced. Give the "
            "directory of the export itself, or another one for the page."
        )
    _require_free(target)


def _require_supported(source: Path, manifest: files.Manifest) -> None:
    config = saved_spec(source / files.GENERATION, manifest).config
    if config.sample or config.beam_size > 1:
        option = "sample=True" if config.sample else f"beam_size={config.beam_size}"
        raise ConfigError(
            f"write_page: {source} was exported with {option}, but the page takes the most "
            "probable word at every step. Export the captioner for the page with beam_size=1 and "
            "sample=False."
        )


def _runtime_files(directory: Path) -> dict[str, Path]:
    found = {name: directory / name for name in _INTEGRITY}
    missing = [name for name, path in found.items() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{directory} has no {missing[0]}. Give the directory "
            "node_modules/onnxruntime-web/dist, after "
            f"'npm install onnxruntime-web@{ONNXRUNTIME_WEB}'."
        )
    return found


def _require_free(target: Path) -> None:
    """Refuse a directory that holds anything but an earlier page."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; give a directory for the page.")
    if any(target.iterdir()) and not _is_page(target):
        raise ConfigError(
            f"{target} is not empty and holds no page of write_page. Give another directory."
        )


def _is_page(target: Path) -> bool:
    try:
        content = from_json((target / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def _write(source: Path, target: Path, runtime: dict[str, Path] | None) -> None:
    """An earlier page stays as it is until all files of the new one are on the disk."""
    about = json.dumps(_about(runtime), indent=2) + "\n"
    if not _is_page(target):
        write_text(target / _ABOUT, about)  # it is ours from now
    remove_abandoned(target)
    staged = target / temporary_name("page")
    try:
        staged.mkdir()
        write_text(staged / _ABOUT, about)
        _fill(staged, source, runtime)
        _put_in_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fill(folder: Path, source: Path, runtime: dict[str, Path] | None) -> None:
    (folder / _MODEL).mkdir()
    for name in _COPIED:
        shutil.copyfile(source / name, folder / _MODEL / name)
    if runtime is not None:
        (folder / _RUNTIME).mkdir()
        for name, path in runtime.items():
            shutil.copyfile(path, folder / _RUNTIME / name)
    for each in resources.files("capdistill.deploy").joinpath("page").iterdir():
        (folder / each.name).write_bytes(each.read_bytes())


def _put_in_place(staged: Path, target: Path) -> None:
    for folder in (_MODEL, _RUNTIME):
        shutil.rmtree(target / folder, ignore_errors=True)
    for each in sorted(staged.iterdir(), key=lambda path: path.name == "index.html"):
        each.replace(target / each.name)  # index.html comes last


def _about(runtime: dict[str, Path] | None) -> dict[str, Any]:
    """The content of page.json."""

    def entry(name: str) -> dict[str, str]:
        if runtime is None:
            return {"url": f"{_CDN}/{name}", "integrity": _INTEGRITY[name]}
        digest = hashlib.sha384(runtime[name].read_bytes()).digest()
        integrity = f"sha384-{base64.b64encode(digest).decode()}"
        return {"url": f"{_RUNTIME}/{name}", "integrity": integrity}

    return {"format": _FORMAT, "onnxruntime": {"module": entry(_MODULE), "wasm": entry(_WASM)}}
