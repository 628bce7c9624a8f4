"""Self-critical training: advantages, the gradient of the expected reward, and what combines."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import capdistill as cd
from capdistill.errors import CheckpointError, ConfigError
from capdistill.metrics import CaptionScorer
from capdistill.outputs import Batch, part
from capdistill.tokenizer import pad_batch
from capdistill.training.on_policy import beside
from capdistill.training.self_critical import (
    PolicyGradient,
    check_rewards,
    leave_one_out,
    references_of,
    without_recurrent,
)
from tests.training import tiny_models as tiny

OPTIONS: dict[str, Any] = {**tiny.QUIET, "epochs": 2, "batch_size": 2, "learning_rate": 0.01}
REFERENCES = {
    str(i): ["a red dog", "a dog"] if i % 2 else ["a blue cat", "a cat"] for i in range(8)
}


def count_dogs(ids: Sequence[str], captions: Sequence[str]) -> list[float]:
    return [caption.split().count("dog") - 0.1 * len(caption.split()) for caption in captions]


def batches(number: int = 3) -> list[Batch]:
    return [tiny.make_batch([1, 2, 3], k=1, first=3 * i) for i in range(number)]


def trainer(**options: Any) -> cd.SelfCritical:
    options.setdefault("reward", count_dogs)
    return cd.SelfCritical(tiny.make_student(), **{**OPTIONS, **options})


# -- advantages -------------------------------------------------------------------------------


@given(
    st.integers(2, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-10, 10), min_size=k, max_size=k), min_size=1, max_size=4
        )
    )
)
def test_an_advantage_is_the_reward_minus_the_mean_of_the_other_samples(
    rewards: list[list[float]],
) -> None:
    k = len(rewards[0])
    expected = [r - (sum(image) - r) / (k - 1) for image in rewards for r in image]
    found = leave_one_out(torch.tensor(rewards, dtype=torch.float64).flatten(), k)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert_close(found.view(-1, k).sum(1), torch.zeros(len(rewards), dtype=torch.float64))


# -- the term ---------------------------------------------------------------------------------


def test_the_term_is_the_log_probability_times_the_advantage() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    batch = Batch(
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        input_ids=torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]]),
        mask=torch.tensor([[True] * 4, [True] * 3 + [False]]),
        captions=("", ""),
        image_ids=("0",),
        sampled=torch.tensor([True, True]),
        advantages=torch.tensor([0.75, -0.75]),
    )
    found = PolicyGradient()(cd.CaptionerOutput(logits), None, batch)
    logs = logits.log_softmax(-1)
    expected = -0.75 * (logs[0, 0, 4] + logs[0, 1, 5] + logs[0, 2, 2])
    expected = expected + 0.75 * (logs[1, 0, 6] + logs[1, 1, 2])
    assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected))
    assert_close(mine, theirs)
    assert PolicyGradient().count(batch) == 5.0


def test_the_term_of_half_precision_logits_is_computed_in_float32() -> None:
    batch = tiny.make_batch([3, 2, 1])
    sampled = torch.ones(len(batch.captions), dtype=torch.bool)
    batch = replace(batch, sampled=sampled, advantages=torch.linspace(-1, 1, len(sampled)))
    logits = 8 * torch.randn(*batch.targets.shape, len(tiny.TOKENIZER)).bfloat16()
    loss = PolicyGradient((0,), temperature=0.7)
    half, full = (loss(cd.CaptionerOutput(each), None, batch) for each in (logits, logits.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_expected_reward(temperature: float) -> None:
    """Enumerate every caption of at most two words, with the probability it is sampled with."""
    tokenizer = cd.WordTokenizer(["a", "b"])  # 4 and 5
    torch.manual_seed(3)
    decoder = cd.decoders.create("lstm", dim=6, embed=6, hidden=8, layers=1, heads=2)
    model = cd.Captioner(tiny.Patches(), decoder, tokenizer).double().eval()
    end, words = tokenizer.end_id, (4, 5)
    captions = [(end,), *((w, end) for w in words), *itertools.product(words, repeat=2)]
    rows = [[tokenizer.start_id, *caption] for caption in captions]
    ids, mask = pad_batch(rows, tokenizer.pad_id)
    rewards = torch.tensor([0.3 * len(c) + 2.0 * (4 in c) for c in captions], dtype=torch.float64)
    batch = Batch(
        images=tiny.make_batch([1]).images,
        input_ids=ids,
        mask=mask,
        captions=("",) * len(rows),
        image_ids=("0",),
        sampled=torch.ones(len(rows), dtype=torch.bool),
    )
    output = model(batch)
    possible = torch.tensor([end, *words])
    logs = output.logits[..., possible].div(temperature).log_softmax(-1)  # (B, T, 3)
    places = torch.tensor([[(end, *words).index(t) for t in (*c, end)[:2]] for c in captions])
    each = (logs.gather(-1, places[..., None])[..., 0] * batch.target_mask).sum(1)
    assert math.isclose(each.exp().sum().item(), 1.0, rel_tol=1e-9)

    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad((each.exp() * rewards).sum(), parameters, retain_graph=True)
    loss = PolicyGradient((tokenizer.pad_id, tokenizer.start_id, tokenizer.unk_id), temperature)
    found = loss(output, None, replace(batch, advantages=each.exp().detach() * rewards))
    for mine, theirs in zip(torch.autograd.grad(found, parameters), exact, strict=True):
        assert_close(mine, -theirs)


# -- training ---------------------------------------------------------------------------------


def test_the_reward_of_the_samples_rises() -> None:
    history = trainer(epochs=30, samples=8, learning_rate=0.02).fit(batches())
    rewards = [row["train"]["reward"] for row in history.epochs]
    assert rewards[-1] > rewards[0] + 1.0, rewards


def test_the_reward_is_the_score_of_the_sampled_captions() -> None:
    tested = trainer(reward={"cider_d": 1.0, "bleu_1": 0.5}, references=REFERENCES, samples=3)
    batch = tested.prepare_batch(tiny.make_batch([1, 2], first=2))
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d", "bleu"])
    ids = [image for image in batch.image_ids for _ in range(3)]
    expected = scorer.rewards(ids, batch.captions, {"cider_d": 1.0, "bleu_1": 0.5})
    assert batch.advantages is not None
    assert_close(batch.advantages, leave_one_out(torch.tensor(expected).float(), 3))
    assert batch.captions_per_image == 3
    rows = zip(batch.input_ids.tolist(), batch.mask.tolist(), strict=True)
    ids_read = [[i for i, real in zip(*row, strict=True) if real] for row in rows]
    assert batch.captions == tuple(map(tiny.TOKENIZER.decode, ids_read))


def test_references_are_those_of_the_training_data() -> None:
    data = cd.data.sample().train.subset(3)
    assert references_of(data) == data.references
    assert references_of(batches(1)) == {
        image: (text,)
        for batch in batches(1)
        for image, text in zip(batch.image_ids, batch.captions, strict=True)
    }
    ordered = cd.data.Curriculum(data)
    loader = cd.data.Loader(ordered, tiny.TOKENIZER, image_size=8, epochs=1)
    assert references_of(ordered) == references_of(loader) == data.references
    with pytest.raises(ConfigError, match="references="):
        references_of(object())


def test_unknown_references_are_an_error_that_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"references=\{image id: captions\}"):
        trainer(reward="cider_d").step(tiny.make_batch([1, 2]))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("cidre", "no score 'cidre'. Did you mean 'cider_d'"),
        ("bleu", "no score 'bleu'. Did you mean 'bleu_4'"),  # a metric with four scores
        ({"cider_d": 1, "rouge": 1}, "no score 'rouge'. Did you mean 'rouge_l'"),
        ({"cider": 1, "cider_d": 1}, "reward: 'cider_d' was given twice"),
        ({"cider_d": "1"}, "reward: cider_d='1' was given"),
        ({"cider_d": float("inf")}, "reward: cider_d=inf was given"),
        ({}, "Expected the name of a score"),
    ],
)
def test_a_reward_that_cannot_be_computed_is_refused_at_construction(
    reward: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        trainer(reward=reward)


def test_no_loss_takes_the_place_of_the_reward() -> None:
    with pytest.raises(ConfigError, match="'reward' is its own term"):
        trainer(teacher=tiny.make_teacher(), losses={"reward": "token"})


def test_the_best_epoch_is_the_one_with_the_best_score_even_if_scores_are_low() -> None:
    """The loss of validation is 0 in every epoch, so it cannot decide."""
    scores = iter([0.01, 0.03, 0.02])
    tested = trainer(epochs=3)
    tested.score = lambda references, captions: {"cider_d": next(scores)}  # type: ignore[method-assign]
    history = tested.fit(batches(), batches(1))
    assert [row["improved"] for row in history.epochs] == [True, True, False]


def test_the_reward_stands_in_the_line_of_an_epoch_and_beside_the_bar(
    capfd: pytest.CaptureFixture[str],
) -> None:
    history = trainer(progress=True, epochs=1).fit(batches())
    err = capfd.readouterr().err
    reward = history.epochs[0]["train"]["reward"]
    assert f"epoch 1/1  reward {reward:7.4f}  " in err
    assert "epoch=1, reward=" in err
    assert "  reward  count_dogs of 5 samples per image" in err


@pytest.mark.parametrize("wrong", [[1.0], [math.nan] * 15, ["a"] * 15, None])
def test_a_reward_is_a_finite_number_per_caption(wrong: Any) -> None:
    tested = trainer(reward=lambda ids, captions: wrong)
    with pytest.raises(ConfigError, match="one finite number per caption"):
        tested.step(tiny.make_batch([1, 2, 3]))


def test_two_micro_batches_are_one_batch_of_all_images() -> None:
    one, two = trainer(max_grad_norm=None), trainer(max_grad_norm=None)
    one.make_optimizer = two.make_optimizer = torch.optim.SGD  # type: ignore[method-assign]
    whole = tiny.make_batch([1, 2, 3, 4], k=1)
    halves = [part(whole, 0, 2), part(whole, 2, 4)]
    first, second = one.step(whole), two.step(*halves)
    assert first["counts"] == second["counts"]
    assert_close(first["loss"], second["loss"], atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(one.captioner.parameters(), two.captioner.parameters(), strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_model_is_scored_as_it_sampled_without_dropout() -> None:
    student = tiny.make_student(dropout=0.9, norm=True)
    tested = cd.SelfCritical(student, count_dogs, **OPTIONS)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    row, again = (tested.terms(batches(1)[0]) for _ in range(2))
    assert_close(row["reward"].sum, again["reward"].sum)
    tested.step(*batches(1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())


def test_recurrent_layers_stay_in_training_mode_for_cuda() -> None:
    student = tiny.make_student()
    quiet = {id(part) for module in without_recurrent(student) for part in module.modules()}
    cells = [part for part in student.modules() if isinstance(part, torch.nn.RNNBase)]
    assert cells
    assert not quiet & {id(cell) for cell in cells}
    leaves = [part for part in student.modules() if not list(part.children())]
    assert all(id(part) in quiet for part in leaves if part not in cells)


def test_a_teacher_and_the_references_stand_beside_the_samples() -> None:
    tested = cd.SelfCritical(
        tiny.make_student(),
        count_dogs,
        teacher=tiny.make_teacher(),
        losses={"token": "token", "hidden": "hidden"},
        weights={"ce": 0.5, "token": 0.2},
        **OPTIONS,
    )
    batch = tiny.make_batch([1, 2, 3, 4], k=2)
    mixed = tested.prepare_batch(batch)
    assert mixed.captions_per_image == 5 + 2
    assert mixed.sampled is not None
    assert mixed.sampled.view(2, 7).tolist() == [[True] * 5 + [False] * 2] * 2
    assert mixed.captions[5:7] == batch.captions[:2]
    assert mixed.captions[12:] == batch.captions[2:]
    row = tested.step(batch)
    assert row["counts"]["ce"] == float(batch.target_mask.sum())
    assert row["counts"]["token"] == float(mixed.target_mask.sum())
    assert row["counts"]["reward"] == row["counts"]["token"] - row["counts"]["ce"]
    assert set(row["terms"]) == {"ce", "reward", "token", "hidden"}


def test_captions_side_by_side_keep_their_rows() -> None:
    first, second = tiny.make_batch([1, 2, 3, 4], k=2), tiny.make_batch([5, 6], k=1)
    joined = beside(first, second, pad_id=0)
    assert joined.captions == (*first.captions[:2], second.captions[0], *first.captions[2:],
                               second.captions[1])  # fmt: skip
    width = first.input_ids.shape[1]
    assert torch.equal(joined.input_ids[3:5, :width], first.input_ids[2:])
    assert torch.equal(joined.mask.sum(1)[[0, 1, 3, 4]], first.mask.sum(1))


# -- runs -------------------------------------------------------------------------------------


def test_a_resumed_run_is_that_of_one_never_stopped(
    saveable: Callable[..., cd.Captioner], tmp_path: Path
) -> None:
    def make() -> cd.SelfCritical:
        return cd.SelfCritical(saveable(), count_dogs, **{**OPTIONS, "epochs": 3, "log_every": 1})

    whole = make()
    told = whole.fit(batches())

    class Stop:
        def on_step(self, trainer: Any, row: Any) -> None:
            if row["step"] == 4:
                trainer.history.interrupted = True

    with pytest.warns(UserWarning, match="Interrupted"):
        make().fit(batches(), out=tmp_path, callbacks=[Stop()])
    resumed = make()
    history = resumed.fit(batches(), out=tmp_path, resume=True)
    for mine, theirs in zip(
        resumed.captioner.parameters(), whole.captioner.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    rewards = [[row["train"]["reward"] for row in each.epochs] for each in (history, told)]
    assert rewards[0] == rewards[1]


def test_a_run_is_not_resumed_with_another_reward(
    saveable: Callable[..., cd.Captioner], tmp_path: Path
) -> None:
    cd.SelfCritical(saveable(), count_dogs, **OPTIONS).fit(batches(), out=tmp_path)
    other = cd.SelfCritical(saveable(), "bleu_1", references=REFERENCES, **OPTIONS)
    with pytest.raises(CheckpointError, match="reward"):
        other.fit(batches(), out=tmp_path, resume=True)


def test_check_runs_with_and_without_data() -> None:
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
    tested = cd.SelfCritical(captioner, batch_size=2, samples=2)
    assert not [row for row in tested.check().rows if row.status == "fail"]
    assert not [row for row in tested.check(data.train.subset(4)).rows if row.status == "fail"]


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"token": "token"}}, "no teacher|there is none"),
        ({"word_dropout": 0.1}, "word_dropout"),
        ({"scheduled_sampling": 0.1}, "scheduled_sampling"),
        ({"monitor": "loss"}, "monitor"),
        ({"samples": 1}, "samples"),
        ({"sample_temperature": 0}, "sample_temperature"),
        ({"weights": {"token": 1.0}}, "token"),
        ({"weights": {"reward": 0.0}}, "every term is 0"),
        ({"reward": "cidr", "references": REFERENCES}, "cider_d"),
        ({"reward": {"meteor": 1.0, "cidr": 1.0}, "references": REFERENCES}, "cidr"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, KeyError), match=message):
        trainer(**options)


def test_a_reward_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="every weight is 0"):
        trainer(reward={"cider_d": 0})


@pytest.mark.parametrize("references", [[["a dog"]], "a dog", 3])
def test_references_without_image_ids_are_refused(references: Any):
    with pytest.raises(ConfigError, match="references="):
        trainer(reward="cider_d", references=references)


def test_references_may_be_keyed_by_numbers():
    numbered = {int(image): texts for image, texts in REFERENCES.items()}
    pair = [trainer(reward="cider_d", references=r) for r in (numbered, REFERENCES)]
    first, second = (each.rewards(["1"], ["a red dog"]) for each in pair)
    assert_close(first, second)


def test_only_losses_that_read_a_teacher_are_named_where_there_is_none():
    class Quiet(PolicyGradient):
        pass

    with pytest.raises(ConfigError, match="losses token read a teacher"):
        trainer(losses={"quiet": Quiet(), "token": "token"})


def test_a_reward_may_carry_gradients():
    values = torch.ones(4, requires_grad=True)
    assert not check_rewards(values, 4).requires_grad
