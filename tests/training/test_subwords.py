"""Training knows no words: everything that takes a tokenizer takes one of subwords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill as cd
from capdistill.data import CaptionData, Curriculum
from tests.tokenizers.subword_cases import trimmed
from tests.training.tiny_models import QUIET

KIND = "byte-level BPE"


@pytest.fixture(scope="module")
def data() -> CaptionData:
    return cd.data.sample().train.subset(4)


def models(kind: str = KIND, length: int = 30) -> list[cd.Captioner]:
    torch.manual_seed(0)
    tokenizer = trimmed(kind, length)
    return [
        cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer, weights=False)
        for role in ("teacher", "student")
    ]


def options(**more: Any) -> dict[str, Any]:
    return {**QUIET, "batch_size": 2, "seed": 0, **more}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (KIND, {}),
        (KIND, {"scheduled_sampling": 0.5, "metrics": ["bleu"], "monitor": "bleu_4"}),
        (KIND, {"on_policy": 0.5}),
        ("WordPiece", {"word_dropout": 0.5}),
        ("Unigram", {"word_dropout": 0.5, "generation": {"prefix": "a photo", "min_length": 3}}),
    ],
    ids=str,
)
def test_a_student_of_subwords_is_distilled(data: CaptionData, kind: str, more: Any) -> None:
    distiller = cd.Distiller(*models(kind), {"token": cd.TokenKD()}, **options(**more))
    rows = distiller.fit(data, data, epochs=1).epochs
    assert rows[0]["train"]["terms"]["token"]["raw"] > 0


def test_word_dropout_needs_an_unknown_token(data: CaptionData) -> None:
    with pytest.raises(cd.errors.ConfigError, match="tokenizer HuggingFace has no unk_id"):
        cd.Distiller(*models(), {"token": cd.TokenKD()}, **options(word_dropout=0.1))


def test_curricula_by_words_order_images_for_subwords(data: CaptionData) -> None:
    _, student = models()
    for by in ("length", "rarity"):
        easy = Curriculum(data, by, start=0.5, until=0.5)
        assert len(cd.Trainer(student, **options()).fit(easy, epochs=2).epochs) == 2


def test_cached_targets_are_read_with_their_subwords(data: CaptionData, tmp_path: Path) -> None:
    teacher, student = models()
    cached = cd.teachers.cache(teacher, data, tmp_path / "targets", progress=False)
    again = cd.teachers.load(tmp_path / "targets")
    assert again.tokenizer == cached.tokenizer == student.tokenizer
    losses = {"token": cd.TokenKD()}
    history = cd.Distiller(again, student, losses, **options()).fit(data, epochs=1)
    assert history.epochs[0]["train"]["terms"]["token"]["raw"] > 0


def test_a_student_learns_a_caption_of_pieces(data: CaptionData) -> None:
    example = data.examples[0]
    one = data.subset(1)
    _, student = models()
    trainer = cd.Trainer(student, **options(learning_rate=0.01, captions_per_image=1))
    trainer.fit(one, epochs=60)
    caption = student.eval().caption(example.path)
    assert caption in {" ".join(text.split()) for text in example.captions}


def test_sampled_captions_of_pieces_are_rewarded_as_text(data: CaptionData) -> None:
    _, student = models()
    trainer = cd.SelfCritical(student, samples=2, **options())
    (row,) = trainer.fit(data, epochs=1).epochs
    assert set(row["train"]["terms"]) == {"reward"}


def test_an_ensemble_of_subwords_is_saved_and_captions(data: CaptionData, tmp_path: Path) -> None:
    members = models()
    cd.teachers.Ensemble(members).save(tmp_path)
    again = cd.teachers.load(tmp_path)
    assert again.tokenizer == members[0].tokenizer
    path = data.examples[0].path
    config = {"banned_words": ["the"], "not_last": "function_words", "prefix": "a photo"}
    caption = again.caption(path, **config)
    assert caption.startswith("a photo")
    assert "the" not in caption.split()
