"""What a student reads in training: word dropout and scheduled sampling, off and on (law 7)."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from capdistill import Captioner, Distiller, Trainer
from capdistill.cli.runfile import TrainRun, parse_run
from capdistill.data import CaptionData
from capdistill.data.source import FixedBatches
from capdistill.errors import ConfigError
from capdistill.outputs import Batch, DecoderOutput
from capdistill.runtime import evaluating
from capdistill.training.decoder_inputs import (
    NoisyInputs,
    noisy_inputs,
    sample,
    token_noise,
    word_mask,
)
from tests.training import tiny_models as tiny

BOTH = {"word_dropout": 0.3, "scheduled_sampling": 0.8}
UNK, FIRST_WORD = tiny.TOKENIZER.unk_id, 4
LONG = [8, 3, 5, 1, 7, 8, 2, 4] * 50  # words of 400 captions: 1900


class Successor(nn.Module):
    """A decoder that is sure that each id is followed by the next one, or by a special token."""

    def __init__(self, special: float = 0.0) -> None:
        super().__init__()
        self.special = special

    def forward(self, ids: Tensor, features: Tensor, need: Any = frozenset()) -> DecoderOutput:
        following = FIRST_WORD + (ids + 1) % (len(tiny.TOKENIZER) - FIRST_WORD)
        logits = 30.0 * F.one_hot(following, len(tiny.TOKENIZER))
        return DecoderOutput(F.pad(logits[..., 4:], (4, 0), value=self.special))


def noisy(batch: Batch, decoder: nn.Module | None = None, epoch: int = 0, **rates: Any) -> Tensor:
    student: Any = SimpleNamespace(decoder=decoder or Successor(), tokenizer=tiny.TOKENIZER)
    inputs = NoisyInputs(student, token_noise(batch, 0, epoch), **rates)
    return inputs(batch, torch.zeros(batch.num_images, 1, 1))


def halfway(make: Callable[..., Trainer] = Trainer, **options: Any) -> Any:
    """A trainer in training mode, half of its run done, in epoch 3."""
    models = [tiny.make_teacher()] if make is Distiller else []
    trainer = make(*models, tiny.make_student(), **{**tiny.QUIET, "epochs": 2, **options})
    trainer.step_count, trainer.steps_per_epoch, trainer.epoch = 5, 5, 3
    trainer.objective.train()
    return trainer


def noise_of(trainer: Trainer, batch: Batch) -> NoisyInputs | None:
    config, progress = trainer.config, trainer.progress
    return noisy_inputs(trainer.captioner, batch, config, trainer.epoch, progress)


# -- which words are noisy ---------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("option", ["dropped", "sampled"])
def test_the_share_of_noisy_words_is_the_given_rate(option: str, rate: float) -> None:
    batch = tiny.make_batch(LONG, k=5)
    words = word_mask(batch, tiny.TOKENIZER)
    ids = torch.where(words, torch.full_like(batch.inputs, UNK), batch.inputs)
    unknown = Batch(batch.images, F.pad(ids, (0, 1)), batch.mask, batch.captions, batch.image_ids)
    base = batch if option == "dropped" else unknown  # no word is sampled as unknown
    changed = noisy(base, **{option: rate}) != base.inputs
    n = int(words.sum())
    assert abs(int(changed.sum()) - rate * n) < 4 * math.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize("rates", [{"dropped": 0.99}, {"sampled": 1.0}])
@pytest.mark.parametrize("special", [0.0, 99.0])
def test_start_end_and_padding_are_never_replaced(rates: dict[str, float], special: float) -> None:
    batch = tiny.make_batch([3, 1, 5, 2], k=2)
    read = noisy(batch, Successor(special), **rates)
    words = batch.inputs >= FIRST_WORD
    assert torch.equal(read[~words], batch.inputs[~words])
    if "sampled" in rates:
        assert bool((read[words] >= FIRST_WORD).all())


def test_the_first_id_is_never_replaced_whatever_it_is() -> None:
    batch = tiny.make_batch([3, 5])
    batch.input_ids[:, 0] = FIRST_WORD
    assert noisy(batch, dropped=0.99, sampled=1.0)[:, 0].tolist() == [FIRST_WORD] * 2


def test_a_sampled_word_is_predicted_from_the_reference_words_before_it() -> None:
    batch = tiny.make_batch([3, 1, 5, 2])
    read = noisy(batch, sampled=1.0)
    wanted = FIRST_WORD + (batch.inputs[:, :-1] + 1) % (len(tiny.TOKENIZER) - FIRST_WORD)
    words = batch.inputs[:, 1:] >= FIRST_WORD
    assert torch.equal(read[:, 1:][words], wanted[words])


@pytest.mark.parametrize("make", [tiny.make_student, tiny.make_teacher])
def test_both_kinds_of_noise_equal_a_loop_over_words(make: Callable[..., Captioner]) -> None:
    batch, student = tiny.make_batch([5, 2, 7, 1], k=2), make(dropout=0.4).eval()
    draws, features = token_noise(batch, 3, 1), student.encode(batch)
    wanted = batch.inputs.tolist()
    for row, ids in enumerate(batch.input_ids):
        state = student.decoder.start(features[row // 2 : row // 2 + 1])
        for t in range(1, int(batch.mask[row].sum()) - 1):
            logits, state = student.decoder.step(ids[t - 1 : t], state)
            take, draw, drop = draws[:, row, t].tolist()
            if take < 0.7:
                edges = logits[0, FIRST_WORD:].double().softmax(-1).cumsum(-1)
                wanted[row][t] = FIRST_WORD + sum(edge <= draw for edge in edges.tolist())
            if drop < 0.3:
                wanted[row][t] = UNK
    read = NoisyInputs(student.train(), draws, dropped=0.3, sampled=0.7)(batch, features)
    assert read.tolist() == wanted != batch.inputs.tolist()


def test_even_draws_give_every_id_its_probability() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    draws = (torch.arange(10_000) + 0.5) / 10_000
    counts = sample(logits.expand(10_000, -1), draws).bincount(minlength=9)
    assert_close(counts / 10_000, logits.softmax(-1), atol=1e-4, rtol=0)
    never = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(3, -1)
    assert sample(never, torch.tensor([0.0, 0.999999, 1 - 2.0**-24])).tolist() == [1, 3, 3]


# -- randomness -----------------------------------------------------------------------------


def test_the_noise_depends_on_image_and_epoch_not_on_the_batch() -> None:
    parts = [tiny.make_batch([3, 1], k=2), tiny.make_batch([6, 2], k=2, first=1)]
    whole = tiny.merge(parts)
    together = noisy(tiny.pad(whole, 3), dropped=0.5, sampled=0.5)
    for n, part in enumerate(parts):
        alone = noisy(part, dropped=0.5, sampled=0.5)
        assert torch.equal(together[2 * n : 2 * n + 2, : alone.shape[1]], alone)
    others = [noisy(whole, epoch=n, dropped=0.5).tolist() for n in range(4)]
    assert others[0] == noisy(whole, dropped=0.5).tolist()
    assert all(others[n] not in others[:n] for n in range(4))


def test_the_captions_of_an_image_have_noise_of_their_own() -> None:
    draws = token_noise(tiny.make_batch([8, 8, 8, 8], k=4), 0, 0)
    assert len({tuple(row) for kind in draws.tolist() for row in kind}) == 12


@pytest.mark.parametrize("make", [Trainer, Distiller])
def test_padding_and_splitting_leave_loss_and_gradients(make: Any) -> None:
    parts = [tiny.make_batch([3, 1, 4, 2], k=2), tiny.make_batch([6, 2], k=2, first=2)]
    found = []
    for batches in ([tiny.merge(parts)], [tiny.pad(tiny.merge(parts), 4)], parts):
        trainer = halfway(make, **BOTH)
        trainer.make_optimizer = torch.optim.SGD
        row = trainer.step(*batches)
        found.append((row["loss"], tiny.weights_of(trainer.objective)))
    for loss, weights in found[1:]:
        assert_close(loss, found[0][0], rtol=1e-6, atol=1e-7)
        assert_close(weights, found[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("done", [1, 3])
def test_stop_and_resume_equals_one_run(
    saveable: Callable[..., Captioner], colours: CaptionData, tmp_path: Path, done: int
) -> None:
    class Stop:
        def on_epoch(self, trainer: Any, row: Any) -> None:
            trainer.stopping = row["epoch"] == done - 1

    def run(out: str, seed: int = 1, **more: Any) -> Trainer:
        options = {**tiny.QUIET, **BOTH, "batch_size": 2, "epochs": 4, "learning_rate": 0.01}
        trainer = Trainer(saveable(seed=seed, dropout=0.3), **options)
        trainer.fit(colours, colours, out=tmp_path / out, **more)
        return trainer

    whole = run("whole")
    run("parts", callbacks=[Stop()])
    rest = run("parts", seed=8, resume=True, num_workers=2)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


@pytest.mark.parametrize("step", [2, 4])  # of six an epoch
def test_ctrl_c_within_an_epoch_and_resume_equals_one_run(
    saveable: Callable[..., Captioner], colours: CaptionData, tmp_path: Path, step: int
) -> None:
    class CtrlC:
        def on_step(self, trainer: Any, row: Any) -> None:
            if row["step"] == step:
                signal.raise_signal(signal.SIGINT)

    def run(out: str, seed: int = 1, **more: Any) -> Distiller:
        options = {**tiny.QUIET, **BOTH, "batch_size": 1, "epochs": 2, "learning_rate": 0.01}
        student = saveable(seed=seed, dropout=0.3)
        trainer = Distiller(tiny.make_teacher(), student, **options)
        trainer.fit(colours, colours, out=tmp_path / out, **more)
        return trainer

    whole = run("whole")
    with pytest.warns(UserWarning, match=f"Interrupted after step {step}"):
        run("parts", callbacks=[CtrlC()])
    rest = run("parts", seed=8, resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    assert [row["train"] for row in rest.history.epochs] == [
        row["train"] for row in whole.history.epochs
    ]


# -- what is not changed ---------------------------------------------------------------------


def test_targets_and_the_teachers_inputs_are_not_changed() -> None:
    batch = tiny.make_batch([3, 1, 5, 2], k=2)
    trainer = halfway(Distiller, losses={"token": "token"}, label_smoothing=0.0, **BOTH)
    read = noise_of(trainer, batch)(batch, trainer.captioner.encode(batch))
    assert not torch.equal(read, batch.inputs)
    said = trainer.captioner.decoder(read, trainer.captioner.encode(batch)).logits
    with evaluating(trainer.teacher):
        wanted = trainer.teacher(batch).logits
    mask = batch.target_mask
    log_q, log_p = (logits[mask].div(4).log_softmax(-1) for logits in (said, wanted))
    terms = trainer.terms(batch)
    ce = F.cross_entropy(said[mask], batch.targets[mask])
    kl = 16 * F.kl_div(log_q, log_p, log_target=True, reduction="sum") / mask.sum()
    assert_close(terms["ce"].mean, ce, rtol=1e-5, atol=1e-6)
    assert_close(terms["token"].mean, kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {}),
        ({"scheduled_sampling": 1.0}, {"step_count": 0}),  # nothing yet at the start
        (BOTH, {"mode": False}),  # validation
    ],
)
def test_without_noise_the_student_reads_the_references(
    options: dict[str, float], change: dict[str, Any]
) -> None:
    trainer, batch = halfway(**options), tiny.make_batch([3, 1])
    trainer.step_count = change.get("step_count", trainer.step_count)
    trainer.objective.train(change.get("mode", True))
    given: list[Any] = []
    forward = trainer.captioner.forward
    trainer.captioner.forward = lambda batch, need, input_fn: (
        given.append(input_fn) or forward(batch, need, input_fn)
    )
    assert_close(trainer.terms(batch)["ce"].sum, halfway().terms(batch)["ce"].sum, rtol=0, atol=0)
    assert given == [None]


def test_the_sampling_rate_grows_linearly_over_the_run() -> None:
    trainer, rates = halfway(scheduled_sampling=0.6), []
    for trainer.step_count in (0, 2, 5, 10):
        read = noise_of(trainer, tiny.make_batch([1]))
        rates.append(0.0 if read is None else read.sampled)
    assert rates == pytest.approx([0.0, 0.12, 0.3, 0.6])


def test_the_images_are_encoded_once_for_both_passes() -> None:
    trainer = halfway(**BOTH)
    trainer.captioner.encoder.seen = 0
    trainer.terms(tiny.make_batch([3, 1, 5, 2], k=2))
    assert trainer.captioner.encoder.seen == 2


def test_validation_reads_the_references() -> None:
    batch, found = tiny.make_batch([3, 1, 5, 2], k=2), []
    for options in ({}, BOTH):
        trainer = halfway(**options)
        trainer.terms(batch)
        found.append(trainer.validate(FixedBatches([batch])))
    assert found[0] == found[1]


def test_the_first_pass_changes_neither_random_state_nor_flags() -> None:
    batch = tiny.make_batch([3, 1, 5, 2], k=2)
    student = tiny.make_student(dropout=0.5).train()
    flags = [part.training for part in student.modules()]
    torch.manual_seed(3)
    inputs = NoisyInputs(student, token_noise(batch, 0, 0), sampled=1.0)
    first, again = (inputs(batch, student.encode(batch)) for _ in range(2))
    assert torch.equal(first, again)
    assert float(torch.rand(1)) == float(torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert [part.training for part in student.modules()] == flags


def test_in_half_precision_sampling_leaves_every_parameter_a_gradient() -> None:
    trainer = halfway(scheduled_sampling=1.0, precision="bf16")
    loss = trainer.terms(tiny.make_batch([3, 1, 5, 2], k=2))["ce"].mean
    loss.backward()
    assert [n for n, p in trainer.captioner.named_parameters() if p.grad is None] == []


def test_word_dropout_without_an_unknown_word_is_refused() -> None:
    captioner = tiny.make_student()
    theirs = {k: getattr(tiny.TOKENIZER, k) for k in ("pad_id", "start_id", "end_id", "vocabulary")}
    captioner.tokenizer = SimpleNamespace(**theirs)
    with pytest.raises(ConfigError, match=r"word_dropout=0.1 .* has no unk_id\. Set word_dropout"):
        Trainer(captioner, word_dropout=0.1)
    with pytest.raises(ConfigError, match="no unk_id"):
        Trainer(captioner, **tiny.QUIET).fit([tiny.make_batch([1])], word_dropout=0.1)
    captioner.tokenizer.unk_id = theirs["end_id"]  # as in GPT-2
    with pytest.raises(ConfigError, match=r"has no unk_id of its own \(it is 2\)"):
        Trainer(captioner, word_dropout=0.1)
    trainer = Trainer(captioner, scheduled_sampling=0.5, **tiny.QUIET)
    assert trainer.terms(tiny.make_batch([3]))["ce"].count == 4


def test_a_run_file_accepts_both_options() -> None:
    parts = {"data": {"path": "sample"}, "model": {"preset": "debug_student"}}
    run = parse_run(TrainRun, {**parts, "train": BOTH})
    assert (run.train.word_dropout, run.train.scheduled_sampling) == (0.3, 0.8)
    with pytest.raises(ConfigError, match=r"'word_dropout' was given 1\.5"):
        parse_run(TrainRun, {**parts, "train": {"word_dropout": 1.5}})
