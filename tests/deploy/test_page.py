"""The page in a browser: photos get the captions that Python gives them.

Needs chromium, chromedriver, and the files of the npm package onnxruntime-web in the directory that
CAPDISTILL_ORT_WEB names (node_modules/onnxruntime-web/dist).
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import capdistill as cd
from capdistill.data.pixels import read_pixels, square_pixels
from capdistill.deploy.manifest import FileEntry
from tests.deploy import browser as chromium

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow

PRESETS = {"LSTM": "debug_student", "Transformer": "debug_teacher"}


class Shown(NamedTuple):
    """A page in a browser, with the captioner behind it.

    Args:
        captioner: In Python.
        window: Has loaded the page.
        stop: Stops the web server.
        directory: Of the page.
    """

    captioner: cd.Captioner
    window: chromium.Browser
    stop: Callable[[], None]
    directory: Path

    def choose(self, photo: Path) -> str:
        """The caption of a photo that is chosen."""
        return self.caption(lambda: self.window.choose("#file", photo))

    def caption(self, act: Callable[[], object]) -> str:
        """The caption that appears after an action."""
        self.window.run("document.getElementById('spoken').textContent = ''")
        act()
        text = self.window.wait("document.getElementById('spoken').textContent")
        assert text == self.window.run("return document.getElementById('caption').textContent")
        assert text == self.window.run("return document.getElementById('photo').alt")
        return str(text)


@pytest.fixture(scope="module")
def ort() -> Path:
    if reason := chromium.missing():
        pytest.skip(reason)
    if not (found := os.environ.get("CAPDISTILL_ORT_WEB")):
        pytest.skip("needs onnxruntime-web of npm: CAPDISTILL_ORT_WEB is its directory dist")
    return Path(found)


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    return [Path(str(example.path)) for example in cd.data.sample().val.examples[:3]]


@pytest.fixture(scope="module", params=PRESETS)
def shown(
    request: pytest.FixtureRequest, ort: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("shown")
    captioner = make_captioner(PRESETS[request.param])
    cd.deploy.export(captioner, folder / "exported", progress=False)
    page = cd.deploy.write_page(folder / "exported", folder / "page", ort=ort).parent
    with chromium.served(page) as (url, stop), chromium.browser(folder / "profile") as window:
        window.open(url)
        window.wait("document.getElementById('name').textContent !== '…'")
        yield Shown(captioner, window, stop, page)


def make_captioner(preset: str) -> cd.Captioner:
    """With random weights, large enough to give photos different captions."""
    torch.manual_seed(0)
    words = cd.WordTokenizer.train(cd.data.sample().train.captions, max_length=12)
    captioner = cd.Captioner.create(preset, tokenizer=words).eval()
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(2.0)
    return captioner


def test_a_chosen_photo_gets_the_caption_of_python(shown: Shown, photos: list[Path]) -> None:
    expected = shown.captioner.caption(photos)
    assert len(set(expected)) > 1
    assert [shown.choose(photo) for photo in photos] == expected


DROP = """
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }));
    const options = { dataTransfer: files, bubbles: true, cancelable: true };
    for (const kind of ["dragover", "drop"]) {
      document.getElementById("area").dispatchEvent(new DragEvent(kind, options));
    }
"""


def test_a_dropped_photo_gets_the_caption_of_python(shown: Shown, photos: list[Path]) -> None:
    data = base64.b64encode(photos[1].read_bytes()).decode()
    assert shown.caption(lambda: shown.window.run(DROP, data)) == shown.captioner.caption(photos[1])


def test_words_appear_one_by_one(shown: Shown, photos: list[Path]) -> None:
    shown.window.run("""
        window.seen = [];
        const caption = document.getElementById("caption");
        new MutationObserver(() => seen.push(caption.textContent))
          .observe(caption, { childList: true, characterData: true, subtree: true });
    """)
    words = shown.choose(photos[0]).split()
    seen = [text for text in shown.window.run("return window.seen") if text]
    assert [*dict.fromkeys(seen)] == [" ".join(words[: n + 1]) for n in range(len(words))]


def test_a_photo_of_the_camera_is_captioned(shown: Shown) -> None:
    """Chromium's false camera shows a picture that moves, so its caption is not known."""

    def take() -> None:
        shown.window.run("document.getElementById('take').click()")
        shown.window.wait("document.querySelector('video').videoWidth > 0")
        shown.window.run("document.querySelector('#camera [value=take]').click()")

    assert shown.caption(take).split()
    assert shown.window.run("return document.getElementById('photo').naturalWidth") > 300
    assert shown.window.run("return document.querySelector('video').srcObject") is None  # it is off


def test_a_file_that_is_no_image_is_reported(shown: Shown, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("These are notes.")
    shown.window.choose("#file", tmp_path / "notes.jpg")
    status = "document.getElementById('status')"
    shown.window.wait(f"{status}.className === 'error'")
    assert "cannot read the file as an image" in shown.window.run(f"return {status}.textContent")
    assert shown.window.run("return document.getElementById('result').hidden")


def encoded(kind: str) -> bytes:
    """A picture with smooth and sharp parts in one of many encodings."""
    y, x = np.mgrid[0:75, 0:101]
    waves = np.stack([128 + 120 * np.sin(x / 9 + k) * np.cos(y / (5 + k)) for k in range(3)], 2)
    waves[20:50, 30:70] = (250, 10, 60)
    picture = Image.fromarray(waves.astype(np.uint8))
    options: dict[str, Any] = {"format": "JPEG", "quality": 88}
    if kind.startswith("orientation"):
        tags = Image.Exif()
        tags[0x0112] = int(kind[-1])
        options["exif"] = tags
    elif kind == "PNG":
        options = {"format": "PNG"}
    elif kind == "palette":
        picture, options = picture.quantize(64), {"format": "PNG"}
    elif kind == "grey":
        picture = picture.convert("L")
    elif kind == "colour profile":
        options["icc_profile"] = wide_profile()
    else:
        options |= json.loads(kind)
    stream = io.BytesIO()
    picture.save(stream, **options)
    return stream.getvalue()


def wide_profile() -> bytes:
    """An ICC profile whose red and blue are exchanged: who heeds it shows other colours."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.find(b"rXYZ", 128), data.find(b"bXYZ", 128)
    data[red + 4 : red + 8], data[blue + 4 : blue + 8] = (
        data[blue + 4 : blue + 8],
        data[red + 4 : red + 8],
    )
    return bytes(data)


READ = """
    return import("./pixels.js").then(async ({ readPhoto }) => {
      const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
      const pixels = await readPhoto(new Blob([bytes]), arguments[1]);
      return btoa(String.fromCharCode(...pixels));
    });
"""
KINDS = [
    *('{"subsampling": 0}', '{"subsampling": 1}', '{"subsampling": 2}', '{"progressive": true}'),
    *(f"orientation {number}" for number in range(1, 9)),
    *("grey", "PNG", "palette", "colour profile"),
]


@pytest.mark.parametrize("size", [75, 32])
def test_a_photo_has_the_pixels_of_python(shown: Shown, size: int) -> None:
    differing = {}
    for kind in KINDS:
        data = encoded(kind)
        found = shown.window.run(READ, base64.b64encode(data).decode(), size)
        pixels = np.frombuffer(base64.b64decode(found), np.uint8).astype(int)
        expected = square_pixels(read_pixels(data), size).ravel()
        if (pixels != expected).any():
            differing[kind] = int(abs(pixels - expected).max())
    assert differing == {}


@contextmanager
def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """A JSON file with other values, for a while."""
    text = path.read_text()
    content = json.loads(text)
    change(content)
    try:
        path.write_text(json.dumps(content))
        yield
    finally:
        path.write_text(text)


def error_after_reload(shown: Shown) -> str:
    shown.window.run("location.reload()")
    shown.window.wait("document.getElementById('status').className === 'error'")
    return str(shown.window.run("return document.getElementById('status').textContent"))


def test_a_newer_captioner_is_refused_in_words(shown: Shown) -> None:
    newer = {"format": 2, "capdistill": "9.0"}
    with changed(shown.directory / "model" / "manifest.json", lambda c: c.update(newer)):
        error = error_after_reload(shown)
    assert "has format 2, written by capdistill 9.0; this page reads format 1" in error


def test_what_stops_the_captioner_is_still_said_when_a_photo_is_chosen(
    shown: Shown, photos: list[Path], tmp_path: Path
) -> None:
    window, address = shown.window, shown.window.run("return location.href")
    copy = Path(shutil.copytree(shown.directory, tmp_path / "copy"))
    (copy / "captioner.js").unlink()
    with chromium.served(copy) as (url, _):
        window.open(url)
        window.wait("document.getElementById('status').className === 'error'")
        window.choose("#file", photos[0])
        window.wait("!document.getElementById('result').hidden")
        error = window.run("return document.getElementById('status').textContent")
        assert window.run("return document.getElementById('loading').hidden")
    window.open(address)
    assert "The captioner cannot run (one of its scripts cannot be loaded)" in error


def test_logits_that_are_no_numbers_give_an_error_and_no_caption(
    shown: Shown, photos: list[Path], tmp_path: Path
) -> None:
    window, address = shown.window, shown.window.run("return location.href")
    copy = Path(shutil.copytree(shown.directory, tmp_path / "copy"))
    step = copy / "model" / "step.onnx"
    model = onnx.load(step)
    largest = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    largest.raw_data = np.full(largest.dims, np.nan, np.float32).tobytes()
    onnx.save(model, step)
    entry = asdict(FileEntry.measured(step))
    with (
        changed(copy / "model" / "manifest.json", lambda c: c["files"].update({step.name: entry})),
        chromium.served(copy) as (url, _),
    ):
        window.open(url)
        window.wait("document.getElementById('name').textContent !== '…'")
        window.choose("#file", photos[0])
        window.wait("document.getElementById('status').className === 'error'")
        error = window.run("return document.getElementById('status').textContent")
        assert window.run("return document.getElementById('result').hidden")
    window.open(address)
    assert "numbers for this photo that are not finite, so it has no caption" in error


def test_the_runtime_may_come_from_another_server_if_its_hash_is_right(
    shown: Shown, ort: Path, photos: list[Path]
) -> None:
    about = shown.directory / "page.json"
    with chromium.served(ort) as (cdn, _):

        def elsewhere(content: dict[str, Any]) -> None:
            for entry in content["onnxruntime"].values():
                entry["url"] = cdn + Path(entry["url"]).name

        with changed(about, elsewhere):
            shown.window.run("location.reload()")
            shown.window.wait("document.getElementById('name').textContent !== '…'")
            assert shown.choose(photos[0]) == shown.captioner.caption(photos[0])

        def tampered(content: dict[str, Any]) -> None:
            elsewhere(content)
            content["onnxruntime"]["wasm"]["integrity"] = f"sha384-{'A' * 64}"

        with changed(about, tampered):
            error = error_after_reload(shown)
    assert "ort-wasm-simd-threaded.wasm cannot be loaded, or is not the file" in error


def test_after_the_first_visit_the_page_works_without_a_network(
    shown: Shown, photos: list[Path]
) -> None:
    """This test is the last one: the server is gone."""
    shown.window.run("location.reload()")
    shown.window.wait("document.getElementById('name').textContent !== '…'")
    shown.stop()
    shown.window.run("location.reload()")
    shown.window.wait("document.getElementById('name').textContent !== '…'")
    assert shown.choose(photos[2]) == shown.captioner.caption(photos[2])
