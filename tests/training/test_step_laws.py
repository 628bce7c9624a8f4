"""Law 1 and case 10 through the trainer: masked, then divided once, however a batch is cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from capdistill import Captioner, Distiller, Trainer
from capdistill.errors import ConfigError, NotFiniteLoss
from capdistill.generation import Hypothesis
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch
from capdistill.runtime import evaluating
from tests.training import tiny_models as tiny

WEIGHTS = {"ce": 0.5, "token": 0.7, "feature": 0.4, "hidden": 0.3}
SEVEN = [3, 1, 2, 4, 1, 5, 2]  # words of the captions, case 10
CONSTANT = {"schedule": "constant", "label_smoothing": 0.0}  # most tests step by hand
SGD = {"learning_rate": 0.01, "encoder_lr_scale": 1.0, "weight_decay": 0.0, "max_grad_norm": None}


def plain(**options: Any) -> Trainer:
    return Trainer(tiny.make_student(), **{**tiny.QUIET, **CONSTANT, **options})


def distilling(**options: Any) -> Distiller:
    pair = tiny.make_teacher(), tiny.make_student()
    return Distiller(*pair, weights=WEIGHTS, **{**tiny.QUIET, **CONSTANT, **options})


both = pytest.mark.parametrize("make", [plain, distilling])


def with_sgd(trainer: Trainer) -> Trainer:
    trainer.make_optimizer = torch.optim.SGD  # type: ignore[method-assign, assignment]
    return trainer


def gradients(trainer: Trainer, *batches: Batch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The row of a step, and the gradients at the moment the optimizer took them."""
    seen: dict[str, torch.Tensor] = {}

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            named = trainer.objective.named_parameters()
            seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.make_optimizer = Spy  # type: ignore[method-assign, assignment]
    return trainer.step(*batches), seen


def require_same_step(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    (row, grads), (row_again, grads_again) = one, other
    assert_close(row["loss"], row_again["loss"], rtol=1e-6, atol=1e-7)
    assert row["counts"] == row_again["counts"]
    assert row["terms"].keys() == row_again["terms"].keys()
    for name, term in row["terms"].items():
        assert_close(term, row_again["terms"][name], rtol=1e-6, atol=1e-6)
    assert grads.keys() == grads_again.keys()
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    assert_close(grads, grads_again, rtol=1e-5, atol=1e-6)


@both
def test_more_padding_changes_neither_loss_nor_gradients(make: Callable[..., Trainer]) -> None:
    batch = tiny.make_batch([3, 1, 2, 5], k=2)
    alone = gradients(make(max_grad_norm=None), batch)
    require_same_step(alone, gradients(make(max_grad_norm=None), tiny.pad(batch, 4)))


@both
@pytest.mark.parametrize("cut", [[4], [1, 3], [2, 1, 1], [1, 1, 1, 1]])
def test_splitting_into_micro_batches_changes_nothing(
    make: Callable[..., Trainer], cut: list[int]
) -> None:
    words, parts, start = [3, 1, 2, 6], [], 0
    for size in cut:
        parts.append(tiny.make_batch(words[start : start + size], first=start))
        start += size
    whole = gradients(make(max_grad_norm=None), tiny.merge(parts))
    require_same_step(whole, gradients(make(max_grad_norm=None), *parts))


def one_by_one(words: list[int]) -> list[Batch]:
    return [tiny.make_batch([count], first=i) for i, count in enumerate(words)]


def by_hand(trainer: Trainer, groups: list[list[Batch]]) -> Captioner:
    """Plain gradient descent on whole groups, each term divided by its own count."""
    student = trainer.captioner
    losses = dict(trainer.objective.losses.items())
    for group in groups:
        batch = tiny.merge(group)
        out = student(batch, need=trainer.objective.needed_outputs)
        mask = batch.target_mask
        ce = F.cross_entropy(out.logits[mask], batch.targets[mask])
        loss = ce * (WEIGHTS["ce"] if losses else 1.0)
        if isinstance(trainer, Distiller):
            with evaluating(trainer.teacher), torch.no_grad():
                wanted = trainer.teacher(batch, need=trainer.objective.needed_outputs)
            log_q, p = (x[mask].div(4).log_softmax(-1) for x in (out.logits, wanted.logits))
            kl = F.kl_div(log_q, p, log_target=True, reduction="sum") / mask.sum()
            loss = loss + WEIGHTS["token"] * 16 * kl
            loss = loss + WEIGHTS["feature"] * losses["feature"](out, wanted, batch) / len(group)
            loss = loss + WEIGHTS["hidden"] * losses["hidden"](out, wanted, batch) / mask.sum()
        parameters = list(trainer.objective.parameters())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.01 * grad
    return student


class Watch:
    """What must hold between steps."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.empty_after_steps: list[bool] = []

    def on_step(self, trainer: Trainer, row: Any) -> None:
        self.rows.append(row)
        grads = [parameter.grad for parameter in trainer.objective.parameters()]
        self.empty_after_steps.append(all(grad is None for grad in grads))


@both
def test_the_last_accumulation_group_is_divided_by_what_it_holds(
    make: Callable[..., Trainer],
) -> None:
    batches, watch = one_by_one(SEVEN), Watch()
    trainer = with_sgd(make(accumulation_steps=4, epochs=2, log_every=1, **SGD))
    history = trainer.fit(batches, callbacks=[watch])

    expected = by_hand(make(), [batches[:4], batches[4:]] * 2)
    assert_close(trainer.captioner.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
    assert trainer.step_count == 4
    assert trainer.schedule.last_epoch == 4
    assert watch.empty_after_steps == [True] * 4
    assert [row["step"] for row in history.steps] == [1, 2, 3, 4]
    assert [row["images"] for row in watch.rows] == [4, 3, 4, 3]
    assert [row["step"] for row in history.epochs] == [2, 4]
    assert [row["images"] for row in history.epochs] == [7, 7]
    assert trainer.progress == 1.0


def test_target_tokens_of_a_group_are_counted_with_the_end_token() -> None:
    trainer, batches = plain(), one_by_one(SEVEN)
    assert trainer.step(*batches[:4])["counts"] == {"ce": 14.0}
    assert trainer.step(*batches[4:])["counts"] == {"ce": 11.0}


@both
def test_a_run_shorter_than_one_group_makes_one_update(make: Callable[..., Trainer]) -> None:
    batches = one_by_one(SEVEN[:3])
    trainer = with_sgd(make(accumulation_steps=4, epochs=1, **SGD))
    trainer.fit(batches)
    expected = by_hand(make(), [batches])
    assert trainer.step_count == 1
    assert_close(trainer.captioner.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)


def test_an_epoch_weighs_every_token_alike() -> None:
    batches = one_by_one(SEVEN)
    trainer = with_sgd(plain(accumulation_steps=4, epochs=1, **{**SGD, "learning_rate": 1e-12}))
    history = trainer.fit(batches)
    batch, student = tiny.merge(batches), tiny.make_student()
    mask = batch.target_mask
    expected = F.cross_entropy(student(batch).logits[mask], batch.targets[mask]).item()
    assert history.epochs[0]["train"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_terms_are_forward_only_and_work_before_any_fit() -> None:
    trainer, batch = distilling(), tiny.make_batch([2, 3])
    terms = trainer.terms(batch)
    assert set(terms) == set(WEIGHTS)
    assert terms["ce"].count == 7
    assert terms["feature"].count == 2
    assert all(parameter.grad is None for parameter in trainer.objective.parameters())
    sum(term.weighted for term in terms.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in trainer.objective.parameters())


def test_the_gradient_is_clipped_to_the_limit_and_its_norm_reported() -> None:
    batch = tiny.make_batch([3, 2])
    row, grads = gradients(plain(max_grad_norm=None), batch)
    _, clipped = gradients(plain(max_grad_norm=row["gradient_norm"] / 2), batch)
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert_close(clipped, {key: grad / 2 for key, grad in grads.items()}, rtol=1e-4, atol=1e-7)


def test_a_row_tells_the_rate_that_the_step_took() -> None:
    trainer = plain(
        schedule="cosine_restarts", epochs=1, restart_epochs=1, learning_rate=0.1, log_every=1
    )
    rates = [row["learning_rates"] for row in trainer.fit([tiny.make_batch([2])] * 2).steps]
    assert [rate["model"] for rate in rates] == pytest.approx([0.1, 0.05])
    assert [rate["encoder"] for rate in rates] == pytest.approx([0.01, 0.005])


def test_loss_scaling_changes_nothing_with_accumulation_and_clipping() -> None:
    parts = [tiny.make_batch([3, 1]), tiny.make_batch([2], first=2)]
    plainly, scaled = with_sgd(plain(max_grad_norm=0.1)), with_sgd(plain(max_grad_norm=0.1))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rows = [trainer.step(*parts) for trainer in (plainly, scaled)]
    assert rows[1]["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-5)
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
    weights = [trainer.captioner.state_dict() for trainer in (plainly, scaled)]
    assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-7)


def test_a_step_that_overflowed_changes_neither_weights_nor_schedule() -> None:
    trainer = with_sgd(plain())
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    trainer.objective.weights["ce"] = 1e6
    before = tiny.weights_of(trainer.captioner)
    row = trainer.step(tiny.make_batch([3, 1]))
    assert not math.isfinite(row["gradient_norm"])
    assert tiny.same_bits(before, tiny.weights_of(trainer.captioner))
    assert (trainer.schedule.last_epoch, trainer.step_count) == (0, 1)
    trainer.scaler.update(1.0)
    trainer.step(tiny.make_batch([3, 1]))
    assert not tiny.same_bits(before, tiny.weights_of(trainer.captioner))
    assert trainer.schedule.last_epoch == 1


def test_bf16_on_the_cpu_trains() -> None:
    options = {**tiny.QUIET, "precision": "bf16", "learning_rate": 0.02, "patience": None}
    trainer = Trainer(tiny.make_student(), epochs=15, schedule="constant", **options)
    losses = [row["train"]["loss"] for row in trainer.fit([tiny.make_batch([3, 2])]).epochs]
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.captioner.parameters())


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs CUDA.*bf16"):
        Trainer(tiny.make_student(), **{**tiny.QUIET, "precision": "fp16"})
    trainer = Trainer(tiny.make_student(), **tiny.QUIET)
    with pytest.raises(ConfigError, match=r"needs CUDA.*bf16"):
        trainer.fit([tiny.make_batch([2])], precision="fp16")
    assert (trainer.config.precision, trainer.precision) == ("fp32", "fp32")


class Undefined(DistillationLoss):
    """NaN, or a finite value whose gradient is infinite."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        pieces: torch.Tensor = student.logits.sum() * (1.0 if self.training else 0.0)
        return pieces * float("nan") if self.value == "nan" else (pieces * 0).sqrt()


@pytest.mark.parametrize(("value", "said"), [("nan", "mine is nan"), ("root", "the gradient is")])
def test_what_is_not_finite_stops_before_anything_is_updated(value: str, said: str) -> None:
    pair = tiny.make_teacher(), tiny.make_student()
    losses = {"mine": Undefined(value)}
    distiller = Distiller(
        *pair, losses=losses, weights={"ce": 1, "mine": 1}, **tiny.QUIET, **CONSTANT
    )
    before = tiny.weights_of(distiller.objective)
    with pytest.raises(NotFiniteLoss, match=rf"Step 1 \(epoch 1\): {said}"):
        distiller.step(tiny.make_batch([2, 1]))
    assert tiny.same_bits(before, tiny.weights_of(distiller.objective))
    assert distiller.step_count == 0
    assert all(parameter.grad is None for parameter in distiller.objective.parameters())


def test_a_step_without_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        plain().step()


class EndIsPadding:
    """Case 7: one id starts, ends and pads, as GPT-2 users set it."""

    pad_id = start_id = end_id = 0
    max_length = 12
    vocabulary = ("<|end|>", "a", "dog", "runs", "cat")

    def encode(self, caption: str) -> list[int]:
        return [0, *map(self.vocabulary.index, caption.split()), 0]

    def decode(self, ids: Any) -> str:
        words = [self.vocabulary[i] for i in ids]
        return " ".join(word for word in words if word != "<|end|>")


def test_a_student_learns_to_stop_where_padding_and_end_are_one_id() -> None:
    student = tiny.make_student()
    torch.manual_seed(0)
    decoder = type(student.decoder)(6, embed=8, hidden=16, layers=1, heads=2, dropout=0.0)
    captioner = Captioner(tiny.Patches(), decoder, EndIsPadding())
    pictures = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)])
    data = [(pictures[0], "a dog runs"), (pictures[1], "a cat")]
    trainer = Trainer(
        captioner,
        **tiny.QUIET,
        epochs=60,
        learning_rate=0.03,
        schedule="constant",
        label_smoothing=0.0,
        augment=False,
        batch_size=2,
    )
    history = trainer.fit(data)
    hypotheses: list[Hypothesis] = captioner.generate(pictures)
    assert [hypothesis.text for hypothesis in hypotheses] == ["a dog runs", "a cat"]
    assert all(hypothesis.finished for hypothesis in hypotheses)
    assert trainer.terms(next(iter(trainer.train_source.epoch(0))))["ce"].count == 7  # type: ignore[union-attr]
    assert history.epochs[-1]["train"]["loss"] < 0.1


def test_batches_need_no_references_in_training() -> None:
    batch = dataclasses.replace(tiny.make_batch([2, 1]), references=None)
    assert plain().fit([batch], epochs=1).epochs[0]["images"] == 2
