from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from capdistill import Captioner, encoders
from capdistill.data import CaptionData, Example
from tests.training import tiny_models as tiny

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def saveable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Captioner]:
    """A tiny student whose encoder a file can make again: registered for this test only."""
    registry = encoders.create.__self__
    monkeypatch.setattr(registry, "_decorated", dict(registry._decorated))
    encoders.register("patches")(tiny.Patches)

    def make(seed: int = 1, dropout: float = 0.0, **options: object) -> Captioner:
        student = tiny.make_student(seed, dropout, **options)
        encoder = encoders.create("patches", **options)
        encoder.load_state_dict(student.encoder.state_dict())
        return Captioner(encoder, student.decoder, student.tokenizer, name="student")

    return make


@pytest.fixture
def colours(tmp_path: Path) -> CaptionData:
    """Six pictures of three colours, each captioned by its colour."""
    examples = []
    for n in range(6):
        colour = list(COLOURS)[n % 3]
        path = tmp_path / "pictures" / f"g{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 12), COLOURS[colour]).save(path)
        examples.append(Example(path.name, path, (f"a {colour} dog", f"a {colour} cat")))
    return CaptionData(examples)
