"""The report shows where models looked and how they learnt, where that is asked for."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

import capdistill as cd
from capdistill.errors import ConfigError, MissingExtra
from capdistill.evaluation.comparison import Comparison

pytest.importorskip("matplotlib", reason="pictures need the extra ui")


@pytest.fixture(scope="module")
def models() -> tuple[cd.Captioner, cd.Captioner]:
    tokenizer = cd.WordTokenizer.train(cd.data.sample().train.captions, min_count=2)
    names = ("debug_teacher", "debug_student")
    made = tuple(cd.Captioner.create(name, tokenizer=tokenizer) for name in names)
    return made  # type: ignore[return-value]


def compared(models: tuple[cd.Captioner, cd.Captioner], **options: object) -> Comparison:
    quick = {"metrics": ["bleu"], "measure": False, "max_length": 4}
    return cd.compare(*models, cd.data.sample().val.subset(3), **quick, **options)


def test_pictures_are_of_the_first_images_and_of_the_runs(
    models: tuple[cd.Captioner, cd.Captioner], tmp_path: Path
) -> None:
    data = cd.data.sample()
    run = tmp_path / "run"
    cd.Trainer(models[1], epochs=1, batch_size=4, progress=False).fit(data.val.subset(4), out=run)
    found = compared(models, attention=2, histories={"student": run})
    first = data.val.image_ids[:2]
    assert list(found.pictures) == [
        "student: training",
        *(f"{role}: attention in {i}" for role in ("teacher", "student") for i in first),
    ]
    for picture in found.pictures.values():
        kind, _, content = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    page = found.save(tmp_path / "report").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 5
    assert Comparison.load(tmp_path / "report").pictures == found.pictures


def test_no_picture_unless_asked_for(
    models: tuple[cd.Captioner, cd.Captioner], tmp_path: Path
) -> None:
    found = compared(models)
    assert found.pictures == {}
    assert "Pictures" not in found.save(tmp_path).read_text(encoding="utf-8")


def test_a_history_of_another_model_is_refused(
    models: tuple[cd.Captioner, cd.Captioner], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"history of .pupil. .* teacher, student"):
        compared(models, histories={"pupil": tmp_path})


def test_a_missing_extra_is_said_before_the_work(
    models: tuple[cd.Captioner, cd.Captioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra):
        compared(models, attention=1)
