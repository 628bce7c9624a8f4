"""Laws 3 to 6: the teacher is only asked, losses are trained with the student, all is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.teachers import normalised, wrap
from capdistill.tokenizer import WordTokenizer
from tests.training import tiny_models as tiny

QUIET = {**tiny.QUIET, "schedule": "constant"}  # some tests step by hand
TRAIN = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2)]


def pair(**options: Any) -> tuple[Captioner, Captioner]:
    return tiny.make_teacher(norm=True, dropout=0.5, **options), tiny.make_student()


# -- law 3 ----------------------------------------------------------------------------------


class Meddler:
    """Puts the teacher into training mode whenever it can, and looks at it when it is asked."""

    def __init__(self, teacher: nn.Module) -> None:
        self.seen: list[tuple[bool, bool]] = []
        teacher.register_forward_hook(self.look)

    def look(self, teacher: nn.Module, given: Any, output: CaptionerOutput) -> None:
        modes = any(module.training for module in teacher.modules())
        self.seen.append((modes, output.logits.requires_grad))

    def on_fit_start(self, trainer: Distiller) -> None:
        trainer.teacher.train()

    def on_step(self, trainer: Distiller, row: Any) -> None:
        trainer.teacher.train()


def test_the_teacher_is_asked_in_eval_mode_without_grad_and_stays_bit_equal() -> None:
    teacher, student = pair()
    before, distiller = tiny.weights_of(teacher), Distiller(teacher, student, **QUIET)
    meddler = Meddler(teacher)
    distiller.fit(TRAIN, TRAIN, epochs=2, callbacks=[meddler])
    assert len(meddler.seen) == 8
    assert set(meddler.seen) == {(False, False)}
    assert tiny.same_bits(before, tiny.weights_of(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teachers_own_flags_come_back() -> None:
    teacher, student = pair()
    teacher.train()
    teacher.encoder.norm.eval()
    flags = [module.training for module in teacher.modules()]
    Distiller(teacher, student, **QUIET).fit(TRAIN, epochs=1)
    assert [module.training for module in teacher.modules()] == flags


def test_a_loss_does_not_take_what_one_run_has_trained_into_another() -> None:
    losses = {"token": cd.TokenKD(), "hidden": cd.HiddenKD()}
    Distiller(*pair(), losses=losses, **QUIET)  # nothing is trained yet
    Distiller(*pair(), losses=losses, **QUIET).fit(TRAIN, epochs=1)
    with pytest.raises(ConfigError, match=r"'hidden' is a HiddenKD that another trainer has used"):
        Distiller(*pair(), losses=losses, **QUIET)
    for loss in losses.values():
        loss.was_trained = False
    Distiller(*pair(), losses=losses, **QUIET).fit(TRAIN, epochs=1)
    Distiller(*pair(), losses={"token": losses["token"]}, **QUIET)  # it has nothing to pass on


def test_a_shared_trainable_parameter_is_refused_by_name() -> None:
    teacher, student = pair(dim=6)
    student.encoder.conv = teacher.encoder.conv
    with pytest.raises(ConfigError, match=r"encoder\.conv\.weight.*deepcopy"):
        Distiller(teacher, student)


def test_what_is_unfrozen_after_construction_is_refused_too() -> None:
    teacher, student = pair(dim=6, trainable=False)
    student.encoder.conv = teacher.encoder.conv
    distiller = Distiller(teacher, student, **QUIET)
    student.encoder.conv.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"encoder\.conv\.weight"):
        distiller.fit(TRAIN, epochs=1)


def test_a_shared_frozen_encoder_stays_frozen_for_both() -> None:
    teacher, _ = pair(dim=6)
    teacher.encoder.requires_grad_(False)
    student = tiny.make_student()
    student.encoder = teacher.encoder
    before = tiny.weights_of(teacher)
    Distiller(teacher, student, **QUIET).fit(TRAIN, epochs=1)
    assert tiny.same_bits(before, tiny.weights_of(teacher))  # batch norm's statistics among them


# -- law 4 ----------------------------------------------------------------------------------


def projectors(distiller: Distiller) -> dict[str, Tensor]:
    return tiny.weights_of(distiller.objective.losses)


def test_projectors_are_trained_saved_and_moved(
    saveable: Callable[..., Captioner], tmp_path: Path
) -> None:
    distiller = Distiller(tiny.make_teacher(), saveable(), **QUIET)
    start = projectors(distiller)
    assert {name.split(".")[0] for name in start} == {"feature", "hidden"}

    distiller.fit(TRAIN, epochs=1, out=tmp_path)

    owned = {id(p) for group in distiller.optimizer.param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert owned >= {id(p) for p in distiller.objective.losses.parameters()}
    assert all((start[key] != value).any() for key, value in projectors(distiller).items())
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["objective"]
    for key, value in projectors(distiller).items():
        assert_close(saved[f"losses.{key}"], value, rtol=0, atol=0)
    distiller.objective.to("meta")
    assert all(p.is_meta for p in distiller.objective.losses.parameters())


def test_parameters_without_a_gradient_are_named_once() -> None:
    student = tiny.make_student()
    student.decoder.never_used = nn.Linear(2, 2)
    trainer = Trainer(student, **QUIET)
    with pytest.warns(UserWarning, match=r"2 of \d+ .*student\.decoder\.never_used\.weight"):
        trainer.step(TRAIN[0])
    trainer.step(TRAIN[0])  # warnings are errors here


# -- law 5 ----------------------------------------------------------------------------------


def test_construction_changes_no_random_state_flag_buffer_or_weight() -> None:
    teacher, student = pair()
    teacher.encoder.train()
    student.eval()
    models = (teacher, student)
    flags = [module.training for model in models for module in model.modules()]
    before, chance = [tiny.weights_of(model) for model in models], torch.get_rng_state()
    Distiller(teacher, student)
    assert torch.equal(torch.get_rng_state(), chance)
    assert [module.training for model in models for module in model.modules()] == flags
    for model, weights in zip(models, before, strict=True):
        assert tiny.same_bits(weights, tiny.weights_of(model))


def test_projectors_depend_on_the_seed_alone() -> None:
    made = []
    for chance, seed in ((1, 7), (2, 7), (1, 8)):
        models = pair()
        torch.manual_seed(chance)
        made.append(projectors(Distiller(*models, seed=seed)))
    assert tiny.same_bits(made[0], made[1])
    assert not tiny.same_bits(made[0], made[2])


OTHER = WordTokenizer(["red", "green", "blue", "a", "dog", "cat"])


@pytest.mark.parametrize("losses", [["token"], ["hidden"], ["feature"]])
def test_other_words_under_the_same_ids_are_refused(losses: list[str]) -> None:
    teacher = tiny.make_teacher()
    teacher.tokenizer = OTHER
    with pytest.raises(IncompatibleModels, match=r"entry 5: .*'lime'.*'green'"):
        Distiller(teacher, tiny.make_student(), losses={name: name for name in losses})


def test_features_alone_may_be_compared_across_vocabularies() -> None:
    teacher = tiny.make_teacher()
    teacher.tokenizer = OTHER
    losses = {"feature": cd.FeatureKD(match="pooled")}
    row = Distiller(teacher, tiny.make_student(), losses=losses, **QUIET).step(TRAIN[0])
    assert set(row["terms"]) == {"ce", "feature"}


def test_a_grid_that_is_missing_is_named() -> None:
    teacher, student = pair()
    teacher.encoder.grid = None
    with pytest.raises(IncompatibleModels, match=r"teacher 'teacher' gives no grid"):
        Distiller(teacher, student, losses={"feature": cd.FeatureKD(match="grid")})


def test_hidden_widths_that_differ_without_a_projection_are_named() -> None:
    teacher = tiny.make_teacher()
    teacher.decoder.hidden_dims = (9, 9)
    with pytest.raises(IncompatibleModels, match=r"(?s)width.*9.*project=True"):
        Distiller(teacher, tiny.make_student(), losses={"hidden": cd.HiddenKD(project=False)})


def test_a_model_that_gives_other_shapes_than_it_promises_is_refused() -> None:
    teacher, student = pair()
    student.encoder.tokens = 5
    with pytest.raises(IncompatibleModels, match=r"'student' gives features of shape \(2, 4, 6\)"):
        Distiller(teacher, student)
    student.encoder.tokens = 4
    student.decoder.hidden_dims = (8, 6, 6)
    with pytest.raises(IncompatibleModels, match=r"'student' gives 2 hidden states, but .* 3"):
        Distiller(teacher, student)


class Unsummed(DistillationLoss):
    def forward(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        return (student.logits - teacher.logits).square().mean(-1)


def test_a_loss_that_gives_no_single_number_is_refused() -> None:
    with pytest.raises(IncompatibleModels, match=r"'mine' \(Unsummed\).*shape \(4, 3\).*the sum"):
        Distiller(*pair(), losses={"mine": Unsummed()})


def test_what_is_no_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers\.wrap"):
        Distiller(nn.Linear(1, 1), tiny.make_student())


# -- law 6 ----------------------------------------------------------------------------------


def test_the_students_directory_loads_alone(
    saveable: Callable[..., Captioner], tmp_path: Path
) -> None:
    distiller = Distiller(tiny.make_teacher(), saveable(), **QUIET)
    distiller.fit(TRAIN, TRAIN, epochs=1, out=tmp_path)
    for name in ("best", "final"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"model.safetensors", "captioner.json", "tokenizer.json"}
        loaded = Captioner.load(tmp_path / name)
        assert tiny.same_bits(loaded.state_dict(), distiller.student.state_dict())
    (tmp_path / "state.pt").unlink()
    images = TRAIN[0].images
    captions = Captioner.load(tmp_path / "best").caption(images)
    assert captions == distiller.student.caption(images)


# -- a foreign teacher ----------------------------------------------------------------------


class Theirs(nn.Module):
    """Words first, pixels in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(tiny.TOKENIZER), 7)
        self.see = nn.Sequential(nn.Conv2d(3, 7, 4, 4), nn.BatchNorm2d(7), nn.Dropout(0.5))
        self.out = nn.Linear(7, len(tiny.TOKENIZER))
        self.asked: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append((tuple(words.shape), self.training))
        seen = self.see(pixels)
        states = torch.tanh(self.words(words) + seen.mean((2, 3)))
        return self.out(states), states, seen


def adapt(module: nn.Module, batch: Batch) -> CaptionerOutput:
    k = batch.captions_per_image
    pixels = normalised(batch, mean=(0.5,) * 3, std=(0.5,) * 3, size=8).repeat_interleave(k, 0)
    logits, states, seen = module(pixels, batch.inputs.T)
    return CaptionerOutput(
        logits=logits.transpose(0, 1),
        hidden=(states.transpose(0, 1),),
        features=seen[::k].flatten(2).transpose(1, 2),
        attention=None,
        mask=batch.target_mask,
    )


def test_a_foreign_teacher_distils_and_is_probed_before_the_optimizer_exists() -> None:
    torch.manual_seed(0)
    theirs = Theirs()
    teacher = wrap(theirs, adapt, tiny.TOKENIZER, name="theirs")
    before = tiny.weights_of(theirs)
    losses = {"token": cd.TokenKD(2.0), "feature": cd.FeatureKD("pooled"), "hidden": cd.HiddenKD()}
    distiller = Distiller(teacher, tiny.make_student(), losses=losses, **QUIET)
    assert theirs.asked == []

    history = distiller.fit(TRAIN, TRAIN, epochs=2, learning_rate=0.01)

    assert theirs.asked[0][0] == tuple(TRAIN[0].inputs.T.shape)
    assert not any(training for _, training in theirs.asked)
    assert set(history.epochs[0]["train"]["terms"]) == {"ce", "token", "feature", "hidden"}
    assert history.epochs[1]["train"]["loss"] < history.epochs[0]["train"]["loss"]
    assert distiller.objective.losses["hidden"].projectors[0].out_features == 7
    assert tiny.same_bits(before, tiny.weights_of(theirs))
    owned = {id(p) for group in distiller.optimizer.param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert owned == {id(p) for p in distiller.objective.parameters()}


def test_a_foreign_teacher_whose_spec_is_declared_builds_at_once() -> None:
    spec = ModelSpec(7, 4, 0, (2, 2), (7,), tiny.TOKENIZER.vocabulary, False, name="theirs")
    teacher = wrap(Theirs(), adapt, tiny.TOKENIZER, spec=spec)
    distiller = Distiller(teacher, tiny.make_student(), losses={"hidden": "hidden"}, **QUIET)
    assert len(list(distiller.objective.losses.parameters())) == 2
    assert distiller.step(TRAIN[0])["terms"]["hidden"]["raw"] > 0


def test_a_loop_of_ones_own_steps_a_foreign_pair() -> None:
    teacher = wrap(Theirs(), adapt, tiny.TOKENIZER)
    losses = {"hidden": "hidden"}
    distiller = Distiller(teacher, tiny.make_student(), losses=losses, **QUIET)
    assert set(distiller.terms(TRAIN[0])) == {"ce", "hidden"}
    assert distiller.step(*TRAIN)["step"] == 1


def test_a_teachers_copy_has_nothing_to_learn_from_it() -> None:
    teacher = tiny.make_teacher()
    distiller = Distiller(teacher, copy.deepcopy(teacher), losses={"token": "token"}, **QUIET)
    assert distiller.step(TRAIN[0])["terms"]["token"]["raw"] == pytest.approx(0.0, abs=1e-5)
