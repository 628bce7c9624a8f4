"""Whole runs with a teacher of another vocabulary: cached targets, resume, several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller
from capdistill.data import CaptionData
from capdistill.errors import ConfigError
from capdistill.teachers import RetokenizingTeacher, TrimmedTeacher
from capdistill.teachers.vocabularies import DroppedMass
from capdistill.tokenizer import WordTokenizer
from tests.teachers.test_vocabularies import FEWER, SUBWORDS, Trimmed, batch_for, captioner
from tests.training import tiny_models as tiny

WORDS = tiny.TOKENIZER
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LOSSES: dict[str, Any] = {"word": "word", "universal": "universal"}


def distiller(teacher: Any, student: Captioner, losses: Any = LOSSES, **options: Any) -> Distiller:
    options = {**tiny.QUIET, "augment": False, "batch_size": 3, "epochs": 2, **options}
    return Distiller(teacher, student, losses, {"ce": 0.5, **dict.fromkeys(losses, 1.0)}, **options)


def test_cached_targets_of_another_vocabulary_are_those_of_the_teacher(
    colours: CaptionData, tmp_path: Path
) -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    cached = cd.teachers.cache(teacher, colours, tmp_path, progress=False, device="cpu")
    runs = [distiller(each, copy.deepcopy(student)).fit(colours) for each in (teacher, cached)]
    for one, other in zip(*(run.epochs for run in runs), strict=True):
        for name in LOSSES:
            expected = one["train"]["terms"][name]["raw"]
            assert other["train"]["terms"][name]["raw"] == pytest.approx(expected, rel=1e-2)


def test_cached_words_of_another_vocabulary_are_refused(
    colours: CaptionData, tmp_path: Path
) -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    how: dict[str, Any] = {"top_k": 70, "progress": False, "device": "cpu", "min_mass": 0.1}
    cached = cd.teachers.cache(teacher, colours, tmp_path, **how)
    with pytest.raises(ConfigError, match="WordKD compares the logits of all words"):
        distiller(cached, student)


def test_cached_targets_of_a_trimmed_teacher_are_read_in_the_students_ids(
    colours: CaptionData, tmp_path: Path
) -> None:
    few = Trimmed(SUBWORDS, tuple(colours.captions))  # splits these captions as the teacher does
    teacher, student = captioner(SUBWORDS), captioner(few, "lstm", 2, "student")
    cached = cd.teachers.cache(teacher, colours, tmp_path, progress=False, device="cpu")
    token = {"token": "token"}
    runs = [
        distiller(each, copy.deepcopy(student), token).fit(colours) for each in (teacher, cached)
    ]
    rows = [run.epochs[-1] for run in runs]
    one, other = (row["train"]["terms"]["token"]["raw"] for row in rows)
    assert other == pytest.approx(one, rel=1e-2)
    assert rows[1]["dropped_mass"] == pytest.approx(rows[0]["dropped_mass"], rel=1e-2)


def test_the_most_probable_words_of_a_trimmed_teacher_can_be_cached(
    colours: CaptionData, tmp_path: Path
) -> None:
    few = Trimmed(SUBWORDS, tuple(colours.captions))
    teacher, student = captioner(SUBWORDS), captioner(few, "lstm", 2, "student")
    how: dict[str, Any] = {"top_k": len(few.vocabulary) - 1, "progress": False, "device": "cpu"}
    cached = cd.teachers.cache(TrimmedTeacher(teacher, few), colours, tmp_path, **how)
    losses = {"token": {"name": "token", "temperature": 1.0}}
    runs = [distiller(t, copy.deepcopy(student), losses).fit(colours) for t in (teacher, cached)]
    one, other = (run.epochs[-1]["train"]["terms"]["token"]["raw"] for run in runs)
    assert other == pytest.approx(one, rel=1e-2)
    full = cd.teachers.cache(teacher, colours, tmp_path / "full", **{**how, "top_k": 70})
    with pytest.raises(ConfigError, match=r"Cache TrimmedTeacher\(teacher, tokenizer\) with top_k"):
        distiller(full, student, losses)


def test_a_run_that_is_resumed_is_the_same_to_the_bit(
    saveable: Callable[..., Captioner], tmp_path: Path
) -> None:
    batches = [batch_for(WORDS), batch_for(WORDS, first=4)]

    class Stop:
        def on_step(self, trainer: Any, row: Any) -> None:
            trainer.history.interrupted = row["step"] == 1

    options: dict[str, Any] = {"on_policy": 0.5, "word_dropout": 0.2}
    whole = distiller(captioner(SUBWORDS), saveable(), **options)
    expected = whole.fit(batches).epochs[-1]
    first = distiller(captioner(SUBWORDS), saveable(), **options)
    with pytest.warns(UserWarning, match="Interrupted after step 1"):
        first.fit(batches, out=tmp_path, callbacks=[Stop()])
    second = distiller(captioner(SUBWORDS), saveable(), **options)
    found = second.fit(batches, out=tmp_path, resume=True).epochs[-1]
    assert found["train"] == expected["train"]
    pairs = zip(whole.objective.parameters(), second.objective.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_dropped_mass_is_continued_by_a_resumed_run() -> None:
    whole, first, second = (TrimmedTeacher(captioner(SUBWORDS), FEWER) for _ in range(3))
    parts = batch_for(FEWER), batch_for(FEWER, first=8)
    for batch in parts:
        whole(batch)
    before, after = DroppedMass([first]), DroppedMass([second])
    first(parts[0])
    after.load_state_dict(before.state_dict())
    after.on_fit_start(None)
    second(parts[1])
    rows: list[dict[str, Any]] = [{}, {}]
    DroppedMass([whole]).on_epoch(None, rows[0])
    after.on_epoch(None, rows[1])
    assert rows[0] == rows[1]
    assert second.dropped_mass != second.dropped_mass  # NaN: the next epoch begins anew


def test_captions_of_a_teacher_of_another_vocabulary_are_text(
    colours: CaptionData, tmp_path: Path
) -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    captioned = cd.teachers.caption(
        teacher, colours, tmp_path / "c.jsonl", beam_size=3, max_length=9, mix=1, **tiny.QUIET
    )
    again = cd.teachers.caption(
        RetokenizingTeacher(teacher),
        colours,
        tmp_path / "d.jsonl",
        beam_size=3,
        max_length=9,
        mix=1,
        **tiny.QUIET,
    )
    assert captioned.captions == again.captions
    history = distiller(teacher, student).fit(captioned)
    words = sum(len(caption.split()) + 1 for caption in captioned.captions)
    assert words > 12
    assert history.epochs[-1]["train"]["terms"]["word"]["raw"] > 0


FAMILIES = ("git", "vision_encoder_decoder", "blip2_t5", "florence2", "paligemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_teacher_teaches_words(family: str) -> None:
    """Of byte-level BPE, WordPiece and SentencePiece."""
    hugging_face = pytest.importorskip("tests.teachers.huggingface.conftest")
    teacher = hugging_face.made(family)[0]
    texts = ("a dog runs", "the cat sits on the grass", "a red dog", "a cat")
    student = cd.Captioner.create(
        "debug_student", tokenizer=WordTokenizer.train(texts, min_count=1)
    )
    trainer = distiller(teacher, student, schedule="constant", learning_rate=0.01)
    batch = hugging_face.batch_of(student, captions=texts)
    rows = [trainer.step(batch) for _ in range(6)]
    assert rows[0]["counts"]["word"] == sum(len(text.split()) + 1 for text in texts)
    assert rows[-1]["terms"]["word"]["raw"] < rows[0]["terms"]["word"]["raw"]


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_trimmed_hugging_face_teacher_captions(family: str) -> None:
    hugging_face = pytest.importorskip("tests.teachers.huggingface.conftest")
    teacher = hugging_face.made(family)[0]
    trimmed = TrimmedTeacher(teacher, teacher.trimmed(["a dog runs", "the cat sits"]))
    batch = hugging_face.batch_of(trimmed, captions=("a dog runs",) * 2)
    with torch.no_grad():
        expected = trimmed(batch).logits
        decoder, features = trimmed.decoding(batch)
        found = decoder(batch.inputs, features).logits
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for hypothesis in trimmed.generate(batch, beam_size=2, max_length=4):
        assert hypothesis.text == trimmed.tokenizer.decode(hypothesis.tokens)
