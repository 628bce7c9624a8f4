"""On-policy distillation: the samples, which captions they replace, what is learned from them."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, Distiller, Trainer
from capdistill.cli.runfile import DistillRun, TrainRun, parse_run
from capdistill.data import CaptionData, Curriculum, Example
from capdistill.data.source import FixedBatches
from capdistill.decoders.base import Decoder, DecoderState
from capdistill.errors import ConfigError
from capdistill.generation.choice import image_keys, row_keys, uniforms
from capdistill.outputs import Batch, DecoderOutput
from capdistill.runtime import autocast, evaluating, stable_hash
from capdistill.tokenizer import WordTokenizer
from capdistill.training import DistillConfig
from capdistill.training.decoder_inputs import NoisyInputs, token_noise
from capdistill.training.on_policy import (
    replace_captions,
    sample_captions,
    sampled_rows,
    with_frozen_tokens,
)
from tests.training import tiny_models as tiny

START, END, PAD, FIRST_WORD = 1, 2, 0, 4
WORDS = len(tiny.TOKENIZER)


class Fixed(Decoder):
    """A decoder that gives the same probabilities after any word."""

    def __init__(self, probabilities: dict[int, float]) -> None:
        super().__init__()
        self.dim, self.hidden_dims, self.has_attention = 6, (1,), False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logits = torch.full((WORDS,), -1e4)
        for word, probability in probabilities.items():
            self.logits[word] = torch.tensor(probability).log()

    def build_vocabulary(self, vocabulary: int) -> None:
        pass

    def forward(self, ids: Tensor, features: Tensor, need: Any = frozenset()) -> DecoderOutput:
        return DecoderOutput(self.logits.expand(*ids.shape, -1))

    def start(self, features: Tensor) -> DecoderState:
        return DecoderState({}, {"none": features[:, 0]})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        return self.logits.expand(len(tokens), -1), state


def fixed(probabilities: dict[int, float], max_length: int = 40) -> Captioner:
    tokenizer = WordTokenizer(tiny.TOKENIZER.vocabulary[4:], max_length=max_length)
    return Captioner(tiny.Patches(), Fixed(probabilities), tokenizer)


def images(count: int, first: int = 0) -> Batch:
    return tiny.make_batch([2] * count, first=first)


# -- the words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.make_student, tiny.make_teacher])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 3)])
def test_samples_equal_a_loop_over_words(
    make: Callable[..., Captioner], temperature: float, top_k: int
) -> None:
    student, batch = make(dropout=0.5).train(), images(3)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": 4, "epoch": 2}
    sampled = sample_captions(student, batch, samples=2, **options)
    student.eval()
    keys = row_keys(image_keys(name.encode() for name in batch.image_ids), 2).flatten()
    for row, (ids, mask) in enumerate(zip(sampled.ids, sampled.mask, strict=True)):
        with torch.no_grad():
            alone = replace(images(1), images=batch.images[row // 2 : row // 2 + 1])
            state, word, wanted = student.decoder.start(student.encode(alone)), START, [START]
            for position in range(tiny.TOKENIZER.max_length + 1):
                logits, state = student.decoder.step(torch.tensor([word]), state)
                logits = logits[0].double() / temperature
                logits[[PAD, START, tiny.TOKENIZER.unk_id]] = -torch.inf
                if top_k:
                    logits[logits.argsort(descending=True)[top_k:]] = -torch.inf
                draw = uniforms(keys[row], stable_hash(4, "sampled captions", 2), position)
                edges = logits.softmax(-1).cumsum(-1)
                word = int((edges <= float(draw)).sum())
                wanted.append(word)
                if word == END:
                    break
        assert ids[mask].tolist() == wanted
        assert ids[~mask].tolist() == [PAD] * int((~mask).sum())
        assert sampled.texts[row] == tiny.TOKENIZER.decode(wanted)


def test_words_are_drawn_as_often_as_they_are_probable() -> None:
    """2,000 first words, at temperature 2: shares are square roots; four standard deviations."""
    probabilities = {END: 0.16, 5: 0.36, 6: 0.48, tiny.TOKENIZER.unk_id: 3.0, PAD: 3.0, START: 3.0}
    sampled = sample_captions(fixed(probabilities, 1), images(400), samples=5, temperature=2.0)
    shares = torch.tensor([0.16, 0.36, 0.48]).sqrt()
    counts = sampled.ids[:, 1].bincount(minlength=WORDS)
    assert counts[[END, 5, 6]].sum() == 2000  # nothing else: special tokens are never drawn
    assert_close(counts[[END, 5, 6]] / 2000, shares / shares.sum(), rtol=0, atol=0.045)


def test_a_caption_ends_with_its_first_end_token() -> None:
    sampled = sample_captions(fixed({END: 0.3, 5: 0.7}), images(20), samples=2)
    for ids, mask, text in zip(*sampled, strict=True):
        real = ids[mask].tolist()
        assert (real[0], real[-1], real.count(END)) == (START, END, 1)
        assert text.split() == [tiny.TOKENIZER.vocabulary[word] for word in real[1:-1]]
    lengths = sampled.mask.sum(1)
    assert sampled.ids.shape[1] == int(lengths.max())
    assert len(set(lengths.tolist())) > 3
    assert int(lengths.min()) == 2  # empty ones too


def test_a_caption_without_an_end_is_cut_and_has_no_end_token() -> None:
    sampled = sample_captions(fixed({5: 1.0}, max_length=3), images(2))
    assert sampled.ids.tolist() == [[START, 5, 5, 5, 5]] * 2  # as many inputs as of three and end
    assert bool(sampled.mask.all())


# -- randomness ---------------------------------------------------------------------------------


def test_samples_depend_on_the_image_not_on_the_batch() -> None:
    student, parts = tiny.make_student(), [images(2), images(3, first=2)]
    together = sample_captions(student, tiny.pad(tiny.merge(parts), 7), samples=3)
    alone = [sample_captions(student, each, samples=3) for each in parts]
    assert together.texts == alone[0].texts + alone[1].texts
    rows = [ids[mask].tolist() for each in alone for ids, mask in zip(*each[:2], strict=True)]
    assert [ids[mask].tolist() for ids, mask in zip(*together[:2], strict=True)] == rows


def test_the_first_captions_do_not_depend_on_how_many_are_drawn() -> None:
    few, many = (sample_captions(tiny.make_student(), images(2), n).texts for n in (2, 5))
    assert few == many[:2] + many[5:7]
    assert len(set(many)) == 10


def test_every_epoch_and_seed_has_samples_of_its_own_and_none_needs_a_random_state() -> None:
    student = tiny.make_student(dropout=0.5).train()
    flags = [part.training for part in student.modules()]
    torch.manual_seed(3)
    keys = [(0, 0), (0, 1), (1, 0), (0, 0)]
    texts = [sample_captions(student, images(2), seed=s, epoch=e).texts for s, e in keys]
    assert texts[0] == texts[3]
    assert len({*texts}) == 3
    assert float(torch.rand(1)) == float(torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert [part.training for part in student.modules()] == flags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "num_return must be at least 1"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample_captions(tiny.make_student(), images(1), **options)


# -- what runs twice ----------------------------------------------------------------------------


def test_a_frozen_trunk_runs_once_for_samples_and_step() -> None:
    student, batch = tiny.make_student(trainable=False, norm=True).train(), images(3)
    encoder: Any = student.encoder
    plain = student.encode(batch)
    encoder.seen = 0
    carried = with_frozen_tokens(student, batch)
    sampled = sample_captions(student, carried)
    assert_close(student.encode(carried), plain, rtol=0, atol=0)
    assert encoder.seen == 3
    assert sampled.texts == sample_captions(student, batch).texts
    assert not batch.cached


def test_a_frozen_trunk_that_was_changed_runs_again() -> None:
    student, batch = tiny.make_student(trainable=False), images(2)
    carried = with_frozen_tokens(student, batch)
    with torch.no_grad():
        for parameter in student.encoder.trunk_parameters():
            parameter.mul_(2)
    assert_close(student.encode(carried), student.encode(batch), rtol=0, atol=0)
    again = with_frozen_tokens(student, carried)
    assert_close(student.encode(again), student.encode(batch), rtol=0, atol=0)


def test_a_partly_frozen_trunk_runs_only_its_trained_stages_again() -> None:
    encoder = cd.encoders.create(
        "timm", name="test_efficientnet", dim=8, trainable=1, weights=False
    )
    decoder = cd.decoders.create("lstm", dim=8, hidden=8, embed=8)
    student = Captioner(encoder, decoder, tiny.TOKENIZER).train()
    carried = with_frozen_tokens(student, images(2))
    found = []
    for batch in (images(2), carried):
        student.zero_grad()
        features = student.encode(batch)
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad for p in encoder.parameters())])
    assert len(carried.cached) == 1
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_trained_trunk_is_encoded_anew_with_gradients() -> None:
    student, batch = tiny.make_student(), images(2)
    carried = with_frozen_tokens(student, batch)
    assert carried is batch
    sample_captions(student, carried)
    student.encode(carried).sum().backward()
    assert student.encoder.conv.weight.grad is not None


def test_in_half_precision_sampling_leaves_every_parameter_a_gradient() -> None:
    student, batch = tiny.make_student(), images(3)
    with autocast(torch.device("cpu"), "bf16"):
        sample_captions(student, with_frozen_tokens(student, batch))
        logits = student(batch, need=frozenset({"logits"})).logits
        F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten()).backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


# -- which captions are replaced ----------------------------------------------------------------


@pytest.mark.parametrize(("k", "share", "each"), [(4, 0.5, {2}), (5, 0.2, {1}), (3, 1.0, {3})])
def test_a_whole_number_of_captions_is_replaced_exactly(k: int, share: float, each: Any) -> None:
    rows = sampled_rows(tiny.make_batch([2] * 8 * k, k=k), share, 0, 0)
    assert {*rows.view(8, k).sum(1).tolist()} == each


@pytest.mark.parametrize(("k", "share"), [(1, 0.3), (5, 0.37)])
def test_the_share_is_met_on_average_and_every_caption_is_as_likely(k: int, share: float) -> None:
    """2,000 images; four standard deviations of a caption that is replaced or not."""
    rows = sampled_rows(tiny.make_batch([2] * 2000 * k, k=k), share, 0, 0).view(-1, k)
    counts = {*rows.sum(1).tolist()}
    assert counts == {math.floor(share * k), math.ceil(share * k)}
    noise = 4 * math.sqrt(share * (1 - share) / 2000)
    assert_close(rows.float().mean(0), torch.full((k,), share), rtol=0, atol=noise)


def test_the_choice_depends_on_seed_epoch_and_image_alone() -> None:
    parts = [tiny.make_batch([2] * 15, k=3), tiny.make_batch([3] * 15, k=3, first=5)]
    together = sampled_rows(tiny.merge(parts), 0.4, 3, 1)
    assert torch.equal(together, torch.cat([sampled_rows(each, 0.4, 3, 1) for each in parts]))
    others = [sampled_rows(tiny.merge(parts), 0.4, seed, epoch) for seed, epoch in ((3, 2), (4, 1))]
    assert not any(torch.equal(together, other) for other in others)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_replaced_captions_are_samples_and_the_others_stay(share: float) -> None:
    student, batch = tiny.make_student(), tiny.make_batch([3, 9, 1, 4, 2, 6, 5, 8], k=4)
    before = [t.clone() for t in (batch.input_ids, batch.mask)]
    mixed = replace_captions(student, batch, share, seed=2, epoch=1, temperature=0.8)
    assert torch.equal(batch.input_ids, before[0])
    assert torch.equal(batch.mask, before[1])
    rows = sampled_rows(batch, share, 2, 1)
    assert mixed.sampled.tolist() == rows.tolist()
    drawn = sample_captions(student, batch, 4, seed=2, epoch=1, temperature=0.8)
    wanted, number = [], [0, 0]
    for row, replaced in enumerate(rows.tolist()):
        source, place = batch, row
        if replaced:
            source, place = drawn, row // 4 * 4 + number[row // 4]
            number[row // 4] += 1
        ids = source.ids if replaced else source.input_ids
        texts = source.texts if replaced else source.captions
        wanted.append((ids[place][source.mask[place]].tolist(), texts[place]))
    found = [ids[mask].tolist() for ids, mask in zip(mixed.input_ids, mixed.mask, strict=True)]
    assert [*zip(found, mixed.captions, strict=True)] == wanted
    assert bool((mixed.input_ids[~mixed.mask] == PAD).all())


def test_captions_that_were_sampled_before_stay_marked() -> None:
    batch = replace(images(4), sampled=torch.tensor([True, False, False, False]))
    mixed = replace_captions(tiny.make_student(), batch, 0.3)
    wanted = sampled_rows(batch, 0.3, 0, 0)
    wanted[0] = True
    assert mixed.sampled.tolist() == wanted.tolist()
    assert replace_captions(tiny.make_student(), batch, 0.0) is batch


# -- the step -----------------------------------------------------------------------------------


TOKEN: dict[str, Any] = {"losses": {"token": "token"}, "label_smoothing": 0.0}


def distiller(student: Captioner | None = None, **options: Any) -> Distiller:
    """In training mode, half of its run done, in epoch 3."""
    made = Distiller(
        tiny.make_teacher(dropout=0.5),
        student or tiny.make_student(),
        **{**tiny.QUIET, **TOKEN, "epochs": 2, **options},
    )
    made.step_count, made.steps_per_epoch, made.epoch = 5, 5, 3
    made.objective.train()
    return made


def test_losses_read_the_samples_and_the_cross_entropy_skips_them() -> None:
    trainer, batch = distiller(on_policy=0.5), tiny.make_batch([3, 1, 5, 2], k=2)
    terms = trainer.terms(batch)
    mixed = replace_captions(trainer.student, batch, 0.5, epoch=3)
    said = trainer.student(mixed).logits
    with evaluating(trainer.teacher):
        wanted = trainer.teacher(mixed).logits
    mask, own = mixed.target_mask, mixed.target_mask & ~mixed.sampled[:, None]
    log_q, log_p = (logits[mask].div(4).log_softmax(-1) for logits in (said, wanted))
    kl = 16 * F.kl_div(log_q, log_p, log_target=True, reduction="sum") / mask.sum()
    assert_close(terms["token"].mean, kl, rtol=1e-5, atol=1e-6)
    ce = F.cross_entropy(said[own], mixed.targets[own])
    assert_close(terms["ce"].mean, ce, rtol=1e-5, atol=1e-6)
    assert terms["ce"].count == int(own.sum()) < terms["token"].count == int(mask.sum())


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (q * (q / p).log()).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """With beta = 0.3: of Agarwal et al. (2024), equation 1, with p the teacher."""
    m = 0.3 * p + 0.7 * q
    return 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize(
    ("loss", "divergence"), [("reverse_kl", reverse_kl), ("jsd", jsd)], ids=["reverse_kl", "jsd"]
)
def test_generalised_divergences_are_those_of_the_sampled_words(
    loss: str, divergence: Callable[[Tensor, Tensor], Tensor]
) -> None:
    options = {"name": loss, "temperature": 1.0, **({"beta": 0.3} if loss == "jsd" else {})}
    trainer = distiller(on_policy=1.0, losses={"words": options}, weights={"ce": 0.0})
    batch = tiny.make_batch([3, 1, 5, 2], k=2)
    drawn = replace_captions(trainer.student, batch, 1.0, epoch=3)
    with evaluating(trainer.teacher):
        p, q = (m(drawn).logits.double().softmax(-1) for m in (trainer.teacher, trainer.student))
    wanted = divergence(p, q)[drawn.target_mask].mean()
    assert_close(trainer.terms(batch)["words"].mean.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["decoupled", "dist", "top_k", "attention", "hidden"])
def test_every_loss_of_words_scores_the_samples(loss: str) -> None:
    trainer = distiller(on_policy=1.0, losses={"words": loss}, weights={"ce": 0.0})
    batch = tiny.make_batch([3, 1, 5, 2], k=2)
    term = trainer.terms(batch)["words"]
    drawn = replace_captions(trainer.student, batch, 1.0, epoch=3)
    assert term.count == int(drawn.target_mask.sum())
    assert float(term.mean.detach()) > 0


@pytest.mark.parametrize("noise", [{}, {"word_dropout": 0.3, "scheduled_sampling": 0.8}])
def test_padding_and_splitting_leave_loss_and_gradients(noise: dict[str, float]) -> None:
    parts = [tiny.make_batch([3, 1, 4, 2], k=2), tiny.make_batch([6, 2], k=2, first=2)]
    found = []
    for batches in ([tiny.merge(parts)], [tiny.pad(tiny.merge(parts), 4)], parts):
        trainer = distiller(on_policy=0.7, **noise)
        trainer.make_optimizer = torch.optim.SGD  # type: ignore[method-assign]
        row = trainer.step(*batches)
        found.append((row["loss"], row["counts"], tiny.weights_of(trainer.objective)))
    for loss, counts, weights in found[1:]:
        assert counts == found[0][1]
        assert_close(loss, found[0][0], rtol=1e-6, atol=1e-7)
        assert_close(weights, found[0][2], rtol=1e-5, atol=1e-7)


def test_the_share_follows_the_run() -> None:
    trainer = distiller(on_policy=(0.0, 1.0))
    batch = tiny.make_batch([2] * 16, k=4)
    found = []
    for trainer.step_count in (0, 2, 5, 10):  # of ten
        sampled = trainer.prepare_batch(batch).sampled
        found.append(0.0 if sampled is None else float(sampled.float().mean()))
    assert found[0] == 0
    assert found[1] == pytest.approx(0.2, abs=0.1)
    assert found[2:] == [0.5, 1.0]


def test_word_noise_leaves_the_samples_as_they_are() -> None:
    batch = tiny.make_batch([6] * 8, k=4)
    mixed = replace_captions(tiny.make_student(), batch, 0.5)
    noisy = NoisyInputs(tiny.make_student(), token_noise(mixed, 0, 0), dropped=0.99, sampled=1.0)
    read = noisy(mixed, torch.zeros(2, 4, 6))
    changed = (read != mixed.inputs).any(1)
    assert changed.tolist() == (~mixed.sampled).tolist()


def test_a_frozen_trunk_runs_once_in_a_step() -> None:
    for trainable, times in ((False, 1), (True, 2)):
        trainer = distiller(tiny.make_student(trainable=trainable), on_policy=0.5)
        trainer.student.encoder.seen = 0
        for _ in range(2):
            trainer.step(tiny.make_batch([3, 1, 5, 2], k=2))
        assert trainer.student.encoder.seen == 2 * times * 2


def test_losses_of_hidden_states_and_features_run_on_the_samples_too() -> None:
    trainer = distiller(on_policy=0.5, losses=None)
    row = trainer.step(tiny.make_batch([3, 1, 5, 2], k=2))
    assert row["counts"]["hidden"] == row["counts"]["token"] > row["counts"]["ce"]
    assert row["counts"]["feature"] == 2
    assert all(math.isfinite(term["raw"]) for term in row["terms"].values())


def test_validation_reads_the_references() -> None:
    batch, found = tiny.make_batch([3, 1, 5, 2], k=2), []
    for share in (0.0, 0.5):
        trainer = distiller(on_policy=share)
        trainer.prepare(batch)
        found.append(trainer.validate(FixedBatches([batch])))
    assert found[0] == found[1]


def test_a_student_comes_to_predict_as_the_teacher_does_after_its_own_words() -> None:
    """The reverse of exposure bias: divergence on samples of the student, which it never reads."""
    student, batch = tiny.make_student(), tiny.make_batch([2] * 12)
    trainer = distiller(
        student, on_policy=1.0, weights={"ce": 0.0}, learning_rate=0.02, schedule="constant"
    )

    def distance() -> float:
        drawn = replace_captions(student, batch, 1.0, seed=99)
        with torch.no_grad(), evaluating(student, trainer.teacher):
            q, p = (model(drawn).logits.log_softmax(-1) for model in (student, trainer.teacher))
            kl = (p.exp() * (p - q)).sum(-1)[drawn.target_mask]
        return float(kl.mean())

    before = distance()
    for trainer.epoch in range(40):
        trainer.step(batch)
    assert distance() < 0.2 * before


# -- in a run -----------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 3, "learning_rate": 0.01}


@pytest.mark.parametrize("step", [2, 3, 4])  # of three an epoch
def test_a_run_interrupted_and_resumed_equals_one_run(
    saveable: Callable[..., Captioner], colours: CaptionData, tmp_path: Path, step: int
) -> None:
    class CtrlC:
        def on_step(self, trainer: Any, row: Any) -> None:
            if row["step"] == step:
                signal.raise_signal(signal.SIGINT)

    def run(out: str, seed: int = 1, **more: Any) -> Distiller:
        student = saveable(seed=seed, dropout=0.3)
        both = {"on_policy": (0.2, 0.9), "word_dropout": 0.2, "accumulation_steps": 1}
        trainer = Distiller(tiny.make_teacher(), student, **OPTIONS, **both)
        trainer.fit(Curriculum(colours, start=0.5), out=tmp_path / out, **more)
        return trainer

    whole = run("whole")
    with pytest.warns(UserWarning, match=f"Interrupted after step {step}"):
        run("parts", callbacks=[CtrlC()])
    rest = run("parts", seed=8, resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


@pytest.mark.parametrize(
    "options", [{"cache_features": True, "cache_views": 2}, {"accumulation_steps": 2}]
)
def test_it_combines_with_cached_features_and_accumulation(
    colours: CaptionData, tmp_path: Path, options: dict[str, Any]
) -> None:
    student = tiny.make_student(trainable=False)
    trainer = Distiller(
        tiny.make_teacher(trainable=False), student, on_policy=0.5, **OPTIONS, **TOKEN
    )
    if "cache_features" in options:
        options["cache_dir"] = tmp_path
    history = trainer.fit(colours, colours, log_every=1, **options)
    counts = [row["counts"] for row in history.steps]
    assert [each["ce"] for each in counts] == [4 * row["images"] for row in history.steps]
    assert all(each["token"] > each["ce"] for each in counts)


def test_images_without_captions_are_learned_from_by_samples(colours: CaptionData) -> None:
    bare = CaptionData(Example.unlabelled(e.image_id, e.path) for e in colours.examples)

    def distiller(share: float) -> Distiller:
        models, weights = (tiny.make_teacher(), tiny.make_student()), {"ce": 0.0}
        return Distiller(*models, weights=weights, on_policy=share, **OPTIONS, **TOKEN)

    history = distiller(1.0).fit(bare, epochs=1, log_every=1)
    assert [row["counts"]["token"] > 0 for row in history.steps] == [True] * 3
    with pytest.raises(ConfigError, match="no captions, but these terms read them: token"):
        distiller(0.0).fit(bare, epochs=1)


def wrapped() -> Any:
    return cd.teachers.wrap(tiny.make_teacher(), lambda model, batch: model(batch), tiny.TOKENIZER)


def ensemble() -> Any:
    return cd.teachers.Ensemble([tiny.make_teacher(), tiny.make_teacher(seed=5)], mixing="draw")


@pytest.mark.parametrize("teacher", [wrapped, ensemble])
def test_other_teachers_score_the_samples(teacher: Callable[[], Any]) -> None:
    trainer = Distiller(
        teacher(), tiny.make_student(), on_policy=1.0, weights={"ce": 0.0}, **tiny.QUIET, **TOKEN
    )
    trainer.steps_per_epoch = 1
    row = trainer.step(tiny.make_batch([3, 1]))
    assert row["counts"]["token"] > 0
    assert row["terms"]["token"]["raw"] > 0


def test_the_average_of_the_student_scores_the_samples(colours: CaptionData) -> None:
    student = tiny.make_student()
    teacher = cd.teachers.MeanTeacher(student)
    trainer = Distiller(teacher, student, on_policy=0.5, **OPTIONS, **TOKEN)
    history = trainer.fit(colours, log_every=1)
    assert [row["terms"]["token"]["raw"] > 0 for row in history.steps] == [False, *[True] * 8]


def test_in_half_precision_every_parameter_gets_a_gradient() -> None:
    trainer = distiller(on_policy=0.5, precision="bf16")
    terms = trainer.terms(tiny.make_batch([3, 1, 5, 2], k=2))
    torch.stack([term.weighted for term in terms.values()]).sum().backward()
    assert [n for n, p in trainer.student.named_parameters() if p.grad is None] == []


def test_check_tries_a_step_on_samples(colours: CaptionData) -> None:
    trainer = Distiller(tiny.make_teacher(), tiny.make_student(), on_policy=0.5, **OPTIONS)
    report = trainer.check(colours)
    assert report.ok, report.select("fail")


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_policy": 1.0}, r'leaves nothing for the cross-entropy\. Give weights=\{"ce": 0'),
        ({"on_policy": (1, 1)}, "leaves nothing for the cross-entropy"),
        ({"on_policy": 0.5, "losses": {}}, "none of the losses .there are none. compares words"),
        ({"on_policy": 0.5, "losses": {"feature": "feature"}}, "losses .feature. compares words"),
        ({"on_policy": 0.5, "weights": {"token": 0.0}}, "there are none"),
        ({"on_policy": 1.5}, "'on_policy' was given 1.5: expected a share from 0 to 1, or a pair"),
        ({"on_policy": (0.1, 0.2, 0.3)}, "expected a share from 0 to 1"),
        ({"on_policy": True}, "expected a share|expected a finite number"),
        ({"on_policy_temperature": 0.0}, "on_policy_temperature"),
    ],
)
def test_what_teaches_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(tiny.make_teacher(), tiny.make_student(), **{**tiny.QUIET, **TOKEN, **options})
    if "on_policy" in options and "losses" not in options and "weights" not in options:
        plain = Distiller(tiny.make_teacher(), tiny.make_student(), **tiny.QUIET, **TOKEN)
        with pytest.raises(ConfigError, match=said):
            plain.fit([images(2)], epochs=1, **options)


def test_a_share_that_reaches_one_keeps_the_cross_entropy() -> None:
    assert "ce" in distiller(on_policy=(0.0, 1.0)).objective.weights


def test_a_trainer_without_a_teacher_refuses_it() -> None:
    said = r"Trainer: on_policy=0.5 was given, but there is no teacher to score.*Distiller"
    with pytest.raises(ConfigError, match=said):
        Trainer(tiny.make_student(), on_policy=0.5)
    with pytest.raises(ConfigError, match=said):
        Trainer(tiny.make_student(), DistillConfig(on_policy=0.5))
    with pytest.raises(ConfigError, match=r"on_policy=0\.5 replaces captions by samples"):
        cd.SelfCritical(tiny.make_student(), on_policy=0.5)
    assert Trainer(tiny.make_student(), DistillConfig(epochs=3, **tiny.QUIET)).config.epochs == 3


def test_a_run_file_accepts_it_for_a_distillation_only() -> None:
    parts = {"data": {"path": "sample"}, "train": {"on_policy": [0.0, 0.5], "on_policy_top_k": 9}}
    model = {"preset": "debug_student"}
    run = parse_run(DistillRun, {**parts, "teacher": "t", "student": model})
    assert (run.train.on_policy, run.train.on_policy_top_k) == ((0.0, 0.5), 9)
    again = run.model_dump(mode="json")["train"]
    assert DistillConfig(**again) == run.train
    with pytest.raises(ConfigError, match="there is no teacher to score"):
        parse_run(TrainRun, {**parts, "model": model})
