"""Several teachers in one run: their mixture for losses of logits, each by name for any loss."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, SelfCritical
from capdistill.data import CaptionData
from capdistill.data.source import FixedBatches
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels
from capdistill.outputs import Batch, CaptionerOutput, select_images
from capdistill.teachers import Ensemble, wrap
from capdistill.tokenizer import WordTokenizer
from tests.training import tiny_models as tiny

WEIGHTS: dict[str, Any] = {"ce": 0.5, "token": 0.7, "feature": 0.2, "hidden": 0.1}
ALL: dict[str, Any] = {"token": "token", "feature": "feature", "hidden": "hidden"}


def named(kind: str, teacher: str, **options: Any) -> dict[str, Any]:
    return {"name": kind, "teacher": teacher, **options}


def two(seed: int = 2) -> dict[str, Captioner]:
    """Teachers of different widths."""
    return {"wide": tiny.make_teacher(seed, dim=8), "thin": tiny.make_teacher(seed + 1, dim=4)}


def distiller(teacher: Any, student: Captioner | None = None, **options: Any) -> Distiller:
    return Distiller(
        teacher, student or tiny.make_student(), **{**tiny.QUIET, "schedule": "constant", **options}
    )


def sums(trainer: Distiller, batch: Batch) -> dict[str, float]:
    return {name: float(term.sum.detach()) for name, term in trainer.terms(batch).items()}


def gradients(trainer: Distiller, batch: Batch) -> dict[str, Tensor]:
    """Those of all weighted terms."""
    trainer.objective.zero_grad()
    torch.stack([term.weighted for term in trainer.terms(batch).values()]).sum().backward()
    found = trainer.objective.named_parameters()
    return {name: p.grad.clone() for name, p in found if p.grad is not None}


# -- the same as with one teacher, and as with several distillers -------------------------------


@pytest.mark.parametrize("losses", [ALL, {n: named(n, "only") for n in ALL}], ids=["plain", "name"])
@pytest.mark.parametrize("make", [Ensemble, dict], ids=["ensemble", "mapping"])
def test_an_ensemble_of_one_is_that_teacher_bit_for_bit(losses: Any, make: Any) -> None:
    batch = tiny.make_batch([3, 1, 4, 2], k=2)
    teacher = tiny.make_teacher()
    plain = distiller(teacher, losses=ALL, weights=WEIGHTS)
    one = distiller(make({"only": teacher}), losses=losses, weights=WEIGHTS)
    assert sums(one, batch) == sums(plain, batch)
    assert tiny.same_bits(gradients(one, batch), gradients(plain, batch))
    plain.step(batch)
    one.step(batch)
    assert tiny.same_bits(one.objective.state_dict(), plain.objective.state_dict())


def test_two_named_teachers_teach_what_two_distillers_do() -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    losses = {"first": named("feature", "wide"), "second": named("feature", "thin")}
    weights = {"ce": 0.0, "first": 0.3, "second": 0.6}
    both = distiller(teachers, losses=losses, weights=weights)
    total: dict[str, Tensor] = {}
    for term, teacher in (("first", "wide"), ("second", "thin")):
        alone = distiller(
            teachers[teacher],
            losses={term: "feature"},
            weights={"ce": 0.0, term: weights[term]},
        )
        built = both.objective.losses[term].state_dict()
        alone.objective.losses[term].load_state_dict(built)
        assert sums(alone, batch)[term] == sums(both, batch)[term]
        for name, gradient in gradients(alone, batch).items():
            total[name] = total.get(name, 0) + gradient
    found = gradients(both, batch)
    assert found.keys() == total.keys()
    assert_close(found, total)
    assert all(bool(gradient.any()) for gradient in found.values())


@pytest.mark.parametrize("weights", [[1, 1], [3, 1]])
def test_a_loss_of_logits_without_a_name_reads_the_mixture(weights: list[float]) -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    given = teachers if weights == [1, 1] else Ensemble(teachers, weights)
    losses = {"mixed": {"name": "token", "temperature": 1.0}}
    trainer = distiller(given, losses=losses, weights={"ce": 0.0})
    found = sums(trainer, batch)["mixed"]

    student = trainer.student.eval()(batch).logits.double().log_softmax(-1)
    each = [teacher.eval()(batch).logits.double().softmax(-1) for teacher in teachers.values()]
    mixture = (weights[0] * each[0] + weights[1] * each[1]) / sum(weights)
    rows = batch.target_mask
    expected = F.kl_div(student[rows], mixture[rows], reduction="sum")
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_padding_or_splitting_a_batch_changes_nothing() -> None:
    batches = [tiny.make_batch([3, 1], k=2), tiny.make_batch([2, 5, 4, 4], k=2, first=1)]
    losses = {"mixed": "token", "own": named("hidden", "thin")}
    trainer = distiller(two(), losses=losses)
    merged = sums(trainer, tiny.pad(tiny.merge(batches), 2))
    apart = [sums(trainer, batch) for batch in batches]
    for name, value in merged.items():
        assert value == pytest.approx(sum(each[name] for each in apart), rel=1e-5)


# -- what runs ----------------------------------------------------------------------------------


def test_each_teacher_encodes_a_batch_once() -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    losses = {
        "mixed": "token",
        "features": named("feature", "wide"),
        "hidden": named("hidden", "wide"),
        "other": named("feature", "thin"),
    }
    trainer = distiller(teachers, losses=losses)
    before = {name: teacher.encoder.seen for name, teacher in teachers.items()}
    trainer.step(batch)
    seen = {name: teacher.encoder.seen - before[name] for name, teacher in teachers.items()}
    assert seen == {"wide": 2, "thin": 2}  # images


def test_what_no_loss_reads_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    losses = {"soft": named("token", "wide"), "pooled": named("feature", "thin", match="pooled")}
    trainer = distiller(teachers, losses=losses)

    def mix(*_: Any) -> Any:
        raise AssertionError("nothing reads the mixture")

    monkeypatch.setattr(Ensemble, "mix", mix)
    monkeypatch.setattr(teachers["thin"].decoder, "forward", mix)  # features need no decoder
    trainer.step(batch)
    one = distiller(teachers, losses={"soft": named("token", "wide")})
    before = teachers["thin"].encoder.seen
    one.step(batch)
    assert teachers["thin"].encoder.seen == before


def test_no_teacher_changes_or_gets_a_gradient(colours: CaptionData) -> None:
    teachers = {name: teacher.train() for name, teacher in two().items()}
    before = {name: tiny.weights_of(teacher) for name, teacher in teachers.items()}
    trainer = distiller(teachers, losses={"mixed": "token", "own": named("feature", "thin")})
    trainer.fit(colours, colours, epochs=1)
    for name, teacher in teachers.items():
        assert tiny.same_bits(before[name], tiny.weights_of(teacher))
        assert all(module.training for module in teacher.decoder.modules())
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_terms_of_the_history_keep_their_names(colours: CaptionData) -> None:
    trainer = distiller(two(), losses={"mixed": "token", "own": named("feature", "thin")})
    history = trainer.fit(colours, colours, epochs=1)
    assert list(history.epochs[0]["train"]["terms"]) == ["ce", "mixed", "own"]
    assert list(history.epochs[0]["val"]["terms"]) == ["ce", "mixed", "own"]


# -- a draw -------------------------------------------------------------------------------------


def test_in_training_each_image_learns_from_the_member_drawn_for_it() -> None:
    batch = tiny.make_batch([3, 1, 4, 2, 2, 5, 1, 3, 2, 2, 3, 3], k=2)
    teachers = two()
    ensemble = Ensemble(teachers, mixing="draw")
    options: dict[str, Any] = {"losses": {"soft": "token"}, "weights": {"ce": 0.0}, "seed": 3}
    trainer = distiller(ensemble, **options)
    alone = {name: distiller(teacher, **options) for name, teacher in teachers.items()}
    drawn = []
    for trainer.epoch in range(3):
        chosen = [ensemble._draw(3, trainer.epoch, image_id) for image_id in batch.image_ids]
        expected = [
            sums(alone[name], select_images(batch, [image]))["soft"]
            for image, name in enumerate(chosen)
        ]
        trainer.objective.train()
        assert sums(trainer, batch)["soft"] == pytest.approx(sum(expected), rel=1e-5)
        drawn.append(chosen)
    assert drawn[0] != drawn[1]
    assert {*drawn[0], *drawn[1]} == {"wide", "thin"}

    fixed = distiller(Ensemble(teachers), **options)
    trainer.objective.eval()
    assert sums(trainer, batch)["soft"] == sums(fixed, batch)["soft"]  # as in validation


def test_an_ensemble_that_draws_is_no_member_of_another() -> None:
    inner = Ensemble(two(), mixing="draw")
    with pytest.raises(ConfigError, match=r"'inner' is an ensemble with mixing='draw'"):
        Ensemble({"inner": inner, "other": tiny.make_teacher(9)})


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"feature": "feature"},
            r"'feature' needs .*features.* 2 teachers .*\"teacher\": \"wide\"",
        ),
        ({"far": "hidden"}, r"'far' needs hidden.*teachers: wide, thin"),
        ({"soft": named("token", "wid")}, r"'soft' names the teacher 'wid'. Did you mean 'wide'"),
        ({"soft": named("token", "none")}, "Available: thin, wide"),
        (None, r"'feature' needs"),
    ],
)
def test_a_loss_that_reads_no_teacher_that_there_is_is_refused(losses: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distiller(two(), losses=losses)


def test_the_only_teacher_has_its_own_name() -> None:
    distiller(tiny.make_teacher(), losses={"soft": named("token", "teacher")})
    with pytest.raises(ConfigError, match=r"'techer'. Did you mean 'teacher'"):
        distiller(tiny.make_teacher(), losses={"soft": named("token", "techer")})


def test_a_name_set_on_the_loss_is_read_too() -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    loss = cd.TokenKD()
    loss.teacher = "thin"
    found = sums(distiller(teachers, losses={"soft": loss}), batch)
    assert found == sums(distiller(teachers["thin"], losses={"soft": "token"}), batch)


@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_names_a_teacher_by_its_place_too(place: int) -> None:
    name = ("wide", "thin")[place]
    several = distiller(two(), losses={"far": {"name": "hidden", "teacher": place}})
    assert several.objective.losses["far"].teacher == name
    batch = tiny.make_batch([3, 1, 4, 2], k=2)
    by_name = distiller(two(), losses={"far": named("hidden", name)})
    assert sums(several, batch) == sums(by_name, batch)


def test_the_only_teacher_is_in_place_0() -> None:
    alone = distiller(tiny.make_teacher(), losses={"far": {"name": "hidden", "teacher": 0}})
    assert alone.objective.losses["far"].teacher == "teacher"
    for place in (1, -1, True):
        with pytest.raises(ConfigError, match=f"names the teacher {place}"):
            distiller(tiny.make_teacher(), losses={"far": {"name": "hidden", "teacher": place}})


def test_teachers_of_other_words_are_refused_by_name() -> None:
    other = tiny.make_teacher(4)
    other.tokenizer = WordTokenizer(["red", "lime", "blue", "a", "cat", "dog"])
    with pytest.raises(IncompatibleModels, match=r"'wide' has 'dog'.*'new' has 'cat'"):
        distiller({"wide": tiny.make_teacher(), "new": other}, losses={"soft": "token"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give a list of captioners, or a mapping"),
        ({"one": 3}, "'one' is int"),
        ("teacher", "The teacher is str.*Several are a mapping"),
        (None, "The teacher is NoneType"),
    ],
)
def test_what_is_no_teacher_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distiller(given)


@pytest.mark.parametrize("trained", [True, False])
def test_a_trained_part_of_any_teacher_is_refused_a_frozen_one_is_shared(trained: bool) -> None:
    student, teachers = tiny.make_student(), two()
    teachers["thin"].encoder = student.encoder.requires_grad_(trained)
    teachers["thin"].decoder = tiny.make_teacher(3, dim=6).decoder
    losses = {"soft": "token"}
    if trained:
        with pytest.raises(ConfigError, match=r"would be trained.*student.encoder"):
            distiller(teachers, student, losses=losses)
        return
    trainer = distiller(teachers, student, losses=losses)
    trainer.objective.train()
    assert not student.encoder.training
    assert student.decoder.training


# -- with everything else -----------------------------------------------------------------------


def test_a_wrapped_teacher_is_built_for_when_it_is_known() -> None:
    inner, batch = tiny.make_teacher(5), tiny.make_batch([3, 1, 4, 2], k=2)

    def adapt(module: Any, batch: Batch) -> Any:
        return module(batch, need=frozenset({"logits", "features", "hidden"}))

    theirs = wrap(inner, adapt, inner.tokenizer, image_size=8, name="theirs")
    teachers = {"ours": tiny.make_teacher(), "theirs": theirs}
    losses = {"mixed": "token", "own": named("feature", "theirs", match="pooled")}
    trainer = distiller(teachers, losses=losses)
    assert "own" in trainer.step(batch)["terms"]
    known = distiller(inner, losses={"own": {"name": "feature", "match": "pooled"}})
    trainer.objective.load_state_dict(
        {k: v for k, v in trainer.objective.state_dict().items() if "own" not in k}
        | {k: v for k, v in known.objective.state_dict().items() if "own" in k}
    )
    known.objective.student.load_state_dict(trainer.student.state_dict())
    assert sums(trainer, batch)["own"] == pytest.approx(sums(known, batch)["own"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*learning rate stays.*:UserWarning")
def test_self_critical_takes_several_teachers() -> None:
    batch, teachers = tiny.make_batch([3, 1, 4, 2], k=2), two()
    trainer = SelfCritical(
        tiny.make_student(),
        lambda ids, captions: [float(len(text)) for text in captions],
        teacher=teachers,
        losses={"mixed": "token", "own": named("feature", "thin")},
        samples=2,
        **tiny.QUIET,
    )
    assert list(trainer.step(batch)["terms"]) == ["reward", "mixed", "own"]
    with pytest.raises(ConfigError, match="needs hidden"):
        SelfCritical(tiny.make_student(), teacher=teachers, losses={"own": "hidden"}, **tiny.QUIET)


def test_captions_of_the_student_are_scored_by_all_teachers(colours: CaptionData) -> None:
    losses = {"mixed": "token", "own": named("token", "thin")}
    trainer = distiller(Ensemble(two(), mixing="draw"), losses=losses, on_policy=0.5)
    history = trainer.fit(colours, epochs=1, batch_size=3, accumulation_steps=2)
    assert all(term["raw"] > 0 for term in history.epochs[0]["train"]["terms"].values())


def test_a_student_follows_itself_beside_another_teacher(colours: CaptionData) -> None:
    student = tiny.make_student()
    teachers = {"mean": cd.teachers.MeanTeacher(student, 0.9), "wide": tiny.make_teacher()}
    losses = {"mixed": "token", "own": named("hidden", "mean")}
    trainer = distiller(teachers, student, losses=losses)
    trainer.fit(colours, epochs=1, batch_size=2)
    assert teachers["mean"].average.updates == 3


def test_check_looks_at_every_teacher() -> None:
    losses = {"mixed": "token", "own": named("feature", "thin")}
    batches = [tiny.make_batch([3, 1, 4, 2], k=2)]
    report = distiller(two(), losses=losses, batch_size=2).check(batches)
    assert report.ok, str(report)
    shapes = [row.finding for row in report.rows if row.topic == "shapes"]
    assert any(finding.startswith("teacher 'wide': 4 tokens x 8") for finding in shapes)
    assert any(finding.startswith("teacher 'thin': 4 tokens x 4") for finding in shapes)


# -- a run that is resumed ----------------------------------------------------------------------

Make = Callable[..., Captioner]


def of_run(make: Make, seed: int = 1, **options: Any) -> Distiller:
    losses = {"mixed": "token", "own": named("feature", "thin")}
    chosen = {"losses": losses, "batch_size": 2, "epochs": 3, "learning_rate": 0.01, **options}
    teacher = Ensemble(two(), mixing="draw")
    return distiller(teacher, make(seed, dropout=0.3), **chosen)


class CtrlC:
    def on_step(self, trainer: Any, row: Any) -> None:
        if row["step"] == 4:  # within the second of three epochs
            signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_is_the_same_bit_for_bit(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    whole = of_run(saveable)
    whole.fit(colours, colours, out=tmp_path / "whole")
    with pytest.warns(UserWarning, match="Interrupted after step 4"):
        of_run(saveable).fit(colours, colours, out=tmp_path / "parts", callbacks=[CtrlC()])
    rest = of_run(saveable, seed=8)
    rest.fit(colours, colours, out=tmp_path / "parts", resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    losses = [[row["train"] for row in run.history.epochs] for run in (whole, rest)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("change", ["member", "name", "loss", "mixing"])
def test_a_run_of_other_teachers_is_not_resumed(
    saveable: Make, colours: CaptionData, tmp_path: Path, change: str
) -> None:
    of_run(saveable, epochs=1).fit(colours, out=tmp_path)
    teachers: dict[str, Any] = dict(two())
    losses: dict[str, Any] = {"mixed": "token", "own": named("feature", "thin")}
    if change == "member":
        teachers["wide"] = tiny.make_teacher(77)
    if change == "name":
        teachers = {"broad": teachers["wide"], "thin": teachers["thin"]}
    if change == "loss":
        losses["mixed"] = named("token", "wide")
    mixing: Any = "fixed" if change == "mixing" else "draw"
    other = distiller(
        Ensemble(teachers, mixing=mixing), saveable(), losses=losses, batch_size=2, epochs=2
    )
    with pytest.raises(CheckpointError, match=r"teacher 1|losses\.mixed"):
        other.fit(colours, out=tmp_path, resume=True)


def test_the_description_of_a_run_names_its_teachers(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    of_run(saveable, epochs=1).fit(colours, out=tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["losses"]["own"] == named("feature", "thin")
    assert [member["name"] for member in content["models"][1]["members"]] == ["wide", "thin"]
    again = distiller(Ensemble(two()), losses=content["losses"])
    assert again.objective.losses["own"].teacher == "thin"


def sure_of(word: str) -> Any:
    """A teacher that gives one word, whatever it sees."""
    only = F.one_hot(torch.tensor(tiny.TOKENIZER.vocabulary.index(word)), len(tiny.TOKENIZER))

    def adapt(module: Any, batch: Batch) -> CaptionerOutput:
        return CaptionerOutput(logits=(50.0 * only).expand(*batch.targets.shape, -1))

    return wrap(torch.nn.Identity(), adapt, tiny.TOKENIZER, image_size=8)


def test_two_teachers_teach_their_mixture() -> None:
    words = ("red", "blue")
    trainer = distiller(
        Ensemble({word: sure_of(word) for word in words}, weights=[3, 1]),
        losses={"soft": {"name": "token", "temperature": 1.0}},
        weights={"ce": 0.0},
        learning_rate=0.05,
    )
    batch = tiny.make_batch([2, 2], k=2)
    for _ in range(60):
        trainer.step(batch)
    found = trainer.student.eval()(batch).logits.softmax(-1)
    for word, expected in zip(words, (0.75, 0.25), strict=True):
        share = found[..., tiny.TOKENIZER.vocabulary.index(word)]
        assert_close(share, torch.full_like(share, expected), atol=0.05, rtol=0)


def test_validation_reads_all_teachers(colours: CaptionData) -> None:
    trainer = distiller(two(), losses={"mixed": "token", "own": named("hidden", "wide")})
    trainer.make_ready(tiny.make_batch([2, 2]))
    found, _ = trainer.validate(FixedBatches([tiny.make_batch([3, 1, 4, 2], k=2)]))
    assert set(found["terms"]) == {"ce", "mixed", "own"}
