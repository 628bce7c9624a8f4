"""What a user's type checker sees: real types, and their mistakes."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from capdistill.evaluation import evaluate
from capdistill.evaluation.comparison import EvaluationOptions
from capdistill.generation.config import GenerationConfig, GenerationOptions
from capdistill.training.config import (
    DistillConfig,
    DistillOptions,
    SelfCriticalConfig,
    TrainConfig,
    TrainOptions,
)
from capdistill.training.stages import _TRAINERS, StageOptions

PROGRAM = """
import torch

import capdistill as cd
from capdistill.generation import GenerationSpec, beam_search, greedy

data = cd.data.sample()
tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
teacher: cd.Captioner = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
encoder: cd.Encoder = cd.encoders.create("timm", name="test_efficientnet", weights=False)
decoder: cd.Decoder = cd.decoders.create("lstm", dim=32)
student = cd.Captioner(encoder, decoder, tokenizer)
loss: cd.DistillationLoss = cd.losses.create("token")
distiller = cd.Distiller(teacher, student, losses={"token": cd.TokenKD()}, epochs=2)
history = distiller.fit(data.train, data.val, out="run", epochs=1, beam_size=3)
steps: int = len(history.epochs)
reason: str | None = history.stopped
text: str = student.caption("dog.jpg", beam_size=3)
texts: list[str] = student.caption(["dog.jpg"])
tokens: tuple[str, ...] = student.caption("dog.jpg", details=True).tokens
table: dict[str, object] = cd.compare(teacher, student, data.val).to_json()
history = cd.Distiller(teacher, student, on_policy=0.3).fit(data.train, on_policy=(0.0, 0.5))
tuned = cd.SelfCritical(student, {"cider_d": 1.0}, teacher={"one": teacher}, samples=3)
history = tuned.fit(data.train, epochs=1, samples=4)
captioned = cd.teachers.caption(cd.teachers.Ensemble([teacher]), data.train, "c.jsonl", beam_size=5)
history = cd.Trainer(student).fit(cd.data.Curriculum(captioned, "rarity"), ema_decay=0.99)
score: float = cd.evaluate(student, data.val, metrics="bleu", beam_size=3).scores["bleu_1"]
table = cd.compare(None, {"a": student}, data.val, measure=False, beam_size=3).to_json()
stages: list[dict[str, object]] = [{"method": "train"}, {"method": "self_critical"}]
table = cd.training.run_stages(student, data.train, stages=stages, out="x", epochs=1).to_json()
cd.data.shard_splits("shards", captions=False)
images = torch.randn(1, 4, 32)
found = greedy(decoder, images, start_id=1, end_id=2, max_length=9, banned=[0], min_length=2)
found = beam_search(decoder, images, beam_size=3, start_id=1, end_id=2, max_length=9, num_return=2)
spec = GenerationSpec.from_ids(1, 2, 9, sample=True, temperature=0.5, num_return=3)

cd.TokenKD(temprature=2)  # WRONG
cd.SelfCritical(student, sampels=3)  # WRONG
cd.Distiller(teacher, student, on_polcy=0.3)  # WRONG
tuned.fit(data.train, sampels=3)  # WRONG
cd.teachers.caption(teacher, data.train, "c.jsonl", keep="best")  # WRONG
cd.teachers.caption(teacher, data.train, "c.jsonl", beamsize=5)  # WRONG
cd.evaluate(student, data.val, beamsize=3)  # WRONG
cd.compare(teacher, student, data.val, mesure=False)  # WRONG
cd.training.run_stages(student, data.train, stages=stages, out="x", epoch=1)  # WRONG
cd.data.shard_splits("shards", caption=False)  # WRONG
distiller.fit(data.train, epoch=1)  # WRONG
cd.Trainer(student, epochs="3")  # WRONG
cd.Distiller(teacher, student, learning_rat=1e-3)  # WRONG
student.caption("dog.jpg", beamsize=3)  # WRONG
cd.Captioner.create("debug_teacher")  # WRONG
number: int = student.caption("dog.jpg")  # WRONG
history.stoped  # WRONG
cd.WordTokenizer.train(3)  # WRONG
greedy(decoder, images, start_id=1, end_id=2, max_length=9, min_lenght=2)  # WRONG
greedy(decoder, images, start_id=1, end_id=2, max_length=9, sample=True)  # WRONG
beam_search(decoder, images, beam_size=3, start_id=1, end_id=2, max_length="9")  # WRONG
beam_search(decoder, images, beam_size=3, start_id=1, end_id=2, max_length=9, prefix="a")  # WRONG
GenerationSpec.from_ids(1, 2, 9, top_k="3")  # WRONG
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def wrong_lines() -> list[int]:
    lines = PROGRAM.split("\n")
    return [number for number, line in enumerate(lines, 1) if line.endswith("# WRONG")]


def test_mypy_finds_the_mistakes_in_a_users_program_and_nothing_else(
    program: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = {int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)}
    assert sorted(found) == wrong_lines(), done.stdout


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_finds_the_mistakes_in_a_users_program_and_nothing_else(
    program: Path, tmp_path: Path
) -> None:
    command = ["pyright", "--pythonpath", sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "summary" not in done.stdout and "error" not in done.stdout:
        pytest.skip("pyright cannot start: it fetches itself at its first run")
    found = {int(line) for line in re.findall(r"program\.py:(\d+):\d+ - error", done.stdout)}
    assert sorted(found) == wrong_lines(), done.stdout


def test_options_for_type_checkers_are_those_of_the_functions() -> None:
    parameters = inspect.signature(evaluate).parameters.values()
    own = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(EvaluationOptions.__annotations__) == own | set(GenerationConfig.types())
    keys = {key for config, arguments in _TRAINERS.values() for key in arguments}
    fields = set(SelfCriticalConfig.model_fields) | set(GenerationConfig.types())
    assert set(StageOptions.__annotations__) == keys | fields


def test_options_for_type_checkers_are_the_fields_of_the_configurations() -> None:
    fields = set(GenerationConfig.types())
    assert set(GenerationOptions.__annotations__) == fields
    assert set(TrainOptions.__annotations__) == fields | set(TrainConfig.model_fields)
    assert set(DistillOptions.__annotations__) == fields | set(DistillConfig.model_fields)
