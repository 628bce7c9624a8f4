"""Examples without captions, with references of their own, and with weighted captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capdistill.data import CaptionData, Example, Images, Loader
from capdistill.errors import ConfigError, DataError
from capdistill.tokenizer import WordTokenizer
from tests.data.data_pictures import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "inner/deep/c.webp", ".hidden.png", ".cache/d.png"):
        picture(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_gives_all_its_images_by_their_paths_below_it(folder: Path) -> None:
    data = Images(folder)
    assert data.image_ids == ("a.JPG", "b.png", "inner/deep/c.webp")
    assert data.captions == []
    assert data.references == dict.fromkeys(data.image_ids, ())
    assert str(data) == "photos: 3 images, 0 captions"
    assert len(data.split(val=0.4).val) == 1


def test_a_list_gives_the_images_it_names(folder: Path) -> None:
    paths = [folder / "b.png", str(folder / "a.JPG")]
    data = Images(paths)
    assert data.image_ids == tuple(map(str, paths))
    with pytest.raises(DataError, match="occurs twice"):
        Images([folder / "b.png", folder / "b.png"])


def test_a_folder_without_images_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        Images(folder / "b.png")
    with pytest.raises(DataError, match="holds no image"):
        Images(_empty(tmp_path))
    with pytest.raises(DataError, match="holds no image"):
        Images([])


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize("train", [True, False])
def test_their_batches_have_no_targets(folder: Path, tokenizer: WordTokenizer, train: bool) -> None:
    (batch,) = Loader(Images(folder), tokenizer, image_size=16, batch_size=8, train=train)
    assert batch.num_images == len(batch.captions) == 3
    assert batch.input_ids.shape[1] >= 2  # decoders read at least one token
    assert not batch.target_mask.any()
    assert batch.references == (None if train else ((), (), ()))


def test_images_with_and_without_captions_share_batches(
    colours: CaptionData, folder: Path, tokenizer: WordTokenizer
) -> None:
    several = [
        Example(e.image_id, e.path, [f"{e.captions[0]} w{n}" for n in range(3)])
        for e in colours.examples
    ]
    mixed = CaptionData([*several, *Images(folder).examples])
    loader = Loader(mixed, tokenizer, image_size=16, batch_size=16, train=True)
    (batch,) = loader
    assert batch.captions_per_image == 3  # the median of those that have captions
    targets = batch.target_mask.view(9, 3, -1).sum(-1)
    for image_id, counts in zip(batch.image_ids, targets.tolist(), strict=True):
        assert counts == ([5, 5, 5] if image_id in colours.image_ids else [0, 0, 0])


def test_references_are_kept_apart_from_the_captions(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    data = CaptionData(
        Example(e.image_id, e.path, ["a w1", "a w2"], references=e.captions)
        for e in colours.examples
    )
    assert data.references == colours.references
    assert set(data.captions) == {"a w1", "a w2"}
    (trained,) = Loader(data, tokenizer, image_size=16, train=True)
    assert set(trained.captions) == {"a w1", "a w2"}
    (evaluated,) = Loader(data, tokenizer, image_size=16)
    assert evaluated.references == tuple(e.captions for e in colours.examples)
    with pytest.raises(DataError, match=r"A reference of image 'x'.*expected text"):
        Example("x", "x.png", ["a dog"], references=["a dog", None])  # type: ignore[list-item]


def test_weights_follow_their_captions(colours: CaptionData, tokenizer: WordTokenizer) -> None:
    weighted = [
        Example(e.image_id, e.path, ["a w1", "a w2", "a w3"], weights=[1, 2, 3])
        for e in colours.examples
    ]
    data = CaptionData([*weighted[:4], *colours.examples[4:]])
    loader = Loader(data, tokenizer, image_size=16, batch_size=6, train=True, captions_per_image=2)
    for epoch in range(3):
        (batch,) = loader.epoch(epoch)
        expected = [float(text[-1]) if " w" in text else 1.0 for text in batch.captions]
        assert batch.caption_weights is not None
        assert batch.caption_weights.tolist() == expected
    (plain,) = Loader(colours, tokenizer, image_size=16, train=True)
    assert plain.caption_weights is None


def test_weights_change_neither_the_choice_nor_the_order_of_captions(
    colours: CaptionData, tokenizer: WordTokenizer
) -> None:
    texts = [f"a w{n}" for n in range(5)]
    plain = CaptionData(Example(e.image_id, e.path, texts) for e in colours.examples)
    weighted = CaptionData(
        Example(e.image_id, e.path, texts, weights=range(5)) for e in colours.examples
    )
    options = {"image_size": 16, "train": True, "captions_per_image": 3}
    for epoch in range(2):
        (one,), (other,) = (
            Loader(data, tokenizer, **options).epoch(epoch) for data in (plain, weighted)
        )
        assert one.captions == other.captions
        assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, "2"]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises((DataError, ConfigError), match=r"image 'x'"):
        Example("x", "x.png", ["a dog", "a cat"], weights=weights)


@pytest.mark.parametrize("source", [None, 3, b"photos", {"dog": "dog.jpg"}])
def test_what_names_no_files_is_refused(source: object) -> None:
    with pytest.raises(DataError, match="Give a folder, or a list of files"):
        Images(source)  # type: ignore[arg-type]


def test_an_empty_list_is_not_called_a_folder() -> None:
    with pytest.raises(DataError, match="the list holds no image"):
        Images([])
