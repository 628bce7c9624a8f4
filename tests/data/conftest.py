from __future__ import annotations

import os
from pathlib import Path

import pytest

from capdistill.data import CaptionData, Example
from capdistill.tokenizer import WordTokenizer
from tests.data.data_pictures import picture

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")


@pytest.fixture(scope="session")
def shared() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared"
    root = Path(os.environ.get("CAPDISTILL_SHARED", default))
    if not (root / "data").is_dir():
        pytest.skip(f"no data at {root}; set CAPDISTILL_SHARED")
    return root


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(["a", "picture", *COLOURS, *(f"w{n}" for n in range(9))])


@pytest.fixture
def colours(tmp_path: Path) -> CaptionData:
    """Six flat pictures, each captioned by its colour."""
    return CaptionData(
        Example(f"g{n}.png", picture(tmp_path / f"g{n}.png", colour), (f"a {colour} picture",))
        for n, colour in enumerate(COLOURS)
    )
