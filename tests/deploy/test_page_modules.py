"""The page's JavaScript computes what Python computes."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import capdistill as cd
from capdistill.data.pixels import Pixels, square_pixels
from capdistill.generation import GenerationConfig, GenerationSpec
from capdistill.generation.constraints import Constraints
from capdistill.generation.words import SubwordRules
from capdistill.tokenizers.joining import Joining
from tests.deploy.javascript import Node
from tests.tokenizers.subword_cases import KINDS, captions, trimmed
from tests.tokenizers.test_joining import RULES, WORDS


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("name", ["WebAssembly", "OffscreenCanvas"])
def test_a_browser_that_lacks_something_is_told_what(node: Node, name: str) -> None:
    script = """
        const { loadCaptioner } = await import("./captioner.js");
        globalThis.OffscreenCanvas = class {};
        delete globalThis[given];
        await loadCaptioner().catch((error) => answer(error.message));
    """
    assert f"This browser has no {name}" in node(script, name)


def base64_of(values: Pixels) -> str:
    return base64.b64encode(values.tobytes()).decode()


SQUARES = """
    import { centreSquare } from "./pixels.js";
    answer(given.map(({ width, height, size, rgba }) => {
      const bytes = Buffer.from(rgba, "base64");
      const read = (left, top, columns, rows) => {
        const part = new Uint8ClampedArray(columns * rows * 4);
        for (let row = 0; row < rows; row++) {
          const begin = ((top + row) * width + left) * 4;
          part.set(bytes.subarray(begin, begin + columns * 4), row * columns * 4);
        }
        return part;
      };
      return Buffer.from(centreSquare(width, height, size, read)).toString("base64");
    }));
"""


def test_the_square_of_a_photo_has_the_pixels_of_python(node: Node) -> None:
    """Oracle: `square_pixels`, on noise, and on black and white, which shows every rounding."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32, 32), (33, 32, 32), (90, 31, 32), (1, 1, 8), (3, 5, 64), (17, 40, 64)]
    sizes += [(97, 101, 240), (240, 321, 224), (1030, 1031, 48), (500, 375, 224)]
    sizes += [tuple(rng.integers(1, 200, 3).tolist()) for _ in range(30)]
    cases, expected = [], []
    for number, (height, width, size) in enumerate(sizes):
        photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        photo = np.where(photo > 127, 255, 0).astype(np.uint8) if number % 2 else photo
        rgba = np.dstack([photo, np.full((height, width), 255, np.uint8)])
        case = {"width": width, "height": height, "size": size}
        cases.append({**case, "rgba": base64_of(rgba)})
        expected.append(base64_of(square_pixels(photo, size)))
    found = node(SQUARES, cases)
    wrong = [s for s, a, b in zip(sizes, found, expected, strict=True) if a != b]
    assert wrong == []


TEXTS = """
    import { makeDecoder } from "./text.js";
    answer(given.map(({ content, rows }) => rows.map(makeDecoder(content))));
"""


def test_pieces_are_joined_as_in_python(node: Node) -> None:
    """Oracle: `Joining`, which is tested against the library tokenizers."""
    rng = random.Random(0)
    roles = {"start": 0, "end": 1, "pad": 0, "special": [0, 1]}
    pieces = ["<s>", "</s>", *WORDS]
    rows = [[rng.randrange(2, len(pieces)) for _ in range(rng.randrange(9))] for _ in range(80)]
    common = {"format": "capdistill.subword_tokenizer/1", "pieces": pieces, **roles}
    found = node(
        TEXTS,
        [{"content": {**common, "tokenizer": {"decoder": rule}}, "rows": rows} for rule in RULES],
    )
    for rule, texts in zip(RULES, found, strict=True):
        join = Joining(rule)
        assert texts == [join([pieces[id] for id in row]).strip() for row in rows], rule


@pytest.mark.parametrize("kind", ["words", *KINDS])
def test_saved_tokenizers_decode_as_in_python(node: Node, kind: str, tmp_path: Path) -> None:
    texts = captions()[:40]
    made: Any = cd.WordTokenizer.train(texts) if kind == "words" else trimmed(kind)
    made.save(tmp_path / "tokenizer.json")
    rng = random.Random(1)
    rows = [made.encode(text) for text in texts]
    rows += [[rng.randrange(len(made.vocabulary)) for _ in range(7)] for _ in range(40)]
    rows += [[made.start_id, *rows[0][1:-1], made.pad_id], [made.end_id, rows[0][1]], []]
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    found = node(TEXTS, [{"content": content, "rows": rows}])[0]
    pairs = zip(found, (made.decode(row) for row in rows), strict=True)
    assert [(text, expected) for text, expected in pairs if text != expected] == []


REFUSED = """
    import { makeDecoder } from "./text.js";
    try { answer(makeDecoder(given)([])); } catch (error) { answer(error.message); }
"""


def test_an_unknown_tokenizer_is_refused_by_the_page(node: Node) -> None:
    assert 'has the format "other/2"' in node(REFUSED, {"format": "other/2"})


GREEDY = """
    import { nextId } from "./greedy.js";
    answer(given.map(({ logits, spec }) => {
      const ids = [];
      while (ids.length < spec.max_length) ids.push(nextId(logits[ids.length], ids, spec));
      return ids;
    }));
"""


def test_greedy_decoding_keeps_the_options_as_in_python(node: Node) -> None:
    """Oracle: `Constraints`, over random options in a vocabulary of eight ids."""
    rng = random.Random(2)
    cases, expected = [], []
    for seed in range(300):
        spec = random_spec(rng)
        rows = torch.randn(spec.max_length, 8, generator=torch.Generator().manual_seed(seed)) * 2
        options = asdict(spec) | {"config": spec.config.model_dump(mode="json")}
        cases.append({"logits": rows.tolist(), "spec": options})
        expected.append(greedy_ids(rows, spec))
    assert node(GREEDY, cases) == expected


@pytest.mark.parametrize(
    ("logits", "id"),
    [
        (["0", "1", "NaN"], None),
        (["NaN", "1", "0"], None),
        (["0", "Infinity", "1"], None),
        (["-Infinity"] * 3, None),
        (["-Infinity", "0", "1"], 2),
    ],
)
def test_logits_that_are_no_numbers_give_no_word(
    node: Node, logits: list[str], id: int | None
) -> None:
    script = """
        import { nextId } from "./greedy.js";
        const logits = Float32Array.from(given.logits, Number);
        try { answer(nextId(logits, [], given.spec)); } catch (error) { answer(error.message); }
    """
    spec = GenerationSpec.from_ids(1, 2, 7)
    content = asdict(spec) | {"config": spec.config.model_dump(mode="json")}
    found = node(script, {"logits": logits, "spec": content})
    assert found == id if id is not None else "not finite, so it has no caption" in found


def random_spec(rng: random.Random) -> GenerationSpec:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, 8) for _ in range(rng.randrange(count + 1)))

    def sequences(longest: int) -> tuple[tuple[int, ...], ...]:
        made = (ids(longest) for _ in range(rng.randrange(3)))
        return tuple(each for each in made if len(each) > 1)

    limit = rng.randrange(3, 8)
    config = GenerationConfig(
        min_length=rng.randrange(limit), no_repeat_ngram=rng.choice((0, 0, 1, 2, 3))
    )
    rules = SubwordRules(sequences(3), sequences(3), sequences(4), ids(4), ids(3), ids(2))
    return GenerationSpec(
        *(1, 2, limit, config),
        banned=tuple({0, 1, *ids(2)} - {2}),
        phrases=sequences(3),
        not_last=ids(2),
        prefix=ids(2),
        subwords=rng.choice((None, rules)),
    )


def greedy_ids(rows: Tensor, spec: GenerationSpec) -> list[int]:
    """Ids at every position, also behind the end token."""
    constraints, ids = Constraints(spec, rows.shape[1], rows.device), torch.zeros(1, 0).long()
    for position, row in enumerate(rows):
        chosen = constraints(row[None].clone(), ids, position).argmax(-1)
        ids = torch.cat([ids, chosen[None]], 1)
    found: list[int] = ids[0].tolist()
    return found


FILES = """
    import { loadListed, loadManifest } from "./files.js";
    const { files } = given;
    globalThis.fetch = async (path) => {
      if (files[path] === "offline") throw new TypeError("Failed to fetch");
      const found = files[path] !== undefined;
      return new Response(found ? files[path] : "", { status: found ? 200 : 404 });
    };
    try {
      const manifest = await loadManifest("model");
      answer(new TextDecoder().decode(await loadListed("model", manifest, "step.onnx")));
    } catch (error) {
      answer(`Error: ${error.message}`);
    }
"""
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256, FIPS 180-2
MANIFEST = {
    "format": 1,
    "capdistill": "9.0",
    "files": {"step.onnx": {"sha256": ABC, "bytes": 3}},
}


@pytest.mark.parametrize(
    ("manifest", "step", "answer"),
    [
        (MANIFEST, "abc", "abc"),
        ({**MANIFEST, "format": 2}, "abc", "has format 2, written by capdistill 9.0; this page"),
        ({"name": "an app"}, "abc", "does not describe an exported captioner"),
        ("{", "abc", "model/manifest.json is not valid JSON"),
        (None, "abc", "model/manifest.json cannot be loaded: the server answers 404"),
        ("offline", "abc", "Is the device online, and the server running?"),
        ({**MANIFEST, "files": {}}, "abc", "does not list step.onnx"),
        (MANIFEST, None, "model/step.onnx cannot be loaded: the server answers 404"),
        (MANIFEST, "ab", "model/step.onnx has 2 bytes, but 3 were exported"),
        (MANIFEST, "abcd", "model/step.onnx has 4 bytes, but 3 were exported"),
        (MANIFEST, "abd", "its checksum is wrong"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_files_are_checked_against_the_manifest(
    node: Node, manifest: Any, step: str | None, answer: str
) -> None:
    text = json.dumps(manifest) if isinstance(manifest, dict) else manifest
    files = {"model/manifest.json": text, "model/step.onnx": step}
    files = {path: content for path, content in files.items() if content is not None}
    found = node(FILES, {"files": files})
    assert answer in found
    assert found.startswith("Error") == (answer != "abc")
