from __future__ import annotations

from pathlib import Path

import pytest

from capdistill.data import CaptionData, Example
from capdistill.tokenizer import WordTokenizer
from tests.data.data_pictures import picture

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")


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
