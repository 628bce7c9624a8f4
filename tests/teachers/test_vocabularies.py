"""Teachers of another vocabulary: trimmed ids, and captions that they encode themselves."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, decoders
from capdistill.errors import IncompatibleModels
from capdistill.outputs import Batch
from capdistill.teachers import Ensemble, RetokenizingTeacher, TrimmedTeacher
from capdistill.teachers.vocabularies import for_student
from capdistill.tokenizer import WordTokenizer, pad_batch
from tests.losses.tiny_tokenizers import Pieces
from tests.training import tiny_models as tiny

CAPTIONS = ("a red dog", "a dog.", "A lime cat", "blue", "a blue cat", "Red dogs", "a cat", "lime")
SUBWORDS = Pieces(["Ġdog", "Ġred", "li", "me", "Ġblue", "blue", "Ġa", "Ġcat"], "byte_level")
WORDS = tiny.TOKENIZER


class Trimmed(Pieces):
    """The pieces of another tokenizer that occur in captions, and its letters."""

    def __init__(self, full: Pieces, captions: tuple[str, ...]) -> None:
        kept = {each for caption in captions for each in full.encode(caption)}
        letters = [n for n, p in enumerate(full.vocabulary) if len(p.strip("Ġ")) < 2 or n < 4]
        self.full_vocabulary, self.full_ids = full.vocabulary, tuple(sorted({*kept, *letters}))
        super().__init__([], full.style)
        self.vocabulary = tuple(full.vocabulary[each] for each in self.full_ids)
        self.ids = {piece: number for number, piece in enumerate(self.vocabulary)}


FEWER = Trimmed(SUBWORDS, ("a red dog", "blue"))


def captioner(tokenizer: Any, kind: str = "transformer", seed: int = 1, name: str = "teacher"):
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dim": 6, "layers": 1, "heads": 2, "dropout": 0.0}
    options |= {"width": 8, "ffn": 8} if kind == "transformer" else {"embed": 6, "hidden": 8}
    decoder = decoders.create(kind, **options)
    return Captioner(tiny.Patches(), decoder, tokenizer, name=name)


def batch_for(tokenizer: Any, captions: tuple[str, ...] = CAPTIONS, k: int = 2, first: int = 0):
    ids, mask = pad_batch([tokenizer.encode(c) for c in captions], tokenizer.pad_id)
    rng, images = torch.Generator().manual_seed(first), len(captions) // k
    pixels = torch.randint(256, (images, 3, 8, 8), generator=rng, dtype=torch.uint8)
    names = tuple(f"{first + i}" for i in range(images))
    references = tuple(captions[i * k : (i + 1) * k] for i in range(images))
    return Batch(pixels, ids, mask, captions, names, references, views=(0,) * images)


def distiller(teacher: Any, student: Any, losses: Any, **options: Any) -> Distiller:
    losses = dict.fromkeys(losses) if isinstance(losses, (list, tuple)) else losses
    losses = {name: name if loss is None else loss for name, loss in losses.items()}
    weights = {"ce": 0.1, **dict.fromkeys(losses, 1.0)}
    return Distiller(
        teacher, student, losses, weights, **{**tiny.QUIET, "schedule": "constant", **options}
    )


# -- a trimmed vocabulary -------------------------------------------------------------------------


def test_a_trimmed_teacher_reads_the_full_ids_and_gives_the_students_entries() -> None:
    teacher, batch = captioner(SUBWORDS), batch_for(FEWER)
    trimmed = TrimmedTeacher(teacher, FEWER)
    ids = torch.tensor(FEWER.full_ids)
    full = teacher(replace(batch, input_ids=ids[batch.input_ids]), need=frozenset({"hidden"}))
    found = trimmed(batch, need=frozenset({"logits", "hidden", "features"}))
    assert torch.equal(found.logits, full.logits[..., ids])
    assert torch.equal(found.hidden[-1], full.hidden[-1])
    kept = full.logits.double().softmax(-1)[..., ids]  # the rest, in proportion to what is kept
    expected = kept / kept.sum(-1, keepdim=True)
    assert_close(found.logits.double().softmax(-1), expected, rtol=1e-5, atol=1e-8)


def test_the_dropped_mass_is_the_mean_over_valid_tokens_however_they_are_padded() -> None:
    teacher, batch = captioner(SUBWORDS), batch_for(FEWER)
    trimmed = TrimmedTeacher(teacher, FEWER)
    assert math.isnan(trimmed.dropped_mass)
    trimmed(batch)
    ids = torch.tensor(FEWER.full_ids)
    full = teacher(replace(batch, input_ids=ids[batch.input_ids])).logits.double().softmax(-1)
    lost = 1 - full[..., ids].sum(-1)
    assert 0.01 < trimmed.dropped_mass < 0.95
    assert trimmed.dropped_mass == pytest.approx(lost[batch.target_mask].mean().item(), rel=1e-5)
    again = TrimmedTeacher(teacher, FEWER)
    again(replace(batch, input_ids=F.pad(batch.input_ids, (0, 3)), mask=F.pad(batch.mask, (0, 3))))
    assert again.dropped_mass == pytest.approx(trimmed.dropped_mass, rel=1e-5)


def test_the_distiller_trims_by_itself_and_every_loss_works() -> None:
    teacher, student = captioner(SUBWORDS), captioner(FEWER, "lstm", 2, "student")
    losses = ["token", "word", "universal", "feature", "hidden", "attention", "top_k", "reverse_kl"]
    trainer = distiller(teacher, student, losses)
    assert isinstance(trainer.teacher, TrimmedTeacher)
    by_hand = distiller(TrimmedTeacher(teacher, FEWER), copy.deepcopy(student), losses)
    batch = batch_for(FEWER)
    terms, expected = trainer.terms(batch), by_hand.terms(batch)
    found, wanted = ({n: t.sum.item() for n, t in each.items()} for each in (terms, expected))
    assert found == wanted
    assert found["word"] == pytest.approx(found["token"])  # one vocabulary
    history = trainer.fit([batch, batch_for(FEWER, first=9)], [batch], epochs=2, learning_rate=0.01)
    first, last = (row["train"]["terms"]["token"]["raw"] for row in history.epochs)
    assert last < first
    assert 0.01 < history.epochs[-1]["dropped_mass"] < 0.95


def test_a_trimmed_teacher_captions_in_the_students_entries() -> None:
    trimmed = TrimmedTeacher(captioner(SUBWORDS), FEWER)
    batch = batch_for(FEWER)
    for hypothesis in trimmed.generate(batch, beam_size=2, max_length=6):
        assert hypothesis.text == FEWER.decode(hypothesis.tokens)
    member = captioner(FEWER, seed=3)
    mixed = Ensemble({"trimmed": trimmed, "other": member})  # one vocabulary
    assert mixed(batch).logits.shape[-1] == len(FEWER.vocabulary)


def test_a_tokenizer_that_was_not_trimmed_from_the_teachers_is_refused() -> None:
    with pytest.raises(IncompatibleModels, match="not trimmed from that of 'teacher'"):
        TrimmedTeacher(captioner(WORDS), FEWER)


def test_members_of_an_ensemble_are_trimmed_one_by_one() -> None:
    student = captioner(FEWER, "lstm", 2, "student")
    members = {"one": captioner(SUBWORDS), "other": captioner(SUBWORDS, seed=5)}
    losses = {"token": None, "hidden": {"name": "hidden", "teacher": "other"}}
    trainer = distiller(members, student, losses)
    assert [type(m) for m in trainer.teacher.members.values()] == [TrimmedTeacher] * 2
    batch = batch_for(FEWER)
    expected = Ensemble({n: TrimmedTeacher(m, FEWER) for n, m in members.items()})
    assert_close(trainer.teacher_output(batch).logits, expected(batch).logits)
    assert math.isfinite(trainer.step(batch)["loss"])


# -- a different vocabulary -----------------------------------------------------------------------


def test_a_trimmed_member_and_its_untrimmed_one_are_told_how_they_mix() -> None:
    full, few = captioner(SUBWORDS), captioner(FEWER)
    for members in ([full, few], [few, full]):
        with pytest.raises(
            IncompatibleModels, match=r"larger one as .*TrimmedTeacher\(teacher, to"
        ):
            Ensemble(members)
    assert Ensemble([TrimmedTeacher(full, FEWER), few]).tokenizer is FEWER


def test_a_retokenizing_teacher_reads_its_own_ids_of_the_captions() -> None:
    teacher, batch = captioner(SUBWORDS), batch_for(WORDS)
    found = RetokenizingTeacher(teacher)(batch, need=frozenset({"logits", "features"}))
    own = batch_for(SUBWORDS)
    expected = teacher(own)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.mask, own.target_mask)


LEARNED = ["word", "universal", "pooled"]
POOLED = {"word": None, "universal": None, "pooled": {"name": "feature", "match": "pooled"}}


@pytest.mark.parametrize("pair", [(WORDS, SUBWORDS), (SUBWORDS, WORDS)])
def test_words_of_another_vocabulary_are_learned(pair: tuple[Any, Any]) -> None:
    mine, theirs = pair
    teacher, student = captioner(theirs), captioner(mine, "lstm", 2, "student")
    trainer = distiller(teacher, student, POOLED, learning_rate=0.02)
    assert isinstance(trainer.teacher, RetokenizingTeacher)
    rows = [trainer.step(batch_for(mine)) for _ in range(25)]
    for name in ("word", "pooled"):
        assert rows[-1]["terms"][name]["raw"] < 0.7 * rows[0]["terms"][name]["raw"]
    counts = rows[0]["counts"]
    words = sum(len(caption.split()) + 1 for caption in CAPTIONS)
    assert counts["word"] == counts["universal"] == words <= counts["ce"]


def test_several_micro_batches_are_one_step_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    batches = [batch_for(WORDS, CAPTIONS[:4]), batch_for(WORDS, CAPTIONS[4:], first=7)]
    whole = tiny.merge(batches)
    two = distiller(teacher, copy.deepcopy(student), POOLED)
    one = distiller(teacher, copy.deepcopy(student), POOLED)
    split, joint = two.step(*batches), one.step(whole)
    for name in LEARNED:
        assert split["terms"][name]["raw"] == pytest.approx(joint["terms"][name]["raw"], rel=1e-5)
    for a, b in zip(two.objective.parameters(), one.objective.parameters(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("loss", ["token", "hidden", "attention", "feature"])
def test_losses_that_compare_position_by_position_are_refused_with_the_options(loss: str) -> None:
    student = captioner(WORDS, "lstm", 2, "student")
    with pytest.raises(IncompatibleModels, match=r"vocabularies differ at entry 4") as caught:
        distiller(captioner(SUBWORDS), student, [loss])
    for option in (
        "HuggingFace",
        '"word"',
        '"universal"',
        "pooled",
        "teachers.caption",
        "Recommended",
    ):
        assert option in str(caught.value)


def test_captions_sampled_from_the_student_are_scored_in_the_teachers_pieces() -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    trainer = distiller(teacher, student, ["word"], on_policy=0.5, batch_size=4)
    row = trainer.step(batch_for(WORDS))
    assert math.isfinite(row["loss"])
    sampled = trainer.prepare_batch(batch_for(WORDS))
    assert sampled.sampled.sum() == 4
    assert trainer.teacher.as_read(sampled).captions == sampled.captions


def test_word_dropout_leaves_targets_and_teacher_alone() -> None:
    teacher, student = captioner(SUBWORDS), captioner(WORDS, "lstm", 2, "student")
    counts = [
        distiller(teacher, copy.deepcopy(student), ["word"], word_dropout=p).step(batch_for(WORDS))
        for p in (0.0, 0.5)
    ]
    assert counts[0]["counts"] == counts[1]["counts"]
    assert counts[0]["terms"]["word"] != counts[1]["terms"]["word"]


def test_an_ensemble_of_another_vocabulary_is_read_as_a_mixture() -> None:
    student = captioner(WORDS, "lstm", 2, "student")
    members = {"one": captioner(SUBWORDS), "other": captioner(SUBWORDS, seed=5)}
    trainer = distiller(members, student, ["word"])
    found = trainer.teacher_output(batch_for(WORDS)).logits
    assert_close(found, Ensemble(members)(batch_for(SUBWORDS)).logits)
    assert math.isfinite(trainer.step(batch_for(WORDS))["loss"])


def test_a_wrapped_teacher_of_another_vocabulary_is_probed_on_its_own_ids() -> None:
    model = captioner(SUBWORDS)
    need = frozenset({"logits", "features"})
    wrapped = cd.teachers.wrap(model, lambda m, batch: m(batch, need=need), SUBWORDS, name="theirs")
    student = captioner(WORDS, "lstm", 2, "student")
    trainer = distiller(wrapped, student, POOLED)
    batch = batch_for(WORDS)
    terms = trainer.terms(batch)
    expected = distiller(model, copy.deepcopy(student), POOLED).terms(batch)
    for name in LEARNED[:2]:
        assert terms[name].sum.item() == pytest.approx(expected[name].sum.item(), rel=1e-5)


def test_a_teacher_of_the_same_vocabulary_is_left_as_it_is() -> None:
    teacher = captioner(WORDS)
    assert for_student(teacher, captioner(SameWords())) is teacher


class SameWords(WordTokenizer):
    def __init__(self) -> None:
        super().__init__(WORDS.vocabulary[4:])


def test_the_loss_is_made_from_a_run_file() -> None:
    given = json.loads(
        '{"words": {"name": "word", "temperature": [4, 1]}, "u": {"name": "universal"}}'
    )
    student = captioner(WORDS, "lstm", 2, "student")
    trainer = distiller(captioner(SUBWORDS), student, given)
    assert trainer.step(batch_for(WORDS))["settings"]["words"]["temperature"] == 4.0
