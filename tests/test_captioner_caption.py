"""Captions of many images: in their order, in bounded memory, with all that is known on request."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from capdistill import Captioner, encoders
from capdistill.errors import ConfigError, DataError
from capdistill.generation.hypotheses import CaptionResult
from capdistill.outputs import Batch, CaptionerOutput
from tests.toy_captioner import Patches, pictures, toy


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


def test_an_unreadable_image_is_named_and_its_place_is_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no photo")
    first, second = pictures(2)
    captioner = toy()
    with pytest.warns(UserWarning, match=r"caption: image 1 was left out: .*broken\.jpg"):
        texts = captioner.caption([first, broken, second], errors="skip", batch_size=2)
    assert texts == [captioner.caption(first), None, captioner.caption(second)]


def test_a_batch_of_unreadable_images_is_no_end(tmp_path: Path) -> None:
    images = [b"no", b"photo", pictures(1)[0]]
    with pytest.warns(UserWarning, match="was left out"):
        assert [text is None for text in toy().caption(images, errors="skip", batch_size=2)] == [
            True,
            True,
            False,
        ]
    with pytest.raises(DataError):
        toy().caption(images, batch_size=2)


def test_another_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"errors='ignore' was given"):
        toy().caption(pictures(1), errors="ignore")


def test_a_stream_may_be_endless() -> None:
    frames, captioner = pictures(3), toy()
    endless = itertools.cycle(frames)
    first = list(itertools.islice(captioner.caption_stream(endless, batch_size=2), 5))
    expected = captioner.caption(frames)
    assert first == [*expected, *expected[:2]]


@pytest.mark.parametrize(
    "alone", ["dog.jpg", Path("dog.jpg"), b"photo", pictures(1)[0], pictures(1)[0].numpy(), None]
)
def test_a_stream_of_one_image_is_refused(alone: object) -> None:
    """The letters of a path and the rows of an array are no images."""
    with pytest.raises(DataError, match="expected an iterable of images"):
        next(toy().caption_stream(alone))  # type: ignore[arg-type]


def test_a_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert toy().caption(pictures(3), progress=True) == toy().caption(pictures(3))
    assert "3/3" in capsys.readouterr().err


def test_details_are_those_of_the_decoders_own_probabilities() -> None:
    captioner, images = toy(seed=3), pictures(4)
    for found, image in zip(captioner.caption(images, details=True), images, strict=True):
        assert isinstance(found, CaptionResult)
        assert found.text == captioner.caption(image)
        assert found.text == captioner.tokenizer.decode(found.n_best[0].tokens)
        tokens = list(found.n_best[0].tokens) + [captioner.tokenizer.end_id] * found.finished
        output = forced(captioner, image, tokens)
        expected = output.logits[0].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert_close(torch.tensor(found.token_log_probs), expected, rtol=1e-4, atol=1e-5)
        assert found.log_prob == pytest.approx(float(expected.sum()), rel=1e-4)
        words = len(found.tokens)
        assert found.attention.shape == (words, 4)
        assert_close(found.attention, output.attention[0, :words], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.image, image)


def forced(captioner: Captioner, image: Tensor, tokens: list[int]) -> CaptionerOutput:
    ids = torch.tensor([[captioner.tokenizer.start_id, *tokens]])
    batch = Batch(image[None], ids, torch.ones_like(ids, dtype=torch.bool), ("",), ("1",))
    with torch.no_grad():
        return captioner.eval()(batch, frozenset({"attention"}))


def test_details_are_of_the_grid_that_pictures_need() -> None:
    found = toy().caption(pictures(1)[0], details=True)
    assert (found.grid, found.prefix_tokens) == ((2, 2), 0)
    assert found.tokens == tuple(found.text.split())


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy().caption(pictures(2), errors="skip")
