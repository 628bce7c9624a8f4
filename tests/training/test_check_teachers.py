"""`check` on teachers: whether they fit the targets, another vocabulary, a trimmed one."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import capdistill as cd
from capdistill.compatibility import recommended
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.training.check import CheckRow, check_training
from tests.losses.tiny_tokenizers import Pieces
from tests.teachers.test_vocabularies import FEWER, SUBWORDS, batch_for, captioner
from tests.training import tiny_models as tiny

STUDENT = tiny.make_student
QUIET: dict[str, Any] = {**tiny.QUIET, "batch_size": 4}


class Knowing(nn.Module):
    """Gives the target at each position, or the one `shift` positions later, a large logit."""

    def __init__(self, shift: int = 0, scale: float = 6.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, batch: Batch) -> Tensor:
        targets = batch.targets.roll(-self.shift, 1)
        return self.scale * F.one_hot(targets, len(tiny.TOKENIZER)).float()


def teacher(shift: int = 0, scale: float = 6.0) -> Any:
    def adapt(module: nn.Module, batch: Batch) -> CaptionerOutput:
        return CaptionerOutput(logits=module(batch))

    return cd.teachers.wrap(Knowing(shift, scale), adapt, tiny.TOKENIZER, name="theirs")


def rows(trainer: Any, *topics: str, batch: Batch | None = None) -> list[CheckRow]:
    given = [tiny.make_batch([3, 2, 3, 3])] if batch is None else [batch]
    return [row for row in check_training(trainer, given).rows if row.topic in topics]


def found(one: Any) -> list[CheckRow]:
    trainer = cd.Distiller(one, STUDENT(), {"token": "token"}, **QUIET)
    both = rows(trainer, "alignment", "weights")
    return [row for row in both if "cross-entropy" in row.finding]


@pytest.mark.parametrize(("shift", "name"), [(1, "one position ahead"), (-1, "position behind")])
def test_logits_that_fit_another_position_are_named(shift: int, name: str) -> None:
    (row,) = found(teacher(shift))
    assert (row.topic, row.status) == ("alignment", "fail")
    assert name in row.finding
    assert "untrained" not in row.finding
    assert "batch.targets[:, t]" in row.fix


def test_logits_that_fit_are_said_to() -> None:
    (row,) = found(teacher())
    assert (row.topic, row.status) == ("weights", "ok")
    assert "cross-entropy 0.0" in row.finding


def test_a_teacher_that_guesses_is_untrained_and_not_shifted() -> None:
    (row,) = found(teacher(scale=0.0))
    assert (row.topic, row.status) == ("weights", "note")
    assert "untrained" in row.finding


def test_the_member_of_an_ensemble_that_is_shifted_is_named() -> None:
    first, second = found({"good": teacher(), "late": teacher(-1)})
    assert (first.status, second.status) == ("ok", "fail")
    assert "teacher 'late'" in second.finding


def test_the_dropped_mass_of_a_trimmed_teacher_is_shown() -> None:
    models = captioner(SUBWORDS), captioner(FEWER, "lstm", 2, "student")
    trainer = cd.Distiller(*models, {"token": "token"}, **QUIET)
    before = trainer.teacher.dropped_mass
    found = rows(trainer, "vocabulary", "weights", batch=batch_for(FEWER))
    (entries,) = [row for row in found if "the student keeps" in row.finding]
    assert str(len(SUBWORDS.vocabulary)) in entries.finding
    (mass,) = [row for row in found if "entries that the student lacks" in row.finding]
    assert mass.status == "ok"
    assert trainer.teacher.dropped_mass == before  # left as it was


def test_words_are_recommended_between_vocabularies_that_share_them() -> None:
    models = captioner(SUBWORDS), captioner(tiny.TOKENIZER, "lstm", 2, "student")
    pooled = {"pooled": {"name": "feature", "match": "pooled"}}
    trainer = cd.Distiller(*models, pooled, {"ce": 1, "pooled": 1}, **QUIET)
    (row,) = rows(trainer, "vocabulary", batch=batch_for(tiny.TOKENIZER))
    assert row.status == "note"
    assert 'Recommended: the loss "word"; of 25 words, 25 begin at' in row.fix
    trainer = cd.Distiller(*models, {"words": "word"}, **QUIET)
    (row,) = rows(trainer, "vocabulary", batch=batch_for(tiny.TOKENIZER))
    assert row.status == "ok"
    assert check_training(trainer).ok  # a made-up batch has captions to align, too


def test_captions_are_recommended_where_words_do_not_align() -> None:
    class Elsewhere(Pieces):
        def encode_spans(self, caption: str) -> Any:
            ids, spans = super().encode_spans(caption)
            n = len(caption)
            return ids, [(0, 0), *((a + 1, b) for a, b in spans[1:-1]), (n, n)]

    shifted = Elsewhere(["cat"], "wordpiece")
    advice = recommended(tiny.TOKENIZER, shifted, ["the red cat"])
    assert advice.loss is None
    assert "captions of the teacher, with" in advice.text
    assert "no encode_spans" in recommended(tiny.TOKENIZER, object(), ["a cat"]).text
