"""Files of states: what is damaged, foreign or of another version is refused by name."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capdistill import Captioner, Distiller
from capdistill.data import CaptionData
from capdistill.errors import CheckpointError
from capdistill.training.checkpoint import load_state, save_state
from capdistill.training.state_file import read_file, write_file
from tests.training import tiny_models as tiny

FORM = "capdistill.training/3"
CONTENT: dict[str, Any] = {
    "step": 7,
    "weights": {"a": torch.arange(5.0), "b": torch.tensor([[1, 2], [3, 4]])},
    "names": ["one", None, True, 2.5],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_file(tmp_path / "state.pt", CONTENT, FORM)
    return tmp_path / "state.pt"


def same(found: dict[str, Any]) -> bool:
    tensors = all(torch.equal(found["weights"][n], t) for n, t in CONTENT["weights"].items())
    return tensors and all(found[name] == CONTENT[name] for name in ("step", "names"))


def test_what_is_written_is_read(file: Path) -> None:
    assert same(read_file(file, FORM))


def test_no_flipped_bit_gives_other_values(file: Path) -> None:
    data = file.read_bytes()
    refused = 0
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert same(read_file(file, FORM)), f"byte {place}"
        except CheckpointError:
            refused += 1
    assert refused > len(data) / 12  # the rest is padding, and names that are not read


def test_a_part_that_is_marked_as_a_folder_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/1"))
    data[entry + 38] ^= 0x10  # torch would read zeros
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="marked as a folder"):
        read_file(file, FORM)


def test_no_cut_file_is_read(file: Path) -> None:
    data = file.read_bytes()
    for length in range(0, len(data), 29):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            read_file(file, FORM)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("capdistill.training/9", r"format 9, written by capdistill .*reads 3\. Update capdistill"),
        ("capdistill.training/1", r"format 1, written by .*Use the version that wrote it"),
        ("capdistill.run/3", "is not a training state of capdistill"),
        (None, "is not a training state of capdistill"),
        (["x"], "is not a training state of capdistill"),
    ],
)
def test_another_format_is_named(tmp_path: Path, form: Any, message: str) -> None:
    write_file(tmp_path / "state.pt", CONTENT, form)
    with pytest.raises(CheckpointError, match=message):
        read_file(tmp_path / "state.pt", FORM)


class Code:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"format": FORM, "step": Code(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        read_file(tmp_path / "state.pt", FORM)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"bare\.pt is truncated or not a training state"):
        read_file(tmp_path / "bare.pt", FORM)
    assert not (tmp_path / "ran").exists()


def test_few_bytes_that_stand_for_many_values_are_refused(tmp_path: Path) -> None:
    laughs: Any = ["ha"]
    for _ in range(30):
        laughs = [laughs, laughs]
    large = torch.zeros(1).expand(2**40)
    for name, value in {"laughs": laughs, "large": large}.items():
        write_file(tmp_path / name, {name: value}, FORM)
        assert (tmp_path / name).stat().st_size < 10_000
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read \((it holds|a tensor)"):
            read_file(tmp_path / name, FORM)


def test_a_compressed_file_is_refused_before_it_is_unpacked(file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w") as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"packed\.pt cannot be read \(it is compressed"):
        read_file(packed, FORM)


def test_checksums_are_written_although_they_are_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write_file(tmp_path / "state.pt", CONTENT, FORM)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_file(tmp_path / "state.pt", FORM))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("objective", {}),
        ("objective", {"student.x": 3}),
        ("optimizer", {}),
        ("optimizer", {"state": {0: {"step": "x"}}, "param_groups": []}),
        ("random", {"torch": torch.zeros(3)}),
        ("meter", {}),
        ("meter", None),
        ("guard", {"losses": 3}),
        ("schedule", {"done": "x"}),
        ("epoch", "1"),
        ("skipped", [["x"]]),
        ("callbacks", {"SkippedImages.0": 3}),
    ],
)
def test_a_state_with_a_part_of_another_kind_is_our_error(
    saveable: Callable[..., Captioner],
    colours: CaptionData,
    tmp_path: Path,
    part: str,
    value: Any,
) -> None:
    options: dict[str, Any] = {**tiny.QUIET, "batch_size": 3, "epochs": 1}
    Distiller(tiny.make_teacher(), saveable(), **options).fit(colours, out=tmp_path)
    state = load_state(tmp_path / "state.pt")
    save_state(tmp_path / "state.pt", {**state, part: value})
    (tmp_path / "state.previous.pt").unlink()
    with pytest.raises(CheckpointError, match="training state"):
        Distiller(tiny.make_teacher(), saveable(), **options).fit(
            colours, out=tmp_path, resume=True
        )
