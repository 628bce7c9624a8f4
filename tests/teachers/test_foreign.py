"""A captioner that is not ours, with its own layout, serves as teacher through `wrap`."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.feature import FeatureKD
from capdistill.losses.hidden import HiddenKD
from capdistill.losses.token import TokenKD
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.teachers import ForeignTeacher, normalised, wrap
from capdistill.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(["a", "dog", "cat", "runs", "sits"])
IDS = [[1, 4, 5, 7, 2], [1, 4, 6, 2, 0], [1, 6, 2, 0, 0], [1, 5, 8, 2, 0]]
MEAN = STD = (0.5, 0.5, 0.5)


class TheirCaptioner(nn.Module):
    """Time first, pixels in [-1, 1], one picture a caption; returns (log-probabilities, states)."""

    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.words = nn.Embedding(9, 6)
        self.gru = nn.GRU(6, 8)
        self.out = nn.Linear(8, 9)

    def forward(self, pixels, words):
        seen = self.see(pixels)  # (B, 6, 2, 2)
        states, _ = self.gru(self.words(words) + seen.mean((2, 3)))  # (T, B, 8)
        return self.out(states).log_softmax(-1), states, seen


def adapt(module, batch):
    k = batch.captions_per_image
    pixels = normalised(batch, MEAN, STD, size=8).repeat_interleave(k, 0)
    logits, states, seen = module(pixels, batch.inputs.T)
    return CaptionerOutput(
        logits=logits.transpose(0, 1),
        hidden=(states.transpose(0, 1),),
        features=seen[::k].flatten(2).transpose(1, 2),
        attention=None,
        mask=batch.target_mask,
    )


@pytest.fixture
def batch():
    ids = torch.tensor(IDS)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, ids, ids != 0, ("",) * 4, ("1.jpg", "2.jpg"))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return wrap(TheirCaptioner(), adapt, TOKENIZER, name="theirs")


def test_a_foreign_captioner_gives_its_own_numbers_in_our_layout(teacher, batch):
    teacher.eval()
    output = teacher(batch)
    row, image = 3, 1
    pixels = nn.functional.interpolate(
        batch.images[image : image + 1].float(), (8, 8), mode="bicubic", antialias=True
    ).clamp(0, 255)
    logits, states, seen = teacher.module(pixels / 127.5 - 1, batch.inputs[row][:, None])
    assert_close(output.logits[row], logits[:, 0])
    assert_close(output.hidden[0][row], states[:, 0])
    assert_close(output.features[image], seen[0].flatten(1).T)


def test_losses_run_against_a_foreign_teacher(teacher, batch):
    teacher.requires_grad_(False)
    torch.manual_seed(1)
    student = wrap(TheirCaptioner(), adapt, TOKENIZER, name="mine")
    for loss in (TokenKD(), FeatureKD(), HiddenKD()):
        loss.build(student.spec(batch), teacher.spec(batch))
        output = student(batch, loss.needs)
        total = loss(output, teacher(batch, loss.needs), batch)
        total.backward()
        assert total > 0
    assert all(p.grad is not None for p in student.parameters())


def test_the_spec_is_probed_on_the_first_batch_and_remembered(teacher, batch):
    found = teacher.spec(batch)
    assert (found.feature_dim, found.tokens, found.hidden_dims) == (6, 4, (8,))
    assert (found.prefix_tokens, found.grid, found.has_attention) == (0, None, False)
    assert (found.vocabulary, found.name) == (TOKENIZER.vocabulary, "theirs")
    assert teacher.spec() is found


def test_a_probe_leaves_no_trace(teacher, batch):
    teacher.train()
    teacher.module.see[1].eval()
    modes = [part.training for part in teacher.modules()]
    buffers = [buffer.clone() for buffer in teacher.buffers()]
    state = torch.get_rng_state()
    teacher.adapt = lambda module, b: (torch.rand(1), adapt(module, b))[1]
    teacher.spec(batch)
    assert [part.training for part in teacher.modules()] == modes
    assert_close(list(teacher.buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failed_probe_restores_the_mode_and_is_not_remembered(teacher, batch):
    def broken(module, batch):
        raise RuntimeError("their own bug")

    teacher.adapt = broken
    with pytest.raises(RuntimeError, match="their own bug"):
        teacher.spec(batch)
    assert all(part.training for part in teacher.modules())
    with pytest.raises(ConfigError, match="theirs: its spec is not known yet"):
        teacher.spec()


def test_a_declared_spec_is_used_without_a_batch(teacher, batch):
    spec = replace(teacher.spec(batch), grid=(2, 2))
    declared = wrap(teacher.module, adapt, TOKENIZER, spec=spec)
    assert declared.spec().grid == (2, 2)
    declared(batch)


@pytest.mark.parametrize(
    "given", [(None, adapt, 0), (nn.Identity(), 3, 0), (nn.Identity(), adapt, 3)]
)
def test_what_is_no_module_function_or_tokenizer_is_refused_at_once(given):
    module, function, tokenizer = given
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module|The tokenizer"):
        wrap(module, function, tokenizer or TOKENIZER)


def test_a_declared_spec_with_other_words_is_refused(teacher, batch):
    spec = replace(teacher.spec(batch), vocabulary=tuple("abcdefghi"))
    with pytest.raises(IncompatibleModels, match="not the tokenizer's 9"):
        wrap(teacher.module, adapt, TOKENIZER, spec=spec)


def returns(**changes):
    """An `adapt` that returns the right output with some fields changed."""

    def changed(module, batch):
        output = adapt(module, batch)
        return replace(output, **{name: change(output) for name, change in changes.items()})

    return changed


@pytest.mark.parametrize(
    ("field", "change", "found", "wanted"),
    [
        ("logits", lambda o: o.logits[:, :-1], (4, 3, 9), "(4, 4, 9)"),
        ("logits", lambda o: o.logits[..., :-1], (4, 4, 8), "(4, 4, 9)"),
        ("logits", lambda o: o.logits.flatten(0, 1), (16, 9), "(4, 4, 9)"),
        ("mask", lambda o: o.mask[:, 1:], (4, 3), "(4, 4)"),
        ("features", lambda o: o.features[[0, 0, 1, 1]], (4, 4, 6), "(2, 4, 6)"),
        ("features", lambda o: o.features[..., 1:], (2, 4, 5), "(2, 4, 6)"),
        ("attention", lambda o: o.logits, (4, 4, 9), "(4, 4, 4)"),
        ("hidden", lambda o: (o.hidden[0][..., 1:],), (4, 4, 7), "(4, 4, 8)"),
    ],
)
def test_a_wrong_shape_is_named_with_the_shape_that_is_wanted(
    teacher, batch, field, change, found, wanted
):
    teacher.spec(batch)
    teacher.adapt = returns(**{field: change})
    with pytest.raises(IncompatibleModels) as error:
        teacher(batch)
    message = str(error.value)
    assert message.startswith(f"theirs: adapt returned {field}")
    assert f"of shape {found}, but this batch needs {wanted}" in message


def test_a_missing_layer_is_refused(teacher, batch):
    teacher.spec(batch)
    teacher.adapt = returns(hidden=lambda o: (*o.hidden, *o.hidden))
    with pytest.raises(IncompatibleModels, match="2 hidden states, but the spec has 1"):
        teacher(batch)


def test_what_a_loss_needs_and_adapt_lacks_is_named(teacher, batch):
    with pytest.raises(IncompatibleModels, match="theirs: adapt returned None for attention"):
        teacher(batch, frozenset({"logits", "attention"}))


def test_something_that_is_no_output_is_refused(teacher, batch):
    teacher.adapt = lambda module, batch: module
    with pytest.raises(IncompatibleModels, match=r"returned TheirCaptioner, .* CaptionerOutput"):
        teacher(batch)


def test_freezing_and_mode_reach_the_module(teacher):
    teacher.eval().requires_grad_(False)
    assert isinstance(teacher, ForeignTeacher)
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_images_are_normalised_as_the_other_model_expects(batch):
    pixels = normalised(batch, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    expected = (batch.images[1, 2].double() / 255 - 0.3) / 2.0
    assert pixels.dtype == torch.float32
    assert pixels.shape == (2, 3, 16, 16)
    assert_close(pixels[1, 2].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), STD), (MEAN, (1.0,)), (MEAN, (1.0, 0.0, 1.0))])
def test_a_normalisation_that_does_not_fit_the_channels_is_refused(batch, mean, std):
    with pytest.raises(ConfigError, match="images of 3 channels"):
        normalised(batch, mean, std)


class TheirDecoder:
    """The oracle of greedy decoding: their own model, word after word, image after image."""

    def __init__(self, teacher):
        self.module = teacher.module.eval()

    def says(self, image, length):
        pixels = nn.functional.interpolate(
            image[None].float(), (8, 8), mode="bicubic", antialias=True
        )
        words = [TOKENIZER.start_id]
        while len(words) <= length and words[-1] != TOKENIZER.end_id:
            logits, _, _ = self.module(
                pixels.clamp(0, 255) / 127.5 - 1, torch.tensor(words)[:, None]
            )
            possible = logits[-1, 0]
            possible[[TOKENIZER.pad_id, TOKENIZER.start_id, TOKENIZER.unk_id]] = -torch.inf
            words.append(int(possible.argmax()))
        return TOKENIZER.decode(words[1:])


def test_a_foreign_captioner_captions_as_its_own_model_would(teacher, batch):
    teacher.train()
    texts = [hypothesis.text for hypothesis in teacher.generate(batch, max_length=6)]
    assert all(part.training for part in teacher.modules())
    oracle = TheirDecoder(teacher)
    assert texts == [oracle.says(image, 6) for image in batch.images]


def test_beams_of_a_foreign_captioner_are_scored_by_its_own_probabilities(teacher, batch):
    found = teacher.generate(batch.images, beam_size=3, max_length=4, length_normalisation="none")
    greedy = teacher.generate(batch.images, max_length=4)
    assert all(b.log_prob >= g.log_prob - 1e-6 for b, g in zip(found, greedy, strict=True))


def test_a_foreign_captioner_is_evaluated_and_compared(teacher, batch):
    from capdistill import Captioner, compare, evaluate

    batches = [replace(batch, references=(("a dog runs",), ("a cat sits",)))]
    alone = evaluate(teacher, batches, metrics=["bleu"])
    assert set(alone.captions) == {"1.jpg", "2.jpg"}
    assert alone.parameters == sum(p.numel() for p in teacher.parameters())
    assert alone.latency_ms is not None
    assert any("Size on disk" in note for note in alone.notes)
    student = Captioner.create("debug_student", tokenizer=TOKENIZER)
    both = compare(teacher, student, batches, metrics=["bleu"], measure=False)
    assert both.models["teacher"]["captions"] == dict(alone.captions)


def test_loaders_give_the_size_that_a_foreign_captioner_asks_for():
    from capdistill.compatibility import image_size

    assert image_size(wrap(TheirCaptioner(), adapt, TOKENIZER, image_size=300)) == 300
    assert image_size(wrap(TheirCaptioner(), adapt, TOKENIZER)) == 224


def test_features_alone_come_from_a_teacher_that_knows_fewer_words(teacher, batch):
    expected = teacher.eval()(batch).features
    beyond = replace(batch, input_ids=batch.input_ids.masked_fill(batch.input_ids == 2, 11))
    output = teacher(beyond, frozenset({"features"}))
    assert_close(output.features, expected)
    assert output.logits is None
    assert teacher.spec(beyond).feature_dim == 6


def test_a_teacher_may_have_features_alone(batch):
    def features_alone(module, batch):
        seen = module.see(normalised(batch, MEAN, STD, size=8))
        return CaptionerOutput(features=seen.flatten(2).transpose(1, 2))

    teacher = wrap(TheirCaptioner().eval(), features_alone, TOKENIZER, name="theirs")
    assert teacher(batch, frozenset({"features"})).features.shape == (2, 4, 6)
    assert (teacher.spec(batch).feature_dim, teacher.spec().hidden_dims) == (6, ())
    with pytest.raises(IncompatibleModels, match="adapt returned None for logits"):
        teacher(batch)
    with pytest.raises(IncompatibleModels, match="adapt returned None for logits"):
        teacher.generate(batch)


def test_a_mask_is_no_duty_of_a_foreign_teacher(teacher, batch):
    teacher.adapt = returns(mask=lambda o: None)
    loss = TokenKD()
    student = wrap(TheirCaptioner(), adapt, TOKENIZER)
    assert loss(student(batch), teacher(batch), batch) > 0
