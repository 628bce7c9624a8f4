"""What every decoder promises, in float64 where numbers are compared."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from capdistill import decoders
from capdistill.errors import ConfigError
from capdistill.outputs import DecoderOutput
from tests.decoders.decoder_cases import DIM, FORMS, TOKENS, VOCABULARY, every_form, inputs, make

BOTH = frozenset({"hidden", "attention"})


def stepped(decoder, ids, state):
    """Logits (R, T, V) word by word, and the state after the last."""
    logits = []
    for word in ids.T:
        out, state = decoder.step(word, state)
        logits.append(out)
    return torch.stack(logits, 1), state


@every_form
@pytest.mark.parametrize("k", [1, 3])
def test_forward_equals_repeated_step(form, k):
    decoder, (ids, features) = make(form), inputs(k=k)
    logits, state = stepped(decoder, ids, decoder.start(features).expand(k))
    assert_close(logits, decoder(ids, features).logits, rtol=0, atol=1e-12)
    assert (state.position, state.beams) == (ids.shape[1], k)


@every_form
def test_rows_made_in_the_middle_go_on_from_the_words_before(form):
    decoder, (ids, features) = make(form), inputs(k=3)
    ids[:, :2] = ids[::3, :2].repeat_interleave(3, 0)  # the captions of an image begin alike
    _, state = stepped(decoder, ids[::3, :2], decoder.start(features))
    logits, _ = stepped(decoder, ids[:, 2:], state.expand(3))
    assert_close(logits, decoder(ids, features).logits[:, 2:], rtol=0, atol=1e-12)


@every_form
def test_expand_twice_is_expand_by_the_product(form):
    decoder, (ids, features) = make(form), inputs(k=4)
    logits, state = stepped(decoder, ids, decoder.start(features).expand(2).expand(2))
    assert_close(logits, decoder(ids, features).logits, rtol=0, atol=1e-12)
    assert state.beams == 4


@every_form
def test_a_reordered_row_carries_its_whole_past(form):
    decoder, (ids, features) = make(form), inputs(k=3)
    index = torch.tensor([2, 0, 0, 4, 5, 3])  # stays within the image's group
    _, state = stepped(decoder, ids[:, :3], decoder.start(features).expand(3))
    logits, _ = stepped(decoder, ids[:, 3:], state.reorder(index))
    expected = decoder(torch.cat([ids[index, :3], ids[:, 3:]], 1), features).logits[:, 3:]
    assert_close(logits, expected, rtol=0, atol=1e-12)


@every_form
@pytest.mark.parametrize("kept", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_kept_images_go_on_as_if_the_others_had_never_been(form, kept):
    decoder, (ids, features) = make(form), inputs(images=3, k=2)
    _, state = stepped(decoder, ids[:, :3], decoder.start(features).expand(2))
    rows = ids.view(3, 2, -1)[kept].flatten(0, 1)
    logits, _ = stepped(decoder, rows[:, 3:], state.keep(kept))
    expected = decoder(rows, features[kept]).logits[:, 3:]
    assert_close(logits, expected, rtol=0, atol=1e-12)


@every_form
def test_what_belongs_to_an_image_is_never_copied_for_its_rows(form):
    decoder, (ids, features) = make(form), inputs(k=1)
    state = decoder.start(features)
    _, after = decoder.step(ids[:, 0].repeat_interleave(4), state.expand(4))
    after = after.reorder(torch.arange(8).flip(0))
    assert all(value.shape[0] == 2 for value in after.image.values())
    assert all(after.image[key] is value for key, value in state.image.items())


@every_form
def test_a_step_does_not_change_the_state_it_was_given(form):
    decoder, (ids, features) = make(form), inputs(k=1)
    _, state = decoder.step(ids[:, 0], decoder.start(features))
    before = {key: value.clone() for key, value in {**state.image, **state.row}.items()}
    first, _ = decoder.step(ids[:, 1], state)
    again, _ = decoder.step(ids[:, 1], state)
    assert torch.equal(first, again)
    assert all(torch.equal({**state.image, **state.row}[key], before[key]) for key in before)


@every_form
def test_a_later_word_does_not_change_earlier_outputs(form):
    decoder, (ids, features) = make(form), inputs(length=7)
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % VOCABULARY
    mine, theirs = decoder(ids, features, BOTH), decoder(other, features, BOTH)
    assert_close(mine.logits[:, :4], theirs.logits[:, :4], rtol=0, atol=1e-13)
    assert_close(mine.attention[:, :4], theirs.attention[:, :4], rtol=0, atol=1e-13)
    for layer, changed in zip(mine.hidden, theirs.hidden, strict=True):
        assert_close(layer[:, :4], changed[:, :4], rtol=0, atol=1e-13)
    assert (mine.logits[:, 4:] - theirs.logits[:, 4:]).abs().amax(-1).min() > 1e-6


@every_form
def test_padding_after_the_end_changes_nothing_before_it(form):
    decoder, (ids, features) = make(form), inputs()
    longer = torch.cat([ids, torch.zeros(len(ids), 10, dtype=torch.int64)], 1)
    mine, padded = decoder(ids, features, BOTH), decoder(longer, features, BOTH)
    assert_close(padded.logits[:, :6], mine.logits, rtol=0, atol=1e-12)
    assert_close(padded.hidden[-1][:, :6], mine.hidden[-1], rtol=0, atol=1e-12)


@every_form
def test_captions_and_images_do_not_see_each_other(form):
    decoder, (ids, features) = make(form), inputs(images=2, k=3)
    logits = decoder(ids, features).logits
    for row in range(6):
        alone = decoder(ids[row : row + 1], features[row // 3][None]).logits
        assert_close(logits[row], alone[0], rtol=0, atol=1e-12)


@every_form
def test_the_image_matters_to_every_word(form):
    decoder, (ids, features) = make(form), inputs()
    moved = decoder(ids, features.flip(0)).logits - decoder(ids, features).logits
    assert moved.abs().amax(-1).min() > 1e-6


@every_form
def test_hidden_has_the_widths_that_are_announced(form):
    decoder, (ids, features) = make(form), inputs()
    hidden = decoder(ids, features, BOTH).hidden
    assert tuple(h.shape for h in hidden) == tuple((6, 6, w) for w in decoder.hidden_dims)
    assert len(hidden) == FORMS[form][1]["layers"] + 1


@every_form
def test_the_last_hidden_vector_is_what_the_vocabulary_projection_sees(form):
    decoder, (ids, features) = make(form), inputs()
    out = decoder(ids, features, BOTH)
    tied = FORMS[form][1].get("tied", True)
    matrix = decoder.embedding.weight if tied else decoder.vocabulary_output.weight
    by_hand = out.hidden[-1] @ matrix.T + getattr(decoder, "bias", 0.0)
    assert_close(out.logits, by_hand, rtol=0, atol=1e-12)


@every_form
def test_the_last_hidden_vector_is_taken_before_dropout(form):
    decoder, (ids, features) = make(form), inputs()
    decoder.train()
    assert (decoder(ids, features, BOTH).hidden[-1] != 0).all()


@every_form
def test_attention_is_a_distribution_over_the_visual_tokens(form):
    decoder, (ids, features) = make(form), inputs()
    attention = decoder(ids, features, BOTH).attention
    assert attention.shape == (6, 6, TOKENS)
    assert (attention > 0).all()
    assert_close(attention.sum(-1), torch.ones(6, 6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert attention.std(-1).min() > 0


@every_form
@pytest.mark.parametrize("need", [set(), {"hidden"}, {"attention"}, {"hidden", "attention"}])
def test_what_is_needed_is_given_alone_and_does_not_change_the_logits(form, need):
    decoder, (ids, features) = make(form), inputs()
    out = decoder(ids, features, frozenset(need))
    assert isinstance(out, DecoderOutput)
    assert (out.hidden is not None) == ("hidden" in need)
    assert (out.attention is not None) == ("attention" in need)
    assert_close(out.logits, decoder(ids, features).logits, rtol=0, atol=1e-12)


@every_form
@pytest.mark.parametrize("need", [frozenset(), BOTH])
def test_a_gradient_reaches_every_parameter_and_the_features(form, need):
    decoder, (ids, features) = make(form), inputs()
    features.requires_grad_()
    decoder(ids, features, need).logits.square().sum().backward()
    without = [name for name, p in decoder.named_parameters() if not _reached(p)]
    assert without == []
    assert (features.grad.abs().sum(-1) > 0).all()


def _reached(parameter):
    return parameter.grad is not None and bool((parameter.grad != 0).any())


@every_form
def test_a_tied_matrix_is_one_parameter(form):
    decoder = make(form)
    width = decoder.embedding.embedding_dim
    tied = FORMS[form][1].get("tied", True)
    large = [n for n, p in decoder.named_parameters() if p.shape == (VOCABULARY, width)]
    wide = [n for n, p in decoder.named_parameters() if p.ndim == 2 and len(p) == VOCABULARY]
    assert large == ["embedding.weight"]
    assert wide == large if tied else wide == [*large, "vocabulary_output.weight"]


@every_form
def test_building_again_for_the_same_vocabulary_does_nothing(form):
    decoder, (ids, features) = make(form), inputs()
    before = decoder(ids, features).logits
    decoder.build(VOCABULARY)
    assert torch.equal(decoder(ids, features).logits, before)


@every_form
def test_another_vocabulary_is_refused_and_nothing_changes(form):
    decoder = make(form)
    with pytest.raises(
        ConfigError, match=r"was built for 11 words but is now used with 12\. Create"
    ):
        decoder.build(VOCABULARY + 1)
    assert decoder.embedding.num_embeddings == VOCABULARY


@every_form
def test_the_vocabulary_is_built_where_the_rest_is(form):
    cls, options = FORMS[form]
    decoder = cls(DIM, **options).to("meta", torch.float64)
    decoder.build(VOCABULARY)
    assert {(p.device.type, p.dtype) for p in decoder.parameters()} == {("meta", torch.float64)}


@every_form
@pytest.mark.parametrize("need", [frozenset(), BOTH])
def test_bfloat16_autocast_runs_forward_and_backward_and_stays_near(form, need):
    decoder, (ids, features) = make(form, dropout=0.0, dtype=torch.float32), inputs()
    features = features.float()
    exact = decoder(ids, features).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder.train()(ids, features, need)
        out.logits.float().square().mean().backward()
    assert_close(out.logits.float(), exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())
    if need:
        assert_close(out.attention.float().sum(-1), torch.ones(6, 6), rtol=0, atol=1e-2)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_decoder_cast_to_another_precision_keeps_it(form, dtype):
    decoder, (ids, features) = make(form, dtype=dtype), inputs(k=1)
    out = decoder(ids, features.to(dtype), BOTH)
    logits, _ = decoder.step(ids[:, 0], decoder.start(features.to(dtype)))
    assert out.logits.dtype == logits.dtype == dtype
    assert torch.isfinite(out.logits).all()


@every_form
def test_bfloat16_autocast_steps(form):
    decoder, (ids, features) = make(form, dtype=torch.float32), inputs(k=1)
    exact = decoder(ids, features.float()).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits, _ = stepped(decoder, ids, decoder.start(features.float()))
    assert_close(logits.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm", {"heads": 3}, "dim 8 must be a multiple of heads 3"),
        ("lstm", {"heads": 0}, "LSTMDecoder: heads=0 was given; expected a whole number"),
        ("lstm", {"layers": 0}, "layers=0 was given; expected a whole number of at least 1"),
        ("lstm", {"hidden": "64"}, "hidden='64' was given"),
        ("lstm", {"dropout": 2}, "dropout=2 was given; expected a number of at least 0"),
        ("lstm", {"attention": "none"}, "attention='none' is unknown. Use 'recurrent' or"),
        ("transformer", {"width": 12, "heads": 5}, "width 12 must be even and a multiple of"),
        ("transformer", {"width": 9, "heads": 3}, "width 9 must be even"),
        ("transformer", {"heads": 0}, "TransformerDecoder: heads=0 was given"),
        ("transformer", {"layers": 0}, "layers=0 was given; expected a whole number of at least 1"),
        ("transformer", {"ffn": 1.5}, "ffn=1.5 was given"),
        ("transformer", {"dropout": None}, "dropout=None was given"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_values(name, options, message):
    with pytest.raises(ConfigError, match=message):
        decoders.create(name, dim=DIM, **options)


def test_dropout_acts_in_training_alone():
    for form in FORMS:
        decoder, (ids, features) = make(form, dropout=0.5), inputs()
        assert torch.equal(decoder(ids, features).logits, decoder(ids, features).logits)
        decoder.train()
        assert not torch.equal(decoder(ids, features).logits, decoder(ids, features).logits)
        assert isinstance(decoder.drop, nn.Dropout)
