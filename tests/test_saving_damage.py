"""Damage to the files of a saved captioner is found when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from capdistill import Captioner, encoders
from capdistill.errors import CapdistillError, CheckpointError
from tests.toy_captioner import Patches, toy


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


@pytest.fixture
def original(tmp_path: Path) -> tuple[Captioner, dict[str, bytes]]:
    model = toy()
    model.save(tmp_path / "original")
    return model, {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["captioner.json", "tokenizer.json", "model.safetensors"])
def test_no_flipped_bit_gives_another_captioner(
    original: tuple[Captioner, dict[str, bytes]], tmp_path: Path, name: str
) -> None:
    model, files = original
    data, refused = files[name], 0
    places = range(3, len(data), max(len(data) // 60, 1))
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 7
        try:
            found = Captioner.load(write(tmp_path, {**files, name: bytes(damaged)}))
        except CapdistillError:
            refused += 1
            continue
        state = found.state_dict()
        assert found.name == model.name, place
        assert found.tokenizer == model.tokenizer, place
        assert repr(found.decoder) == repr(model.decoder), place
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert refused > len(places) / 2  # the rest is white space, or names of weights from hubs


def test_what_is_wrong_is_named_with_the_fix(
    original: tuple[Captioner, dict[str, bytes]], tmp_path: Path
) -> None:
    _, files = original
    data = bytearray(files["model.safetensors"])
    data[-3] ^= 4
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged: the values"):
        Captioner.load(write(tmp_path, {**files, "model.safetensors": bytes(data)}))
    content = json.loads(files["captioner.json"])
    content["decoder"]["kwargs"]["dropout"] = 0.75
    changed = {**files, "captioner.json": json.dumps(content).encode()}
    with pytest.raises(CheckpointError, match=r"checksum of 'decoder' is wrong.*'checksums'"):
        Captioner.load(write(tmp_path, changed))
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["max_length"] = 13
    changed = {**files, "tokenizer.json": json.dumps(tokenizer).encode()}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has changed since it was saved"):
        Captioner.load(write(tmp_path, changed))


def test_a_description_edited_by_hand_is_accepted_without_its_checksums(
    original: tuple[Captioner, dict[str, bytes]], tmp_path: Path
) -> None:
    model, files = original
    content = json.loads(files["captioner.json"])
    content["name"] = "edited"
    del content["checksums"]
    found = Captioner.load(
        write(tmp_path, {**files, "captioner.json": json.dumps(content).encode()})
    )
    assert found.name == "edited"
    assert all(torch.equal(found.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_description_of_a_huge_part_takes_no_memory(
    original: tuple[Captioner, dict[str, bytes]], tmp_path: Path
) -> None:
    _, files = original
    content = json.loads(files["captioner.json"])
    content["decoder"]["kwargs"]["hidden"] = 10**6  # four terabytes
    changed = {**files, "captioner.json": json.dumps(content).encode()}
    with pytest.raises(CheckpointError, match=r"The decoder that .* describes takes [\d,]+ bytes"):
        Captioner.load(write(tmp_path, changed))
