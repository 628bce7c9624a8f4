"""Three parts as one model: what it gives for a batch, and captions for pictures of any form."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import capdistill as cd
from capdistill import decoders, encoders
from capdistill.errors import ConfigError, DataError, IncompatibleModels, UnknownName
from capdistill.runtime import evaluating
from tests.toy_captioner import WORDS, LetterTokenizer, Patches, batch_of, pictures, tokenizer, toy

BOTH = frozenset({"hidden", "attention"})


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


@pytest.fixture
def batch():
    return batch_of(tokenizer(), ["a dog", "a red dog runs", "a cat", "cat"], pictures(2))


def texts_of(captioner, images):
    return [captioner.caption(image) for image in images]


# What it gives for a batch


def test_forward_joins_encoder_and_decoder_and_is_aligned_with_the_targets(batch):
    captioner = toy()
    out = captioner(batch, BOTH)
    features = captioner.encoder(batch.images)
    expected = captioner.decoder(batch.input_ids[:, :-1], features, BOTH)
    assert torch.equal(out.features, features)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.attention, expected.attention)
    assert all(map(torch.equal, out.hidden, expected.hidden))
    assert torch.equal(out.mask, batch.mask[:, 1:])
    assert captioner(batch).hidden is captioner(batch).attention is None


def test_features_alone_do_not_run_the_decoder(batch):
    captioner = toy()
    features = captioner.encoder(batch.images)
    captioner.decoder.forward = None  # calling it is a TypeError
    out = captioner(batch, need=frozenset({"features"}))
    assert torch.equal(out.features, features)
    assert out.logits is out.hidden is out.attention is None


def test_an_output_that_no_captioner_has_is_refused_with_a_suggestion(batch):
    with pytest.raises(ConfigError, match=r"no output 'hiden'. Did you mean 'hidden'"):
        toy()(batch, need=frozenset({"hiden"}))


def test_a_longer_padding_leaves_the_logits_of_real_words(batch):
    captioner = toy().double()
    longer = replace(
        batch, input_ids=F.pad(batch.input_ids, (0, 4)), mask=F.pad(batch.mask, (0, 4))
    )
    real = captioner(batch).logits[batch.target_mask]
    assert_close(captioner(longer).logits[longer.target_mask], real, rtol=0, atol=1e-12)


def test_cached_trunk_tokens_of_a_frozen_trunk_take_the_place_of_the_pictures(batch):
    captioner = toy()
    captioner.encoder.fingerprint = lambda: "mine"
    tokens = captioner.encoder.trunk(batch.images).detach()
    empty = torch.zeros(2, 3, 0, 0, dtype=torch.uint8)
    cached = replace(batch, images=empty, cached={"mine": tokens.half(), "other": tokens * 0})
    with pytest.raises(DataError, match="no pixels, and no tokens of this encoder"):
        captioner(cached)  # the trunk is trained: it must see the pictures
    captioner.encoder.backbone.requires_grad_(False)
    features = captioner.encoder.head(tokens.half().float())
    assert torch.equal(captioner(cached).features, features)
    assert torch.equal(captioner(cached).logits, captioner.decoder(batch.inputs, features).logits)
    captioner.encoder.fingerprint = lambda: "changed since"
    captioner.encoder.cache_key()
    with pytest.raises(DataError, match="no pixels, and no tokens of this encoder"):
        captioner(cached)


def test_parts_of_different_widths_are_refused_with_the_fix():
    narrow = decoders.create("lstm", dim=4, hidden=8)
    message = r"gives tokens of width 8 but the decoder reads width 4\. .* dim=4"
    with pytest.raises(IncompatibleModels, match=message):
        cd.Captioner(Patches(dim=8), narrow, tokenizer())


def test_a_decoder_of_another_vocabulary_is_refused():
    captioner = toy()
    with pytest.raises(ConfigError, match="was built for 10 words but is now used with 5"):
        cd.Captioner(Patches(dim=8), captioner.decoder, LetterTokenizer())


def test_an_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(UnknownName, match="Did you mean 'debug_student'"):
        cd.Captioner.create("debug_studnet", tokenizer=tokenizer())


def test_the_spec_says_what_the_outputs_are(batch):
    captioner = toy()
    spec, out = captioner.spec(batch), captioner(batch, BOTH)
    assert out.features.shape[1:] == (spec.tokens, spec.feature_dim) == (4, 8)
    assert tuple(h.shape[-1] for h in out.hidden) == spec.hidden_dims
    assert (spec.vocabulary[4:], spec.grid, spec.prefix_tokens) == (WORDS, (2, 2), 0)
    assert (spec.name, spec.has_attention) == ("toy", True)


def test_parameters_are_counted_once_and_the_trained_ones_apart():
    captioner = toy()
    by_hand = sum(p.numel() for p in set(captioner.parameters()))
    frozen = sum(p.numel() for p in captioner.encoder.backbone.requires_grad_(False).parameters())
    assert captioner.num_parameters() == by_hand
    assert captioner.num_parameters(trainable=True) == by_hand - frozen > 0


# Captions


def test_captions_depend_on_the_picture():
    """Otherwise no test below could fail."""
    assert len(set(toy().caption(pictures(8)))) >= 4


def test_law_8_a_picture_alone_and_in_a_batch_gets_the_same_caption():
    captioner, images = toy().double(), pictures(7)
    assert captioner.caption(images) == texts_of(captioner, images)
    assert captioner.caption(images, batch_size=3) == texts_of(captioner, images)


def test_case_12_special_tokens_are_never_in_the_text():
    for seed in range(20):
        for text in toy(seed=seed).caption(pictures()):
            assert set(text.split()) <= set(WORDS)


def test_a_text_is_its_tokens_decoded():
    captioner = toy()
    for hypothesis in captioner.generate(pictures()):
        words = [captioner.tokenizer.vocabulary[i] for i in hypothesis.tokens]
        assert hypothesis.text == " ".join(words)


def test_a_batch_and_its_pictures_get_the_same_captions(batch):
    assert toy().generate(batch) == toy().generate(batch.images)


def test_the_limit_is_the_tokenizers_and_its_end_token_unless_given():
    captioner = toy()
    with torch.no_grad():
        captioner.decoder.bias[2] = -1e9  # never ends
    (found,) = captioner.generate(pictures(1))
    assert (len(found.tokens), found.finished) == (7, False)
    assert len(captioner.generate(pictures(1), max_length=2)[0].tokens) == 2
    assert len(captioner.caption(pictures(1)[0], max_length=3).split()) == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused_and_not_taken_for_none(limit):
    with pytest.raises(ConfigError, match=f"max_length must be at least 1 token, got {limit}"):
        toy().generate(pictures(1), max_length=limit)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(
        ConfigError, match="batch_size=0 was given; expected a whole number of at least 1"
    ):
        toy().caption(pictures(1), batch_size=0)


def test_case_7_a_tokenizer_whose_padding_is_its_end_learns_to_stop():
    words = LetterTokenizer()
    captions, images = ["a dog runs", "a cat"], torch.stack([pictures(2)[0], 255 - pictures(2)[0]])
    captioner, batch = toy(words), batch_of(words, captions, images)
    assert int(batch.target_mask.sum()) == 7
    optimizer = torch.optim.Adam(captioner.parameters(), 0.02)
    for _ in range(60):
        out = captioner(batch)
        F.cross_entropy(out.logits[out.mask], batch.targets[out.mask]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = captioner.generate(images)
    assert [h.text for h in found] == captions
    assert all(h.finished for h in found)


@pytest.mark.parametrize("mode", [True, False])
def test_training_flags_and_buffers_come_back_after_captions(mode):
    captioner = toy().train(mode)
    captioner.encoder.backbone.eval()  # what a frozen trunk does
    flags = [part.training for part in captioner.modules()]
    buffers = [buffer.clone() for buffer in captioner.buffers()]
    expected = toy().caption(pictures())
    assert captioner.caption(pictures()) == expected
    assert [h.text for h in captioner.generate(pictures())] == expected
    assert [part.training for part in captioner.modules()] == flags
    assert all(map(torch.equal, captioner.buffers(), buffers))


def test_training_flags_come_back_after_an_error():
    captioner = toy().train()
    with pytest.raises(DataError):
        captioner.generate(torch.zeros(1, 3, 8, 8))
    assert all(part.training for part in captioner.modules())


def test_evaluation_mode_ends_with_its_block():
    captioner = toy().train()
    with evaluating(captioner):
        assert not any(part.training for part in captioner.modules())
    assert all(part.training for part in captioner.modules())


# Pictures of any form


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "dog.png"
    Image.fromarray(pictures(1, 12)[0].permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        str,
        Path,
        Path.read_bytes,
        lambda path: bytearray(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        Image.open,
        lambda path: np.asarray(Image.open(path)),
        lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
        lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255,
    ],
    ids=["str", "path", "bytes", "bytearray", "file", "pillow", "array", "tensor", "float tensor"],
)
def test_one_picture_in_any_form_gives_one_text_and_always_the_same(photo, form):
    captioner, expected = toy(), toy().caption(pictures(1, 12)[0])
    with_pixels = form(photo)
    assert captioner.caption(with_pixels) == expected
    assert isinstance(expected, str)


def test_an_open_file_is_one_picture(photo):
    with photo.open("rb") as file:
        assert toy().caption(file) == toy().caption(photo)


@pytest.mark.parametrize(
    "many",
    [
        list,
        tuple,
        lambda images: (image for image in images),
        lambda images: images,
        lambda images: images.permute(0, 2, 3, 1).numpy(),
        lambda images: map(Image.fromarray, images.permute(0, 2, 3, 1).numpy()),
    ],
    ids=["list", "tuple", "generator", "tensor", "array", "map"],
)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_many_pictures_give_a_text_each_in_their_order(many, batch_size):
    captioner, images = toy(), pictures(5)
    assert captioner.caption(many(images), batch_size=batch_size) == texts_of(captioner, images)


def test_pictures_of_different_sizes_and_forms_may_be_mixed(photo):
    captioner, wide = toy(), torch.zeros(3, 9, 30, dtype=torch.uint8)
    mixed = [photo, wide, np.zeros((20, 7), np.uint8), photo.read_bytes()]
    assert captioner.caption(mixed) == texts_of(captioner, mixed)


@pytest.mark.parametrize("nothing", [[], (), iter(()), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)])
def test_no_picture_gives_no_text(nothing):
    assert toy().caption(nothing) == []


def test_a_stream_is_read_a_batch_at_a_time():
    captioner, taken, waiting = toy(), [], []

    def stream():
        for image in pictures(5):
            taken.append(image)
            yield image

    captioner.encoder.register_forward_hook(lambda *_: waiting.append(len(taken)))
    captioner.caption(stream(), batch_size=2)
    assert waiting == [2, 4, 5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "given as int; expected a path, bytes"),
        (None, "given as NoneType; expected a path"),
        ([pictures(1)[0], None], "given as NoneType"),
        (object(), "given as object"),
        ("no/such.jpg", r"no/such\.jpg: the image cannot be read \(No such file"),
        (["no/such.jpg"], r"no/such\.jpg"),
        (b"<html>", "not an image format that Pillow knows"),
        (torch.zeros(8), r"tensor \(8,\)"),
        (torch.zeros(1, 2, 3, 8, 8), r"tensor \(1, 2, 3, 8, 8\)"),
        (pictures(1)[0].float(), r"expected \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_named(wrong, message):
    with pytest.raises(DataError, match=message):
        toy().caption(wrong)


def test_a_captioner_prints_as_one_useful_line():
    text = repr(toy())
    assert text.startswith("Captioner 'toy': Patches (4 tokens x 8) + LSTMDecoder, 10 vocabulary")
    assert f"{toy().num_parameters():,} parameters" in text
    assert len(text) < 200
    assert "\n" not in text


def test_details_encode_an_image_once_and_show_the_attention_of_forward():
    captioner, images = toy(), pictures(3)
    calls = []
    handle = captioner.encoder.register_forward_hook(lambda *args: calls.append(1))
    results = captioner.caption(images, details=True, batch_size=3)
    handle.remove()
    assert len(calls) == 1
    assert [result.text for result in results] == captioner.caption(images)
    features = captioner.eval().encoder(images)
    for index, result in enumerate(results):
        ids = torch.tensor([[1, *map(captioner.tokenizer.vocabulary.index, result.tokens)]])
        out = captioner.decoder(ids, features[index : index + 1], BOTH)
        assert_close(result.attention, out.attention[0, : len(result.tokens)].detach())
