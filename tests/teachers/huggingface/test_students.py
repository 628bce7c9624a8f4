"""A small student with some of the teacher's subwords learns from all of its outputs."""

import pytest
import torch
from torch.testing import assert_close

import capdistill as cd
from capdistill.compatibility import probe_batch
from tests.teachers.huggingface.conftest import CAPTIONS, batch_of, made

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TRIMMED = CAPTIONS[:2]


@pytest.mark.parametrize("family", ["blip", "blip2_opt", "florence2", "qwen2_vl"])
def test_a_trimmed_student_learns_from_the_logits_of_its_own_pieces(family, teacher, tmp_path):
    tokenizer = teacher.trimmed(TRIMMED)
    assert len(tokenizer) < len(teacher.tokenizer.vocabulary)
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
    options = {"precision": "fp32", "device": "cpu", "schedule": "constant"}
    losses = {"token": "token", "hidden": "hidden", "feature": "feature"}
    distiller = cd.Distiller(teacher, student, losses=losses, **options)
    batch, whole = batch_of(student, TRIMMED), batch_of(teacher, TRIMMED)
    expected = whole.input_ids
    assert torch.tensor(tokenizer.full_ids)[batch.input_ids].tolist() == expected.tolist()
    with torch.no_grad():
        found = distiller.teacher(batch).logits
        logits = teacher(whole).logits[..., list(tokenizer.full_ids)]
    assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert set(distiller.terms(batch)) == {"ce", *losses}
    distiller.step(batch)
    student.save(tmp_path)
    again = cd.Captioner.load(tmp_path)
    assert again.tokenizer == tokenizer
    assert again.generate(batch)[0].text == student.generate(batch)[0].text


def test_a_student_of_words_learns_features_and_captions():
    teacher = made("git")[0]
    student = cd.Captioner.create("debug_student", tokenizer=cd.WordTokenizer(["a", "dog"]))
    losses = {"feature": {"name": "feature", "match": "pooled"}}
    options = {"precision": "fp32", "device": "cpu", "weights": {"ce": 0}}
    distiller = cd.Distiller(teacher, student, losses=losses, **options)
    terms = distiller.terms(probe_batch(student, [student]))
    assert float(terms["feature"].sum.detach()) > 0
