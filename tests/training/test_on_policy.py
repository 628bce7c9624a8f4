"""Captions sampled from the student: their words, their randomness (law 7), and what runs twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from capdistill import Captioner
from capdistill.decoders.base import Decoder, DecoderState
from capdistill.errors import ConfigError
from capdistill.generation.search import image_keys, row_keys, uniforms
from capdistill.outputs import Batch, DecoderOutput
from capdistill.runtime import autocast, stable_hash
from capdistill.tokenizer import WordTokenizer
from capdistill.training.on_policy import sample_captions, with_frozen_tokens
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
